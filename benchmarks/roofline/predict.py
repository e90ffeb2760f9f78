"""From model, device, setting and workload to seconds and requests."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.roofline.devices import Device
from benchmarks.roofline.operations import Operation, decode_operations, prefill_operations
from benchmarks.roofline.room import Room, pool_blocks, room_for
from benchmarks.roofline.setting import Setting, Workload
from benchmarks.roofline.shapes import ModelShape


@dataclass(frozen=True)
class Prediction:
    """What a roofline says of kernels that reach the device's shares of peak, with nothing between them.

    Fields:
        ttft_s: seconds until all prompts of the batch have their first token.
        tpot_s: seconds of one decode step of the batch.
        prefill_s, decode_s: the same by operation, seconds.
        room: what fits.
    """

    ttft_s: float
    tpot_s: float
    prefill_s: dict[str, float]
    decode_s: dict[str, float]
    room: Room


def predict(shape: ModelShape, device: Device, setting: Setting, workload: Workload) -> Prediction:
    """Sum of max(FLOPs / rate, bytes / rate) over the operations of a rank, and the room in its memory."""
    prefill = _seconds_by_name(device, prefill_operations(shape, setting, workload))
    decode = _seconds_by_name(device, decode_operations(shape, setting, workload))
    room = room_for(setting, workload, pool_blocks(shape, device, setting, workload))
    return Prediction(sum(prefill.values()), sum(decode.values()), prefill, decode, room)


def _seconds_by_name(device: Device, operations: Iterable[Operation]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for operation in operations:
        seconds[operation.name] = seconds.get(operation.name, 0.0) + device.seconds(operation)
    return seconds
