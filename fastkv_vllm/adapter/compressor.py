"""What a worker does with a prompt in one layer: keep its window, rate its entries, move the ones that stay."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from fastkv_vllm.adapter.batch import PrefillRows
from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.adapter.step import WorkerStats
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.kernels.select import select


class Compressor:
    """Scores and compacts finished prompts, layer by layer, right after the layer's attention.

    Attention of a prompt never depends on this: a layer compacts what its attention has already read. What is held
    between steps belongs to unfinished prompts only and is keyed by position, so that a prompt computed again after
    preemption overwrites it; `forget` drops it.

    Fields:
        windows: (request, layer) -> window queries by position, [W, Hq, D].
        stash: request -> residual rows after the TSP layer by position, [P, hidden].
        selected: request -> rows chosen at the TSP layer in this step, ascending positions.
        stats: figures of the current step.
    """

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config
        self.method = config.make_method()
        self.tsp_layer = config.tsp_layer if config.uses_tsp else None
        self.windows: dict[tuple[str, int], torch.Tensor] = {}
        self.stash: dict[str, torch.Tensor] = {}
        self.selected: dict[str, torch.Tensor] = {}
        self.stats = WorkerStats()
        self._layouts: dict[tuple[int, int, torch.dtype, str], PageLayout] = {}

    def forget(self, partial: frozenset[str]) -> None:
        """Drop what is held for requests other than those whose prompt goes on."""
        self.windows = {key: q for key, q in self.windows.items() if key[0] in partial}
        self.stash = {rid: rows for rid, rows in self.stash.items() if rid in partial}

    def take_stats(self) -> WorkerStats:
        """Figures since the last call."""
        stats, self.stats = self.stats, WorkerStats()
        stats.stash_bytes = sum(rows.nbytes for rows in self.stash.values())
        return stats

    def after_attention(
        self,
        prefills: Iterable[PrefillRows],
        *,
        layer: int,
        scale: float,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        isa: str,
    ) -> None:
        """Compact the prompts that end in this step.

        All sources are read before the first destination is written: a destination may be a block that an earlier
        request of the same step has just given back.

        Args:
            prefills: requests with an unfinished prompt.
            layer: index of the layer.
            scale: softmax scale.
            query: [T, Hq, D]; key, value: [T, H, D]: the rows of this step, roped.
            kv_cache: the layer's cache, [num_blocks, H, block_size, 2 * D], with this step's rows written.
            isa: vLLM's name of the page layout.
        """
        moves = []
        layout = self._layout(kv_cache, isa)
        for prefill in prefills:
            if prefill.destination is None:
                self._keep_window(prefill, layer, query)
                continue
            with self._timed("score_us"):
                keys = key[prefill.rows].transpose(0, 1)
                if prefill.start and "keys" in self.method.needs:
                    keys = layout.read_keys(kv_cache, prefill.blocks, prefill.plan.num_tokens)
                scores = self._scores(prefill, layer, query, keys, scale)
                kept = select(scores[:, : scores.shape[1] - prefill.plan.num_tail], prefill.plan.num_moved)
            with self._timed("compact_us"):
                kept = kept.expand(kv_cache.shape[1], -1)
                moves.append(self._collect(prefill, kept, key, value, kv_cache, layout))
        with self._timed("compact_us"):
            for keys, values, slots in moves:
                layout.write(kv_cache, keys, values, slots)

    def _keep_window(self, prefill: PrefillRows, layer: int, query: torch.Tensor) -> None:
        """Remember the window queries of a chunk that ends inside the window."""
        plan = prefill.plan
        window_start, end = plan.num_tokens - plan.window_size, prefill.start + prefill.count
        first = max(prefill.start, window_start)
        if first < end:
            buffer = self._window_buffer(prefill, layer, query)
            buffer[first - window_start : end - window_start] = query[prefill.rows][first - prefill.start :]

    def _window_buffer(self, prefill: PrefillRows, layer: int, query: torch.Tensor) -> torch.Tensor:
        key = (prefill.request_id, layer)
        if key not in self.windows:
            self.windows[key] = query.new_zeros(prefill.plan.window_size, *query.shape[1:])
        return self.windows[key]

    def _window_queries(self, prefill: PrefillRows, layer: int, query: torch.Tensor) -> torch.Tensor:
        """The prompt's last W queries, [W, Hq, D]."""
        window = prefill.plan.window_size
        rows = query[prefill.rows][-window:]
        missing = window - rows.shape[0]
        if missing == 0:
            return rows
        return torch.cat([self.windows[prefill.request_id, layer][:missing], rows])

    def _scores(
        self, prefill: PrefillRows, layer: int, query: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Scores [H or 1, n] with forced entries at +inf; at the TSP layer the rows that go on are chosen too."""
        positions = self.selected[prefill.request_id] if prefill.late else torch.arange(prefill.plan.num_tokens)
        inputs = {"keys": keys, "positions": positions}
        if "queries" in self.method.needs:
            inputs["queries"] = self._window_queries(prefill, layer, query) * scale
        scores = self.method.score(**{name: inputs[name] for name in self.method.needs})
        forced = (positions >= prefill.plan.forced_from) | (positions < prefill.plan.num_sink)
        if layer == self.tsp_layer and prefill.plan.num_tsp is not None:
            # Ranks hold some of the heads each: all must choose the same rows. The reduction is in place, the rating
            # of a rank's only head is that head's scores: hence the copy.
            rating = tensor_model_parallel_all_reduce(self.method.propagation_scores(scores).clone())
            rating = rating.masked_fill(forced, float("inf"))
            self.selected[prefill.request_id] = select(rating.unsqueeze(0), prefill.plan.num_tsp)[0]
        return scores.masked_fill(forced, float("inf"))

    @staticmethod
    def _collect(
        prefill: PrefillRows,
        kept: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PageLayout,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of the kept entries (keys, values [K, H, D]) and the slots they go to [K]."""
        plan = prefill.plan
        offsets = torch.arange(plan.block_size)
        slots = (torch.tensor(prefill.destination).unsqueeze(1) * plan.block_size + offsets).flatten()
        if prefill.start:
            return *layout.gather(kv_cache, prefill.blocks, kept), slots
        index = kept.T.unsqueeze(-1).expand(-1, -1, key.shape[-1])
        keys, values = key[prefill.rows].gather(0, index), value[prefill.rows].gather(0, index)
        if prefill.late and plan.num_tail:
            # The chosen rows were cached densely; the tail's true slots are still empty in this layer.
            tail = prefill.blocks[-1] * plan.block_size + offsets[: plan.num_tail]
            keys = torch.cat([keys, key[prefill.rows][-plan.num_tail :]])
            values = torch.cat([values, value[prefill.rows][-plan.num_tail :]])
            slots = torch.cat([slots, tail])
        return keys, values, slots

    def _layout(self, kv_cache: torch.Tensor, isa: str) -> PageLayout:
        block_size, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
        key = (block_size, head_dim, kv_cache.dtype, isa)
        if key not in self._layouts:
            self._layouts[key] = PageLayout.probe(
                block_size=block_size, head_dim=head_dim, dtype=kv_cache.dtype, isa=isa
            )
        return self._layouts[key]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self.stats, name, getattr(self.stats, name) + int((time.perf_counter() - start) * 1e6))
