"""Arithmetic that predicts time and room of a transformer on a device; the command is `benchmarks.model`."""

from benchmarks.roofline.compare import Comparison
from benchmarks.roofline.devices import DEVICES, Device
from benchmarks.roofline.measured import compare_measured
from benchmarks.roofline.operations import Kind, Operation, decode_operations, prefill_operations
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.published import compare_published
from benchmarks.roofline.room import Room, block_bytes, pool_blocks, room_for
from benchmarks.roofline.setting import Setting, Workload, setting_of
from benchmarks.roofline.shapes import MODELS, ModelShape

__all__ = [
    "DEVICES",
    "MODELS",
    "Comparison",
    "Device",
    "Kind",
    "ModelShape",
    "Operation",
    "Prediction",
    "Room",
    "Setting",
    "Workload",
    "block_bytes",
    "compare_measured",
    "compare_published",
    "decode_operations",
    "pool_blocks",
    "predict",
    "prefill_operations",
    "room_for",
    "setting_of",
]
