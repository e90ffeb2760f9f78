"""Prometheus metrics of compression, recorded in the front end from figures the scheduler sends."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from fastkv_vllm.adapter.step import CompressionStats
from fastkv_vllm.cache import LeftAlone

LEFT_ALONE = "vllm:fastkv_requests_left_alone"
CUTS = "vllm:fastkv_cuts"
STASH_BYTES = "vllm:fastkv_stash_bytes"
POOL_TOKENS, BLOCK_TOKENS = "vllm:fastkv_pool_tokens", "vllm:fastkv_block_tokens"
# Counter -> labels beside those all have, and documentation; units are in the names.
COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "vllm:fastkv_requests_compressed": (
        ("method",),
        "Prompts compressed; one compressed again after preemption counts again.",
    ),
    "vllm:fastkv_prompt_tokens_seen": (("method",), "Tokens of compressed prompts."),
    "vllm:fastkv_prompt_tokens_kept": (("method",), "Entries kept per layer and KV head of compressed prompts."),
    "vllm:fastkv_blocks_freed": (
        ("method",),
        "Blocks given back to the pool at the end of prefill, or (halting rule, guard) a step later.",
    ),
    "vllm:fastkv_decode_blocks_freed": (
        ("method",),
        "Blocks given back while decoding, when as many entries had been dropped.",
    ),
    "vllm:fastkv_guard_triggers": (
        ("method",),
        "Prompts whose budget kept less attention than min_attention_recall, so that more stayed.",
    ),
    "vllm:fastkv_guard_shortfalls": (
        ("method",),
        "Of these, prompts for which max_retention_ratio was not enough either.",
    ),
    LEFT_ALONE: (("reason",), "Prompts not compressed."),
    "vllm:fastkv_tsp_rows_in": ((), "Rows that reached the first TSP layer."),
    "vllm:fastkv_tsp_rows_out": ((), "Rows that went on after the last TSP layer."),
    CUTS: (("layer",), "Prompts whose rows were cut, by the layer after which they were."),
    "vllm:fastkv_revived_rows": ((), "Rows of prompts that came back while decoding, once for each cut."),
    "vllm:fastkv_score_seconds": ((), "Time spent scoring entries, first worker."),
    "vllm:fastkv_select_seconds": ((), "Time spent selecting entries, and rows to go on, first worker."),
    "vllm:fastkv_compact_seconds": ((), "Time spent moving kept entries, first worker."),
}
_LABELS = ("model_name", "engine")


def encode_stats(stats: SchedulerStats, figures: CompressionStats) -> None:
    """Put our figures into a field of vLLM's statistics, those with a label as metric/label.

    The message to the front end is typed, its only open integer maps are the LoRA ones, and LoRA is refused with
    compression. Integers only: seconds travel as microseconds.
    """
    worker = figures.worker
    stats.running_lora_adapters = {
        **{
            f"vllm:fastkv_{name}/{method}": count
            for method, prompts in figures.by_method.items()
            for name, count in vars(prompts).items()
        },
        **{f"{LEFT_ALONE}/{reason}": count for reason, count in figures.left_alone.items()},
        "vllm:fastkv_tsp_rows_in": worker.tsp_rows_in,
        "vllm:fastkv_tsp_rows_out": worker.tsp_rows_out,
        "vllm:fastkv_revived_rows": worker.revived_rows,
        "vllm:fastkv_score_seconds": worker.score_us,
        "vllm:fastkv_select_seconds": worker.select_us,
        "vllm:fastkv_compact_seconds": worker.compact_us,
        STASH_BYTES: worker.stash_bytes,
        **{f"{CUTS}/{layer}": count for layer, count in worker.cut_layers.items()},
    }


class FastKVStatLogger(AggregateStatLoggerBase):
    """`vllm.stat_logger_plugins`: exposes the figures on `/metrics`; does nothing on a server without compression."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Iterable[int] = (0,)) -> None:
        self._config = vllm_config.additional_config.get("fastkv")
        self._cache = vllm_config.cache_config
        self._model_name = vllm_config.model_config.served_model_name
        self._engines = list(engine_indexes)
        self._counters: dict[str, Counter] = {}

    def log_engine_initialized(self) -> None:
        # Not earlier: vLLM's own Prometheus logger clears all `vllm:` metrics when it is made, after us.
        if self._config is None:
            return
        self._counters = {name: Counter(name, text, [*_LABELS, *own]) for name, (own, text) in COUNTERS.items()}
        self._stash = _gauge(STASH_BYTES, "Bytes of rows that wait for their prompt's last chunk or may come back.")
        pool = _gauge(POOL_TOKENS, "Tokens that the engine's blocks hold uncompressed.")
        block = _gauge(BLOCK_TOKENS, "Tokens that a block holds uncompressed.")
        num_blocks = self._cache.num_gpu_blocks // len(self._engines)  # known only now; vLLM gives that of all engines
        # What is known to come is there from the start, at 0: the server's own method, and each reason. Layers are not.
        first: dict[tuple[str, ...], list[tuple[str, ...]]] = {
            (): [()],
            ("method",): [(self._config["method"],)],
            ("reason",): [(reason.value,) for reason in LeftAlone],
            ("layer",): [],
        }
        for engine in self._engines:
            for name, (own, _) in COUNTERS.items():
                for values in first[own]:
                    self._counters[name].labels(self._model_name, str(engine), *values)
            self._stash.labels(self._model_name, str(engine)).set(0)
            pool.labels(self._model_name, str(engine)).set(num_blocks * self._cache.block_size)
            block.labels(self._model_name, str(engine)).set(self._cache.block_size)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if self._config is None or scheduler_stats is None:
            return
        labels = self._model_name, str(engine_idx)
        for key, value in scheduler_stats.running_lora_adapters.items():
            name, *own = key.split("/", 1)
            if name == STASH_BYTES:
                self._stash.labels(*labels).set(value)
            elif value:
                self._counters[name].labels(*labels, *own).inc(value / 1e6 if name.endswith("_seconds") else value)


def _gauge(name: str, text: str) -> Gauge:
    return Gauge(name, text, _LABELS, multiprocess_mode="mostrecent")
