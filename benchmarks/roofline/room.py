"""How many blocks a device has for the cache, and how many requests they hold."""

from dataclasses import dataclass

from benchmarks.roofline.devices import Device
from benchmarks.roofline.operations import ACTIVATION_BYTES
from benchmarks.roofline.setting import Setting, Workload
from benchmarks.roofline.shapes import ModelShape

# vLLM 0.32's default of --gpu-memory-utilization.
UTILISATION = 0.92
# Assumptions, not measurements: rows of the largest step, and what runtime, graphs and the sampler take.
STEP_TOKENS = 8192
FIXED_BYTES = 1e9


@dataclass(frozen=True)
class Room:
    """What fits on each rank.

    Fields:
        pool_blocks: blocks for requests.
        blocks_peak: most blocks one request holds at once: its whole prompt must fit while it is computed.
        blocks_steady: blocks it holds at its end.
        longest_prompt: tokens of a prompt that fits alone; compression does not raise it.
    """

    pool_blocks: int
    blocks_peak: int
    blocks_steady: int
    longest_prompt: int

    @property
    def requests_steady(self) -> int:
        """Requests that fit once their prompts are done: pool // steady."""
        return self.pool_blocks // self.blocks_steady

    @property
    def requests_peak(self) -> int:
        """Requests that fit while one of them is at its peak: 1 + (pool - peak) // steady, 0 if none can be served."""
        if self.blocks_peak > self.pool_blocks:
            return 0
        return 1 + (self.pool_blocks - self.blocks_peak) // self.blocks_steady


def room_for(setting: Setting, workload: Workload, pool: int) -> Room:
    """Whole blocks of requests of `workload.context` prompt tokens and `workload.generated` ones in a given pool."""
    total = workload.context + workload.generated
    blocks = -(-total // setting.block_size)
    plan = setting.plan(workload.context)
    peak = blocks if plan is None else -(-plan.peak_tokens(total) // setting.block_size)
    steady = blocks if plan is None else blocks - plan.num_freed_blocks
    return Room(pool, peak, steady, pool * setting.block_size)


def pool_blocks(shape: ModelShape, device: Device, setting: Setting, workload: Workload) -> int:
    """(memory x utilisation - weights - reserve - stash) / bytes of a block, less vLLM's null block; 0 if negative.

    Per rank: weights are parameters x weight_bytes / p; the reserve is 2 S (2 h + 3 I / p) bytes for steps of S rows
    plus a fixed part; the stash of a TSP setting is 2 h bytes for each token of the longest sequence, on every rank.
    """
    ranks = workload.tensor_parallel
    weights = shape.num_parameters * shape.weight_bytes / ranks
    step_row = 2 * shape.hidden_size + 3 * shape.intermediate_size / ranks
    reserve = FIXED_BYTES + STEP_TOKENS * step_row * ACTIVATION_BYTES
    stash = 0
    if setting.compression is not None and setting.compression.has_stash:
        tokens = setting.compression.max_tsp_tokens or workload.context + workload.generated
        stash = tokens * shape.hidden_size * ACTIVATION_BYTES
    free = device.memory_bytes * UTILISATION - weights - reserve - stash
    return max(int(free // block_bytes(shape, setting, ranks)) - 1, 0)


def block_bytes(shape: ModelShape, setting: Setting, tensor_parallel: int) -> int:
    """Bytes of one block on one rank: 2 L H D kv_bytes block_size."""
    _, kv_heads = shape.heads_of_rank(tensor_parallel)
    return 2 * shape.num_layers * kv_heads * shape.head_dim * setting.kv_bytes * setting.block_size
