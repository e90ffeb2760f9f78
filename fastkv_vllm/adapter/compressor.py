"""What a worker does with prompts and compressed requests, layer by layer and at the end of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from fastkv_vllm.adapter.batch import DecodeRows, LayerRows, PrefillRows
from fastkv_vllm.adapter.cuts import Cuts
from fastkv_vllm.adapter.encoded import EncodedPages
from fastkv_vllm.adapter.eviction import Evictor
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.moving import Move, Overwrite, carry_out, encoding_move, even_moves, pages_read
from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.adapter.ranks import rank_of
from fastkv_vllm.adapter.rating import agree, is_forced, value_norms
from fastkv_vllm.adapter.revival import RevivablePages
from fastkv_vllm.adapter.step import WorkerStats
from fastkv_vllm.adapter.uneven import UnevenPrompt
from fastkv_vllm.adapter.votes import Votes
from fastkv_vllm.codecs import Codec
from fastkv_vllm.kernels.select import select


class Compressor:
    """Scores and compacts finished prompts, layer by layer, right after the layer's attention; evicts after them.

    Attention of a prompt never depends on this: a layer compacts what its attention has already read. What is held
    between steps belongs to unfinished prompts and to those compressed unevenly; `forget` drops it.

    Pages of uneven budgets cross layers and heads, so they are shared and moved when the whole step has run.

    Each prompt has its own recipe.

    Args:
        kv_caches: of each layer in order, [num_blocks, H, block_size, 2 * D].
        layout: of their pages.

    Fields:
        layout: how a page is laid out inside.
        codecs: by name, with what was measured of this rank's heads.
        pool: all layers' pages.
        evictor: what goes on after a prompt.
        votes: what entries are rated by.
        cuts: rows that go on, or wait to; what may come back moves to `held` when the prompt has ended.
        held: request -> pages of a prompt compressed unevenly or encoded, or of what was read by a stop, until the
            request is gone or preempted.
        kept: request -> columns of each layer that stay before the tail, head after head, of prompts that ended in
            this step and whose entries are evicted while decoding.
        stats: figures of the current step.
        watch: where set, called with a prompt, a layer and the positions that stay of each KV head, ascending.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor], layout: PageLayout, codecs: Mapping[str, Codec]) -> None:
        self.layout = layout
        self.codecs = codecs
        self.pool = PagePool.of(kv_caches, layout)
        self.evictor = Evictor(self.pool)
        self.votes = Votes()
        self.cuts = Cuts()
        self.held: dict[str, Held] = {}
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.stats = WorkerStats()
        self.watch: Callable[[PrefillRows, int, Sequence[torch.Tensor]], None] | None = None
        self._uneven: dict[str, UnevenPrompt] = {}  # prompts that end in this step
        self._moves: list[Move] = []

    def end_step(self) -> None:
        """Drop what is held within a step only."""
        self.cuts.end_step()
        self.kept.clear()
        self._uneven.clear()
        self._moves.clear()

    def forget(self, partial: frozenset[str], compressed: frozenset[str]) -> None:
        """Drop what is held for requests other than those whose prompt goes on and those with compressed pages."""
        self.evictor.forget(compressed)
        self.votes.forget(partial)
        self.cuts.forget(partial)
        self.held = {rid: pages for rid, pages in self.held.items() if rid in compressed}

    def erase(self, compressed: frozenset[str]) -> None:
        """Leave zeros where requests other than those with compressed pages had codes, before others write there."""
        for rid in self.held.keys() - compressed:
            pages = self.held[rid]
            if isinstance(pages, EncodedPages | MergedPages):
                pages.erase(self.pool)
                del self.held[rid]

    def take_stats(self) -> WorkerStats:
        """Figures since the last call."""
        stats, self.stats = self.stats, WorkerStats()
        streams = [pages.streams for pages in self.held.values() if isinstance(pages, RevivablePages)]
        stats.stash_bytes = sum(rows.nbytes for rows in (*self.cuts.stash.values(), *streams))
        return stats

    def after_attention(self, prefills: Sequence[PrefillRows], decodes: Iterable[DecodeRows], rows: LayerRows) -> None:
        """Compact the prompts that end in this step, or where budgets are uneven keep the scores for `finish`; evict.

        All sources are read before the first destination is written: a destination may be a block that an earlier
        request of the same step has just given back.

        Args:
            prefills: requests with an unfinished prompt.
            decodes: compressed requests whose entries are rated in this step.
            rows: of the layer.
        """
        for prefill in prefills:
            plan = prefill.plan
            if not plan.reads_again or (rows.layer == plan.first_cut and prefill.positions is None):
                self._rate(prefill, rows)  # else the prompt is rated in one layer, what is read again nowhere
        for decode in decodes:
            self._evict(decode, rows)
        if not self._uneven and all(prefill.streaming is None for prefill in prefills):
            self._carry_out()

    def _rate(self, prefill: PrefillRows, rows: LayerRows) -> None:
        """Rate a prompt's entries in a layer; where it ends choose what goes on, and with even budgets what stays.

        A layer that has its owner's entries is rated only where rows are cut after it.
        """
        plan, method = prefill.plan, prefill.recipe.method
        owner = plan.layer_owners[rows.layer] if plan.layer_owners else rows.layer
        if owner != rows.layer and rows.layer not in dict(plan.cuts):
            if prefill.destination is not None:
                self._uneven[prefill.request_id].follow(owner)
            return
        with self.stats.timed("score_us"):
            inputs = self.votes.inputs(prefill, rows)
            if prefill.destination is None:
                return
            scores = method.score(**{name: inputs[name] for name in method.needs})
            if prefill.recipe.config.value_norms:
                scores = scores * value_norms(rows.values(prefill))
        with self.stats.timed("select_us"):
            scores = agree(method, scores)
            self.cuts.choose(prefill, rows.layer, scores)
            if plan.reads_again:
                self._show_read_again(prefill)
                return  # what is read again is cached where it stays
            scores = scores.masked_fill(is_forced(plan, prefill.seen), float("inf"))
            scores = scores[:, : scores.shape[1] - plan.num_tail]
        if plan.is_ragged or plan.page_entries is not None:
            with self.stats.timed("score_us"):
                self._uneven.setdefault(prefill.request_id, UnevenPrompt()).add(prefill, rows, inputs, scores)
        else:
            self._compact(prefill, rows.layer, scores)

    def _compact(self, prefill: PrefillRows, layer: int, scores: torch.Tensor) -> None:
        """Choose what stays of a prompt in a layer, as many entries of each head, by its scores before the tail."""
        with self.stats.timed("select_us"):
            kept = select(scores, prefill.plan.num_moved)
        with self.stats.timed("compact_us"):
            kept = kept.expand(self.pool.num_heads, -1)
            self._show(prefill, layer, list(kept))
            if prefill.plan.evicts:
                self.kept.setdefault(prefill.request_id, []).append(kept.flatten())
            self._moves += even_moves(prefill, kept, layer, self.pool)

    def _evict(self, decode: DecodeRows, rows: LayerRows) -> None:
        """Let rows of a compressed request vote, and where its block is full choose among its entries."""
        with self.stats.timed("score_us"):
            scores = self.evictor.rate(decode, rows.layer, rows.scale, rows.query)
        if decode.evicts:
            with self.stats.timed("select_us"):
                stay = self.evictor.choose(decode, rows.layer, scores)
            with self.stats.timed("compact_us"):
                self._moves += self.evictor.collect(decode, rows.layer, stay)

    def encode(self, request_id: str, block: int, stays: bool) -> None:
        """Encode another block of a compressed request when `finish` is called; see `EncodedPages.with_block`."""
        held = self.held[request_id]
        assert isinstance(held, EncodedPages), "only a codec encodes later blocks"
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
            if prefill.request_id in self._uneven:
                self._share(prefill, self._uneven.pop(prefill.request_id))
            if prefill.request_id in self.kept:
                self._hand_over(prefill)
            if prefill.streaming is not None:
                self._let_go(prefill, prefill.streaming)
        self._carry_out()

    def _share(self, prefill: PrefillRows, uneven: UnevenPrompt) -> None:
        """Pages for every layer and head of one prompt, and copies of what goes there."""
        plan, rid = prefill.plan, prefill.request_id
        shared = uneven.share(prefill, self.pool, self.codecs, self.stats)
        for layer, owner in enumerate(plan.layer_owners or range(len(shared.kept))):
            of_heads = shared.kept[owner].split((shared.counts[owner] * plan.block_size).tolist())
            self._show(uneven.prefills[owner], layer, of_heads)
        held = shared.held
        if plan.revives:
            assert isinstance(held, HeadPages), "a codec excludes revival"
            held = RevivablePages.of(held, plan, prefill.recipe, self.cuts.stash.pop(rid), self.cuts.went_on[rid])
        self.held[rid] = held
        if plan.evicts:
            self.kept[rid] = list(shared.kept)
        self._moves += shared.moves

    def _hand_over(self, prefill: PrefillRows) -> None:
        """Let the evictor take over a prompt that was compressed in this step."""
        plan, rid, kept = prefill.plan, prefill.request_id, self.kept[prefill.request_id]
        held = self.held.get(rid)
        if held is None:
            assert prefill.destination is not None, "the prompt ends"
            counts = torch.full((len(kept), self.pool.num_heads), plan.num_pages)
            held = HeadPages.share(plan.num_whole_blocks, counts, self.pool, prefill.destination)
        assert isinstance(held, HeadPages), "a codec excludes eviction"
        self.evictor.begin(prefill, held, kept, *self.votes.of_layers(rid, len(kept), prefill.recipe.method.needs))

    def _let_go(self, prefill: PrefillRows, destination: Sequence[int]) -> None:
        """Heads keep their first and most recent pages of a prompt that came to a stop, which move to `destination`."""
        pool, streaming = self.pool, prefill.plan.streaming
        assert streaming is not None, "only then are there stops within a prompt"
        with self.stats.timed("compact_us"):
            num_whole = (prefill.start + prefill.count) // prefill.plan.block_size
            ours = streaming.of_rank(rank_of(prefill.plan), prefill.plan.num_ranks)
            pages = pages_read(prefill, pool, num_whole)
            self.held[prefill.request_id], old, new = pages.let_go(ours, pool, destination)
            self._moves.append(Overwrite(pool.cache, (new,), pool.cache[old]))

    def _carry_out(self) -> None:
        with self.stats.timed("compact_us"):
            carry_out(self._moves, self.pool)
        self._moves.clear()

    def _show(self, prefill: PrefillRows, layer: int, kept: Sequence[torch.Tensor]) -> None:
        """Tell who watches which entries of a layer stay: the columns chosen of each head, and the tail."""
        if self.watch is not None:
            positions = prefill.seen
            tail = positions[len(positions) - prefill.plan.num_tail :]
            self.watch(prefill, layer, [torch.cat([positions[columns], tail]) for columns in kept])

    def _show_read_again(self, prefill: PrefillRows) -> None:
        """The same of a prompt whose chosen tokens are read again: they are all that stays, in all layers."""
        if self.watch is not None:
            for layer in range(len(self.pool.first)):
                self.watch(prefill, layer, [self.cuts.selected[prefill.request_id]] * self.pool.num_heads)
