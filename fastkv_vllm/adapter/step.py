"""How plans and figures ride on vLLM's own messages between scheduler and workers."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from fastkv_vllm.cache import StepPlan
from fastkv_vllm.config import CompressionConfig

# Plain attributes of upstream's dataclasses: they survive pickling through the executor's message queue.
_ORDERS = "fastkv_orders"
_STATS = "fastkv_stats"


@dataclass
class WorkerStats:
    """What a worker did in one step; the scheduler adds it to its totals.

    Fields: rows that reached the first TSP layer and that went on after the last, rows that came back while decoding,
    bytes of rows now held, microseconds spent scoring entries, selecting those that stay (and the rows that go on), and
    moving them; layer -> prompts whose rows were cut after it; request whose prompt ended -> leading blocks of its
    destination that its pages did not need on any rank; request whose prompt ended with fewer entries than planned ->
    mean pages of a layer and head, rounded up; request with a guard whose prompt ended -> attention recall of what its
    budget asked for and of what stays.
    """

    tsp_rows_in: int = 0
    tsp_rows_out: int = 0
    revived_rows: int = 0
    stash_bytes: int = 0
    score_us: int = 0
    select_us: int = 0
    compact_us: int = 0
    cut_layers: dict[int, int] = field(default_factory=dict)
    surplus: dict[str, int] = field(default_factory=dict)
    fewer_pages: dict[str, int] = field(default_factory=dict)
    recalls: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent within it to a field, microseconds."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + int((time.perf_counter() - start) * 1e6))


@dataclass
class PromptStats:
    """Compressed prompts, their tokens, entries kept per layer and KV head, blocks given back then, and later.

    Of those with a guard: the ones whose budget kept too little attention, and of these the ones whose ceiling did.
    """

    requests_compressed: int = 0
    prompt_tokens_seen: int = 0
    prompt_tokens_kept: int = 0
    blocks_freed: int = 0
    decode_blocks_freed: int = 0
    guard_triggers: int = 0
    guard_shortfalls: int = 0


@dataclass
class CompressionStats(PromptStats):
    """Figures since the last report, from the scheduler to the front end.

    Fields: what inherits is of all methods together; the same of each method; prompts left alone by reason; what the
    worker did, of which `stash_bytes` is the current value.
    """

    by_method: dict[str, PromptStats] = field(default_factory=dict)
    left_alone: dict[str, int] = field(default_factory=dict)
    worker: WorkerStats = field(default_factory=WorkerStats)

    def add_prompts(self, method: str, prompts: PromptStats) -> None:
        for stats in (self, self.by_method.setdefault(method, PromptStats())):
            for item in fields(PromptStats):
                setattr(stats, item.name, getattr(stats, item.name) + getattr(prompts, item.name))

    def add_worker(self, stats: WorkerStats) -> None:
        for item in fields(WorkerStats):
            if item.name not in ("stash_bytes", "cut_layers", "surplus", "fewer_pages", "recalls"):
                setattr(self.worker, item.name, getattr(self.worker, item.name) + getattr(stats, item.name))
        for layer, count in stats.cut_layers.items():
            self.worker.cut_layers[layer] = self.worker.cut_layers.get(layer, 0) + count
        self.worker.stash_bytes = stats.stash_bytes


@dataclass(frozen=True)
class Orders:
    """What a step's workers must do.

    Fields:
        plan: of the step.
        configs: request in `plan.prefills` -> its configuration.
    """

    plan: StepPlan
    configs: Mapping[str, CompressionConfig]


def attach_orders(output: SchedulerOutput, orders: Orders) -> None:
    setattr(output, _ORDERS, orders)


def orders_of(output: SchedulerOutput) -> Orders:
    """Orders of a step.

    Raises:
        RuntimeError: the step was not scheduled by a compressing scheduler.
    """
    if _ORDERS not in vars(output):
        raise RuntimeError("a step without a compression plan reached a compressing worker: not our scheduler")
    return vars(output)[_ORDERS]


def attach_stats(output: ModelRunnerOutput, stats: WorkerStats) -> None:
    setattr(output, _STATS, stats)


def stats_of(output: ModelRunnerOutput) -> WorkerStats | None:
    """Figures of a step; None where no model ran."""
    return vars(output).get(_STATS)
