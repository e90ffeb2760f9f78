"""What a worker does with a prompt in one layer: keep its window, rate its entries, move the ones that stay."""

from collections.abc import Callable, Iterable, Sequence

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from fastkv_vllm.adapter.batch import DecodeRows, PrefillRows
from fastkv_vllm.adapter.encoded import EncodedPages, stored_pages
from fastkv_vllm.adapter.eviction import Evictor
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.moving import Move, Overwrite, encoding_move, even_move, pages_read, uneven_moves
from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.adapter.ragged import HeadPages, PagePool, SharedPages, blocks_for
from fastkv_vllm.adapter.ranks import mean_recall, rank_of, shared_pages
from fastkv_vllm.adapter.rating import add_votes, agree, is_forced, rate_rows, value_norms
from fastkv_vllm.adapter.revival import RevivablePages
from fastkv_vllm.adapter.step import WorkerStats
from fastkv_vllm.kernels.select import select, select_ragged
from fastkv_vllm.methods import (
    DENSITY,
    RankWatch,
    attention_mass,
    density,
    guarded_pages,
    halting_pages,
    kept_norms,
    last_attention,
    recall_by_pages,
)


class Compressor:
    """Scores and compacts finished prompts, layer by layer, right after the layer's attention; evicts after them.

    Attention of a prompt never depends on this: a layer compacts what its attention has already read. What is held
    between steps belongs to unfinished prompts only and is keyed by position, so that a prompt computed again after
    preemption overwrites it; `forget` drops it.

    Pages of uneven budgets cross layers and heads, so they are shared and moved when the whole step has run.

    Each prompt has its own recipe.

    Fields:
        layout: how a page is laid out inside; set with the cache.
        pool: all layers' pages; set with the cache.
        evictor: what goes on after a prompt; set with the cache.
        held: request -> pages of a prompt compressed unevenly or encoded, or of what was read by a stop, until the
            request is gone or preempted.
        scored: request -> scores of each layer, [H or 1, n - tail], of prompts to compress unevenly or to encode in
            this step, with the rows that the layer ran on.
        kept: request -> columns of each layer that stay before the tail, head after head, of prompts that ended in
            this step and whose entries are evicted while decoding.
        voters: request -> queries of each layer's voters, [W, Hq, D], of prompts whose keys lose channels in this step.
        halted: request -> most pages of each layer by the halting rule, of those prompts that have one.
        recalls: request -> attention recall of each layer by pages, of those prompts that have a guard.
        densities: request -> density of each layer added over all heads, of prompts whose layers share by it.
        windows: (request, layer) -> queries of the voters by position, [W, Hq, D].
        sums: (request, layer) -> attention each entry got from all queries so far, [H, n] float32.
        stash: request -> residual rows by position, after its first cut, or after each where rows may come back, [1 or
            cuts, P, hidden]; what may come back moves to `held` when the prompt has ended.
        selected: request -> rows chosen at the cut after the layer that runs, ascending positions; who makes the cut
            takes them away.
        watches: request -> what finds the layer of its cut, of prompts that end in this step.
        went_on: request -> rows chosen at each cut in this step, where rows may come back.
        stats: figures of the current step.
        watch: where set, called with a prompt, a layer and the positions that stay of each KV head, ascending.
    """

    def __init__(self) -> None:
        self.windows: dict[tuple[str, int], torch.Tensor] = {}
        self.sums: dict[tuple[str, int], torch.Tensor] = {}
        self.stash: dict[str, torch.Tensor] = {}
        self.selected: dict[str, torch.Tensor] = {}
        self.watches: dict[str, RankWatch] = {}
        self.went_on: dict[str, list[torch.Tensor]] = {}
        self.stats = WorkerStats()
        self.watch: Callable[[PrefillRows, int, Sequence[torch.Tensor]], None] | None = None
        self.layout: PageLayout | None = None
        self.pool: PagePool | None = None
        self.evictor: Evictor | None = None
        self.held: dict[str, Held] = {}
        self.scored: dict[str, list[tuple[PrefillRows, torch.Tensor]]] = {}
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.voters: dict[str, list[torch.Tensor]] = {}
        self.halted: dict[str, list[int]] = {}
        self.recalls: dict[str, list[torch.Tensor]] = {}
        self.densities: dict[str, list[float]] = {}
        self._moves: list[Move] = []

    def use_cache(self, kv_caches: Sequence[torch.Tensor], isa: str) -> None:
        """Get to know the engine's cache.

        Args:
            kv_caches: of each layer in order, [num_blocks, H, block_size, 2 * D].
            isa: vLLM's name of the page layout.
        """
        _, _, block_size, width = kv_caches[0].shape
        self.layout = PageLayout.probe(block_size=block_size, head_dim=width // 2, dtype=kv_caches[0].dtype, isa=isa)
        self.pool = PagePool.of(kv_caches, self.layout)
        self.evictor = Evictor(self.pool)

    def end_step(self) -> None:
        """Drop what is held within a step only."""
        self.selected.clear()
        self.watches.clear()
        self.went_on.clear()
        self.scored.clear()
        self.kept.clear()
        self.voters.clear()
        self.halted.clear()
        self.recalls.clear()
        self.densities.clear()
        self._moves.clear()

    def forget(self, partial: frozenset[str], compressed: frozenset[str]) -> None:
        """Drop what is held for requests other than those whose prompt goes on and those with compressed pages."""
        if self.evictor is not None:
            self.evictor.forget(compressed)
        self.held = {rid: pages for rid, pages in self.held.items() if rid in compressed}
        self.windows = {key: q for key, q in self.windows.items() if key[0] in partial}
        self.sums = {key: sums for key, sums in self.sums.items() if key[0] in partial}
        self.stash = {rid: rows for rid, rows in self.stash.items() if rid in partial}

    def erase(self, compressed: frozenset[str]) -> None:
        """Leave zeros where requests other than those with compressed pages had codes, before others write there."""
        for rid in self.held.keys() - compressed:
            pages = self.held[rid]
            if isinstance(pages, EncodedPages):
                assert self.pool is not None, "use_cache came first"
                pages.erase(self.pool)
                del self.held[rid]

    def take_stats(self) -> WorkerStats:
        """Figures since the last call."""
        stats, self.stats = self.stats, WorkerStats()
        streams = [pages.streams for pages in self.held.values() if isinstance(pages, RevivablePages)]
        stats.stash_bytes = sum(rows.nbytes for rows in (*self.stash.values(), *streams))
        return stats

    def after_attention(
        self,
        prefills: Sequence[PrefillRows],
        decodes: Iterable[DecodeRows],
        *,
        layer: int,
        scale: float,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """Compact the prompts that end in this step, or where budgets are uneven keep the scores for `finish`; evict.

        All sources are read before the first destination is written: a destination may be a block that an earlier
        request of the same step has just given back.

        Args:
            prefills: requests with an unfinished prompt.
            decodes: compressed requests whose entries are rated in this step.
            layer: index of the layer.
            scale: softmax scale.
            query: [T, Hq, D]; key, value: [T, H, D]: the rows of this step, roped.
            kv_cache: the layer's cache, [num_blocks, H, block_size, 2 * D], with this step's rows written.
        """
        layout = self.layout
        assert layout is not None, "use_cache came first"
        for prefill in prefills:
            if prefill.plan.reads_again and (layer != prefill.plan.first_cut or prefill.positions is not None):
                continue  # the prompt is rated in one layer, what is read again nowhere
            with self.stats.timed("score_us"):
                inputs = self._inputs(prefill, layer, scale, query, key, kv_cache)
                if prefill.destination is None:
                    continue
                scores = prefill.recipe.method.score(**{name: inputs[name] for name in prefill.recipe.method.needs})
                if prefill.recipe.config.layer_budgets == DENSITY:
                    of_heads = density(inputs["queries"], inputs["keys"]).sum(dim=0, keepdim=True)
                    of_layer = float(tensor_model_parallel_all_reduce(of_heads))
                    self.densities.setdefault(prefill.request_id, []).append(of_layer)
                if prefill.plan.planned_pages is not None:
                    mass = attention_mass(inputs["queries"], inputs["keys"])
                if prefill.recipe.config.value_norms:
                    scores = scores * self._value_norms(prefill, value, kv_cache)
            with self.stats.timed("select_us"):
                scores = self._settle(prefill, layer, scores)
                if prefill.plan.reads_again:
                    self._show_read_again(prefill, kv_cache.shape[1])
                    continue  # what is read again is cached where it stays
                scores = scores[:, : scores.shape[1] - prefill.plan.num_tail]
                if prefill.recipe.config.halting_loss is not None:
                    pages = self._halt(prefill, scores, query[prefill.rows][-1] * scale, key, kv_cache)
                    self.halted.setdefault(prefill.request_id, []).append(pages)
                if prefill.plan.planned_pages is not None:
                    recall = recall_by_pages(scores, mass, prefill.plan.block_size)
                    self.recalls.setdefault(prefill.request_id, []).append(recall)
                if prefill.plan.is_ragged or prefill.plan.page_entries is not None:
                    self.scored.setdefault(prefill.request_id, []).append((prefill, scores))
                    continue
                kept = select(scores, prefill.plan.num_moved)
            with self.stats.timed("compact_us"):
                kept = kept.expand(kv_cache.shape[1], -1)
                self._show(prefill, layer, list(kept))
                if prefill.plan.evicts:
                    self.kept.setdefault(prefill.request_id, []).append(kept.flatten())
                self._moves.append(even_move(prefill, kept, key, value, kv_cache, layout))
        for rows in decodes:
            self._evict(rows, layer, scale, query)
        if not self.scored and all(prefill.streaming is None for prefill in prefills):
            self._carry_out()

    def _evict(self, rows: DecodeRows, layer: int, scale: float, query: torch.Tensor) -> None:
        """Let rows of a compressed request vote, and where its block is full choose among its entries."""
        evictor = self.evictor
        assert evictor is not None, "use_cache came first"
        with self.stats.timed("score_us"):
            scores = evictor.rate(rows, layer, scale, query)
        if rows.evicts:
            with self.stats.timed("select_us"):
                stay = evictor.choose(rows, layer, scores)
            with self.stats.timed("compact_us"):
                self._moves += evictor.collect(rows, layer, stay)

    def encode(self, request_id: str, block: int, stays: bool) -> None:
        """Encode another block of a compressed request when `finish` is called; see `EncodedPages.with_block`."""
        held = self.held[request_id]
        assert self.pool is not None and isinstance(held, EncodedPages), "only a codec encodes later blocks"
        held = self.held[request_id] = held.with_block(self.pool, block, stays)
        with self.stats.timed("compact_us"):
            self._moves.append(encoding_move(held, self.pool, block))

    def finish(self, prefills: Iterable[PrefillRows]) -> None:
        """Share the pages of prompts with uneven budgets that ended in this step, and move their entries there.

        Those that go on with eviction are handed over. Heads of prompts that came to a stop let go.

        Call once after the step's layers have run: a page may go to another layer than the one it was written by, so
        every layer must have been read. All sources of all requests are copied before the first is written.
        """
        for prefill in prefills:
            if prefill.request_id in self.scored:
                self._share(prefill, self.scored.pop(prefill.request_id))
            if prefill.request_id in self.kept:
                self._hand_over(prefill)
            if prefill.streaming is not None:
                self._let_go(prefill, prefill.streaming)
        self._carry_out()

    def _hand_over(self, prefill: PrefillRows) -> None:
        """Let the evictor take over a prompt that was compressed in this step."""
        assert self.pool is not None and self.evictor is not None, "use_cache came first"
        plan, rid, kept = prefill.plan, prefill.request_id, self.kept[prefill.request_id]
        held = self.held.get(rid)
        if held is None:
            assert prefill.destination is not None, "the prompt ends"
            counts = torch.full((len(kept), self.pool.num_heads), plan.num_pages)
            held = HeadPages.share(plan.num_whole_blocks, counts, self.pool, prefill.destination)
        assert isinstance(held, HeadPages), "a codec excludes eviction"
        needs = prefill.recipe.method.needs
        sums, windows = (
            [of[rid, n] for n in range(len(kept))] if need in needs else []
            for need, of in (("column_sums", self.sums), ("queries", self.windows))
        )
        self.evictor.begin(prefill, held, kept, sums, windows)

    def _carry_out(self) -> None:
        with self.stats.timed("compact_us"):
            for move in self._moves:
                move.carry_out()
        self._moves.clear()

    def _let_go(self, prefill: PrefillRows, destination: Sequence[int]) -> None:
        """Heads keep their first and most recent pages of a prompt that came to a stop, which move to `destination`."""
        pool, streaming = self.pool, prefill.plan.streaming
        assert pool is not None and streaming is not None, "only then are there stops within a prompt"
        with self.stats.timed("compact_us"):
            num_whole = (prefill.start + prefill.count) // prefill.plan.block_size
            ours = streaming.of_rank(rank_of(prefill.plan), prefill.plan.num_ranks)
            pages = pages_read(prefill, pool, num_whole)
            self.held[prefill.request_id], old, new = pages.let_go(ours, pool, destination)
            self._moves.append(Overwrite(pool.cache, (new,), pool.cache[old]))

    def _share(self, prefill: PrefillRows, scored: Sequence[tuple[PrefillRows, torch.Tensor]]) -> None:
        """Pages for every layer and head of one prompt, and copies of what goes there."""
        plan, pool, scores = prefill.plan, self.pool, [of_layer for _, of_layer in scored]
        assert pool is not None and prefill.destination is not None, "the prompt ends and its budget is uneven"
        with self.stats.timed("select_us"):
            by_block = None
            if prefill.held is not None:
                assert plan.streaming is not None, "only then does an unfinished prompt hold pages of its own"
                by_block = pages_read(prefill, pool, plan.num_whole_blocks).by_block(plan.streaming.num_sink_pages)
                gone = (by_block < 0).repeat_interleave(plan.block_size, dim=2)
                scores = [of.masked_fill(layer, -float("inf")) for of, layer in zip(scores, gone, strict=True)]
            densities, most = self.densities.get(prefill.request_id, ()), self.halted.get(prefill.request_id)
            if prefill.request_id in self.recalls:
                most = [self._guard(prefill)] * len(scores)
            of_all = shared_pages(prefill, scores, pool.num_heads, densities, most)
            if blocks_for(of_all) < plan.num_pages:
                self.stats.fewer_pages[prefill.request_id] = blocks_for(of_all)
            by_rank = of_all.chunk(plan.num_ranks, dim=1)
            num_needed = max(blocks_for(stored_pages(plan, counts)) for counts in by_rank)
            self.stats.surplus[prefill.request_id] = len(prefill.destination) - num_needed
            counts = by_rank[rank_of(plan)]
            held: Held
            if plan.pair_entries is not None:
                held = MergedPages.share(plan, counts, prefill.recipe.config.pair_codec(), pool, prefill.destination)
            elif plan.layer_owners:
                owned = HeadPages.share(plan.num_whole_blocks, stored_pages(plan, counts), pool, prefill.destination)
                held = SharedPages.of(owned, plan.layer_owners)
            elif plan.page_entries is None:
                held = HeadPages.share(plan.num_whole_blocks, counts, pool, prefill.destination)
                if plan.revives:
                    rid = prefill.request_id
                    held = RevivablePages.of(held, plan, prefill.recipe, self.stash.pop(rid), self.went_on[rid])
            else:
                held = EncodedPages.share(plan, counts, prefill.recipe.config, pool, prefill.destination)
            kept = [
                select_ragged(layer.expand(pool.num_heads, -1), count * plan.block_size)
                for layer, count in zip(scores, counts, strict=True)
            ]
        if self.watch is not None:
            for layer, owner in enumerate(plan.layer_owners or range(len(scored))):
                self._show(scored[owner][0], layer, kept[owner].split((counts[owner] * plan.block_size).tolist()))
        self.held[prefill.request_id] = held
        if plan.evicts:
            self.kept[prefill.request_id] = kept
        with self.stats.timed("compact_us"):
            num_seen = [layer.shape[1] for layer in scores]
            voters = self.voters.get(prefill.request_id, ())
            self._moves += uneven_moves(prefill, pool, held, kept, num_seen, by_block, voters)

    def _show(self, prefill: PrefillRows, layer: int, kept: Sequence[torch.Tensor]) -> None:
        """Tell who watches which entries of a layer stay: the columns chosen of each head, and the tail."""
        if self.watch is None:
            return
        positions = self._positions(prefill)
        tail = positions[len(positions) - prefill.plan.num_tail :]
        self.watch(prefill, layer, [torch.cat([positions[columns], tail]) for columns in kept])

    def _show_read_again(self, prefill: PrefillRows, num_heads: int) -> None:
        """The same of a prompt whose chosen tokens are read again: they are all that stays, in all layers."""
        if self.watch is None:
            return
        assert self.pool is not None, "use_cache came first"
        for layer in range(len(self.pool.first)):
            self.watch(prefill, layer, [self.selected[prefill.request_id]] * num_heads)

    def _keep_window(self, prefill: PrefillRows, layer: int, query: torch.Tensor) -> None:
        """Remember the queries of those voters that are in a chunk before the last."""
        plan = prefill.plan
        window_start, end = plan.num_tokens - plan.num_voters, prefill.start + prefill.count
        first = max(prefill.start, window_start)
        if first < end:
            buffer = self._window_buffer(prefill, layer, query)
            buffer[first - window_start : end - window_start] = query[prefill.rows][first - prefill.start :]

    def _window_buffer(self, prefill: PrefillRows, layer: int, query: torch.Tensor) -> torch.Tensor:
        key = (prefill.request_id, layer)
        if key not in self.windows:
            self.windows[key] = query.new_zeros(prefill.plan.num_voters, *query.shape[1:])
        return self.windows[key]

    def _window_queries(self, prefill: PrefillRows, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Queries of the prompt's voters, [W, Hq, D]."""
        num_voters = prefill.plan.num_voters
        rows = query[prefill.rows][-num_voters:]
        missing = num_voters - rows.shape[0]
        if missing == 0:
            return rows
        return torch.cat([self.windows[prefill.request_id, layer][:missing], rows])

    def _inputs(
        self,
        prefill: PrefillRows,
        layer: int,
        scale: float,
        query: torch.Tensor,
        key: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """What the recipe needs of the layer, or nothing where the prompt goes on: what it will need is kept."""
        needs, ends = prefill.recipe.needs, prefill.destination is not None
        inputs = {}
        if "queries" in needs and not ends:
            self._keep_window(prefill, layer, query)
        if "column_sums" in needs or (ends and "keys" in needs):
            inputs["keys"] = self._keys(prefill, key, kv_cache)
        if "column_sums" in needs:
            inputs["column_sums"] = self._add_up(prefill, layer, query * scale, inputs["keys"])
        if not ends:
            return {}
        inputs["positions"] = self._positions(prefill)
        if "queries" in needs:
            window = self._window_queries(prefill, layer, query)
            if prefill.plan.evicts and "queries" in prefill.recipe.method.needs:
                # A copy: a view would keep all rows of the step.
                self.windows[prefill.request_id, layer] = window[-prefill.plan.num_later_voters :].clone()
            if prefill.recipe.config.drops_channels:
                self.voters.setdefault(prefill.request_id, []).append(window)
            inputs["queries"] = window * scale
        return inputs

    def _keys(self, prefill: PrefillRows, key: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """Keys of all entries so far, [H, n, D]."""
        if not prefill.start:
            return key[prefill.rows].transpose(0, 1)
        assert self.layout is not None, "use_cache came first"
        return self.layout.read_keys(kv_cache, prefill.blocks, prefill.start + prefill.count)

    def _halt(
        self,
        prefill: PrefillRows,
        scores: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> int:
        """Pages of each head of a layer by the halting rule, from the last query, scaled, [Hq, D].

        Norms are added over ranks, so that all of them need the same blocks.
        """
        attention = last_attention(query, self._keys(prefill, key, kv_cache))
        norms = tensor_model_parallel_all_reduce(kept_norms(scores, attention, prefill.plan.block_size))
        loss = prefill.recipe.config.halting_loss
        assert loss is not None, "asked by the caller"
        return halting_pages(norms, loss, prefill.plan.least_pages)

    def _guard(self, prefill: PrefillRows) -> int:
        """Pages of each layer and head that the guard lets stay."""
        plan, floor = prefill.plan, prefill.recipe.config.min_attention_recall
        assert plan.planned_pages is not None and floor is not None, "asked by the caller"
        recall = mean_recall(self.recalls[prefill.request_id], plan.num_pages)
        pages = guarded_pages(recall, floor, plan.planned_pages)
        kept = float(recall[plan.planned_pages - 1]), float(recall[pages - 1])
        self.stats.recalls[prefill.request_id] = kept
        return pages

    def _add_up(self, prefill: PrefillRows, layer: int, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Attention that the entries so far got from all queries so far, this step's among them, [H, n] float32."""
        decay, of_layer = prefill.recipe.config.decay, (prefill.request_id, layer)
        assert decay is not None, "filled in by CompressionConfig"
        before = self.sums.get(of_layer) if prefill.start else None
        self.sums[of_layer] = add_votes(before, query[prefill.rows], keys, decay)
        return self.sums[of_layer]

    def _value_norms(self, prefill: PrefillRows, value: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        """L1 norms of the values of all entries, [H, n] float32."""
        if not prefill.start:
            return value_norms(value[prefill.rows].transpose(0, 1))
        assert self.layout is not None, "use_cache came first"
        return value_norms(self.layout.read_values(kv_cache, prefill.blocks, prefill.plan.num_tokens))

    def _positions(self, prefill: PrefillRows) -> torch.Tensor:
        """Positions of the entries a layer sees, [n] int64."""
        return torch.arange(prefill.plan.num_tokens) if prefill.positions is None else prefill.positions

    def _settle(self, prefill: PrefillRows, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """Scores [H or 1, n] with forced entries at +inf; at a cut the rows that go on are chosen too, on all ranks."""
        plan, positions = prefill.plan, self._positions(prefill)
        scores = agree(prefill.recipe.method, scores)
        self._choose_rows(prefill, layer, scores)
        return scores.masked_fill(is_forced(plan, positions), float("inf"))

    def _choose_rows(self, prefill: PrefillRows, layer: int, scores: torch.Tensor) -> None:
        """The rows that go on, where this layer has a cut, from its scores [H or 1, n]."""
        plan, positions = prefill.plan, self._positions(prefill)
        cuts = dict(plan.cuts)
        has_none = layer not in cuts if plan.cut_from is None else len(positions) < plan.num_tokens
        if has_none:
            return
        rating, free = rate_rows(prefill.recipe.method, plan, scores, positions), ~is_forced(plan, positions)
        num_rows = cuts[layer] if plan.cut_from is None else self._decide(prefill, layer, rating[free])
        if num_rows == len(positions):
            self.selected[prefill.request_id] = positions
        elif num_rows is not None:
            chosen = self.selected[prefill.request_id] = positions[select(rating.unsqueeze(0), num_rows)[0]]
            if plan.revives:
                self.went_on.setdefault(prefill.request_id, []).append(chosen)

    def _decide(self, prefill: PrefillRows, layer: int, rating: torch.Tensor) -> int | None:
        """Rows that go on after a layer that may have the cut; None: those that it ran on.

        Rows in the stash wait for the first such layer only: if it is not the cut, all go on.

        Args:
            rating: of the rows that are not forced, alike on all ranks.
        """
        plan, config = prefill.plan, prefill.recipe.config
        ((last, num_rows),) = plan.cuts
        if prefill.request_id not in self.watches:
            assert config.rank_variance is not None and config.min_tsp_layer is not None, "the plan has cut_from"
            num_best = num_rows - (plan.num_tokens - len(rating))
            self.watches[prefill.request_id] = RankWatch(config.rank_variance, config.min_tsp_layer, num_best)
        if self.watches[prefill.request_id].has_settled(layer, rating) or layer == last:
            return num_rows
        return plan.num_tokens if layer == plan.cut_from and prefill.start else None
