"""Prometheus metrics of compression, recorded in the front end from figures the scheduler sends."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from fastkv_vllm.adapter.step import CompressionStats

# Metric -> documentation, of plain counters; units are in the names.
COUNTERS = {
    "vllm:fastkv_requests_compressed": "Prompts compressed; one compressed again after preemption counts again.",
    "vllm:fastkv_prompt_tokens_seen": "Tokens of compressed prompts.",
    "vllm:fastkv_prompt_tokens_kept": "Entries kept per layer and KV head of compressed prompts.",
    "vllm:fastkv_blocks_freed": "Blocks given back to the pool at the end of prefill, or (halting rule) a step later.",
    "vllm:fastkv_tsp_rows_in": "Rows that reached the first TSP layer.",
    "vllm:fastkv_tsp_rows_out": "Rows that went on after the last TSP layer.",
    "vllm:fastkv_score_seconds": "Time spent scoring and selecting entries, first worker.",
    "vllm:fastkv_compact_seconds": "Time spent moving kept entries, first worker.",
}
LEFT_ALONE = "vllm:fastkv_requests_left_alone"
STASH_BYTES = "vllm:fastkv_stash_bytes"
_MICROSECONDS = {"vllm:fastkv_score_seconds", "vllm:fastkv_compact_seconds"}


def encode_stats(stats: SchedulerStats, figures: CompressionStats) -> None:
    """Put our figures into a field of vLLM's statistics.

    The message to the front end is typed, its only open integer maps are the LoRA ones, and LoRA is refused with
    compression. Integers only: seconds travel as microseconds.
    """
    worker = figures.worker
    stats.running_lora_adapters = {
        "vllm:fastkv_requests_compressed": figures.requests_compressed,
        "vllm:fastkv_prompt_tokens_seen": figures.prompt_tokens_seen,
        "vllm:fastkv_prompt_tokens_kept": figures.prompt_tokens_kept,
        "vllm:fastkv_blocks_freed": figures.blocks_freed,
        "vllm:fastkv_tsp_rows_in": worker.tsp_rows_in,
        "vllm:fastkv_tsp_rows_out": worker.tsp_rows_out,
        "vllm:fastkv_score_seconds": worker.score_us,
        "vllm:fastkv_compact_seconds": worker.compact_us,
        STASH_BYTES: worker.stash_bytes,
        **{f"{LEFT_ALONE}/{reason}": count for reason, count in figures.left_alone.items()},
    }


class FastKVStatLogger(AggregateStatLoggerBase):
    """`vllm.stat_logger_plugins`: exposes the figures on `/metrics`; does nothing on a server without compression."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Iterable[int] = (0,)) -> None:
        self._enabled = "fastkv" in vllm_config.additional_config
        self._model_name = vllm_config.model_config.served_model_name
        self._engines = list(engine_indexes)
        self._counters: dict[str, Counter] = {}

    def log_engine_initialized(self) -> None:
        # Not earlier: vLLM's own Prometheus logger clears all `vllm:` metrics when it is made, after us.
        if not self._enabled:
            return
        labels = ["model_name", "engine"]
        self._counters = {name: Counter(name, text, labels) for name, text in COUNTERS.items()}
        self._left_alone = Counter(LEFT_ALONE, "Prompts not compressed, by reason.", [*labels, "reason"])
        self._stash = Gauge(
            STASH_BYTES,
            "Bytes of rows that wait for their prompt's last chunk.",
            labels,
            multiprocess_mode="mostrecent",
        )
        for engine in self._engines:
            for counter in self._counters.values():
                counter.labels(self._model_name, str(engine))
            self._stash.labels(self._model_name, str(engine)).set(0)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if not self._enabled or scheduler_stats is None:
            return
        for name, value in scheduler_stats.running_lora_adapters.items():
            if name == STASH_BYTES:
                self._stash.labels(self._model_name, str(engine_idx)).set(value)
            elif value and name.startswith(LEFT_ALONE):
                reason = name.partition("/")[2]
                self._left_alone.labels(self._model_name, str(engine_idx), reason).inc(value)
            elif value:
                seconds = value / 1e6 if name in _MICROSECONDS else value
                self._counters[name].labels(self._model_name, str(engine_idx)).inc(seconds)
