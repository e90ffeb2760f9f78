"""What stays of one prompt, and how many blocks that takes at each point of its life.

Positions of a prompt of P tokens, m = P // block_size whole blocks:

| interval                       | name    | what happens to its entries                         |
|--------------------------------|---------|-----------------------------------------------------|
| [0, num_sink)                  | sinks   | always stay                                         |
| [num_sink, forced_from)        | rated   | the best of them fill the remaining places          |
| [forced_from, P)               | forced  | window, recent, block tail: stay, always propagate  |
| [m * block_size, P), in forced | tail    | never moved: it lies in the last, partial block     |

Where entries are stored in fewer bytes, the tail begins earlier: the last `residual` tokens lie in it, too. Where what
is generated is encoded, the first block that is not follows whenever it lies before the last `residual` tokens of the
text.

Where entries are evicted while decoding, a choice of the same kind follows whenever a block after the prompt is full:
as many entries as the kept pages hold, out of these and that block, forced ones by order instead of position. Recent
ones are forced as far as the pages have room, the window always.

Where heads stream (`Streaming`), some let go of entries at stops within the prompt: whole pages, between the first
ones and the most recent ones.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from fastkv_vllm.cache.streaming import Streaming


@dataclass(frozen=True)
class PromptPlan:
    """What stays of one prompt; known from the configuration, the prompt's length and where its last image ends.

    Fields:
        num_tokens: tokens of the prompt (P).
        block_size: tokens per block.
        num_pages: whole pages that stay per (layer, KV head), beside the tail.
        cuts: layers after which fewer rows go on, ascending, and how many of them, falling, forced ones included.
        window_size: last tokens that always stay.
        num_voters: last tokens whose queries vote.
        num_sink: first tokens that always stay.
        num_recent: last tokens that always stay, the window among them.
        is_ragged: layers and KV heads share the pages unevenly; num_pages is then the mean, and the most it can be
            where a halting rule or what each layer sees may ask for less, or a guard for more than is planned.
        evicts: a block that is full after the prompt is chosen from together with the kept pages, and goes back.
        cut_from: earliest layer of the only cut, where the worker finds its layer and `cuts` has the latest. None: cuts
            come after the layers they name.
        reads_again: the rows that go on after the only cut are tokens, read again from layer 0 and position 0 on as a
            prompt of their own, whose entries stay.
        streaming: how heads let go of entries while the prompt is read; None: all see all of it.
        residual: last tokens that stay as they are where the others are encoded.
        page_entries: encoded entries that a page has room for; None: entries are stored as they are.
        sink_places: of them, those that a head's sinks take as they are, beyond one for each.
        num_ranks: ranks that hold equally many of the KV heads that share pages unevenly; 1 where heads are even.
        encodes: blocks that leave the residual window after the prompt are encoded, too.
        layer_owners: layer whose entries each layer reads after the prompt; empty: its own.
        pair_entries: records of merged entries that a page has room for, where a layer and its owner are merged; None:
            a layer reads its owner's entries as they are.
        pair_retained: share of the entries that may stay out of that.
        revives: rows left behind at a cut may come back while decoding: they are held until the request ends.
        planned_pages: pages that the budget asks for, where a guard may let up to `num_pages` stay; None: no guard.
    """

    num_tokens: int
    block_size: int
    num_pages: int
    cuts: tuple[tuple[int, int], ...]
    window_size: int
    num_voters: int
    num_sink: int
    num_recent: int
    is_ragged: bool = False
    evicts: bool = False
    cut_from: int | None = None
    reads_again: bool = False
    streaming: Streaming | None = None
    residual: int = 0
    page_entries: int | None = None
    sink_places: int = 0
    num_ranks: int = 1
    encodes: bool = False
    layer_owners: tuple[int, ...] = ()
    pair_entries: int | None = None
    pair_retained: float = 0.0
    revives: bool = False
    planned_pages: int | None = None

    @property
    def has_stash(self) -> bool:
        """Whether rows of the prompt's chunks wait for the last one."""
        return bool(self.cuts) and not self.reads_again

    @property
    def first_cut(self) -> int | None:
        """First layer after which rows may be cut; None: none are."""
        if self.cut_from is not None or not self.cuts:
            return self.cut_from
        return self.cuts[0][0]

    @property
    def num_whole_blocks(self) -> int:
        """Whole blocks before the tail."""
        return (self.num_tokens - self.residual) // self.block_size

    @property
    def num_tail(self) -> int:
        """Tokens of the last, partial block, and of those before it that have some of the residual ones."""
        return self.num_tokens - self.num_whole_blocks * self.block_size

    @property
    def forced_from(self) -> int:
        """First position of the recent tokens or of the tail, whichever comes first."""
        return min(self.num_tokens - self.num_recent, self.num_whole_blocks * self.block_size)

    @property
    def least_pages(self) -> int:
        """Least pages of any (layer, KV head): sinks, recent ones before the tail, and room for a choice.

        There is no tail when a block is evicted: the whole window needs room then.
        """
        window = self.window_size if self.evicts else 0
        forced = self.num_sink + max(self.num_recent - self.num_tail, window)
        return -(-(forced + 1) // self.block_size)

    @property
    def num_later_voters(self) -> int:
        """Last tokens whose queries vote when entries are evicted, of those that vote on the prompt a block at most.

        Their queries are held until then. Only the window may be longer.
        """
        return min(self.num_voters, max(self.window_size, self.block_size))

    @property
    def num_moved(self) -> int:
        """Entries that are moved together into whole pages, mean over layers and KV heads."""
        return self.num_pages * self.block_size

    @property
    def num_kept(self) -> int:
        """Entries that stay, tail included, mean over layers and KV heads."""
        return self.num_moved + self.num_tail

    @property
    def most_pages(self) -> int:
        """Most that `num_pages` can be of one rank's heads: all pages but the least of every other head."""
        others = self.num_ranks - 1
        most = min(self.num_pages + others * (self.num_pages - self.least_pages), self.num_whole_blocks)
        return most if self.streaming is None else min(most, self._num_blocks_streaming(self.num_whole_blocks))

    @property
    def num_stored_blocks(self) -> int:
        """Blocks that hold the moved entries of a rank; the most they can be, where layers and heads share unevenly."""
        if self.layer_owners:
            return -(-sum(self.pages_of_layers(self.most_pages)) // len(self.layer_owners))
        if self.page_entries is None:
            return self.most_pages
        num_places = self.sink_places + self.most_pages * self.block_size + self.num_awaited
        even = -(-num_places // self.page_entries)
        # Each layer and head may begin a page more than its share.
        return min(even + 1, self.num_whole_blocks) if self.is_ragged else even

    def pages_of_layers(self, num_pages: int) -> list[int]:
        """Pages of a head that each layer holds where some have owners, for so many pages of entries, [L]."""
        of_page, held = self.page_entries or self.block_size, []
        for layer, owner in enumerate(self.layer_owners):
            num_entries = num_pages * self.block_size
            if self.pair_entries is None or self.layer_owners.count(owner) == 1:
                held.append(-(-num_entries // of_page) if owner == layer else 0)
            elif owner == layer:
                held.append(-(-num_entries // self.pair_entries))
            else:
                held.append(-(-self.most_retained(num_pages) // of_page))
        return held

    def most_retained(self, num_pages: int) -> int:
        """Entries of a head that may stay out of a pair's records, for so many pages of entries."""
        return ceil(num_pages * self.pair_retained) * self.block_size

    @property
    def num_awaited(self) -> int:
        """Prompt entries in whole blocks of the tail, which other requests may share: room is kept for their codes."""
        return (self.num_tail // self.block_size) * self.block_size if self.encodes else 0

    @property
    def num_freed_blocks(self) -> int:
        """Blocks that return to the pool when the prompt is done, at least."""
        return self.num_whole_blocks - self.num_stored_blocks

    @property
    def num_stash_rows(self) -> int:
        """Residual rows that are held of the prompt: those that reach its first cut, or a set of them for each cut."""
        return self.num_tokens * (len(self.cuts) if self.revives else self.has_stash)

    def rows_after(self, num_layers: int) -> list[int]:
        """Rows that go on after each layer, the last one among them, [num_layers]; the most there may be."""
        cuts, rows = dict(self.cuts), [self.num_tokens]
        for layer in range(num_layers):
            rows.append(cuts.get(layer, rows[-1]))
        return rows[1:]

    @cached_property
    def stops(self) -> Sequence[int]:
        """Tokens read when entries of the prompt are let go, ascending, the whole prompt last."""
        if self.streaming is None:
            return (self.num_tokens,)
        size = self.block_size
        within = range(self.streaming.first_stop * size, self.num_tokens, self.streaming.period * size)
        return (*within, self.num_tokens)

    def stop_after(self, num_tokens: int) -> int:
        """The next stop of a prompt of which so many tokens, and not all, have been read."""
        return self.stops[bisect_right(self.stops, num_tokens)]

    def stop_at(self, num_tokens: int) -> int | None:
        """The stop that so many tokens have reached: a stop within the prompt, or its end, which they may be past."""
        stop = min(num_tokens, self.num_tokens)
        return stop if stop in self.stops else None

    def num_whole_blocks_at(self, stop: int) -> int:
        """Whole blocks of the prompt up to a stop, but for those in the tail."""
        return self.num_whole_blocks if stop == self.num_tokens else stop // self.block_size

    def num_blocks_at(self, stop: int) -> int:
        """Of them, blocks that stay."""
        if stop == self.num_tokens:
            return self.num_stored_blocks
        return self._num_blocks_streaming(stop // self.block_size)

    def _num_blocks_streaming(self, num_blocks: int) -> int:
        """Blocks that hold what the heads of any rank do not let go of, with so many blocks read."""
        assert self.streaming is not None, "only then are there stops within the prompt"
        ranks = (self.streaming.of_rank(rank, self.num_ranks) for rank in range(self.num_ranks))
        return max(streaming.num_blocks(num_blocks) for streaming in ranks)

    def until_next_block(self, num_tokens: int) -> int | None:
        """Tokens until a compressed request gives up a block, evicted or encoded; None: it never does."""
        if not (self.evicts or self.encodes):
            return None
        return self.block_size - (num_tokens - (self.residual if self.encodes else 0)) % self.block_size

    def num_encoded_blocks(self, num_tokens: int) -> int:
        """Whole blocks of a text of so many tokens before its residual window."""
        return (num_tokens - self.residual) // self.block_size

    def num_code_blocks(self, num_tokens: int) -> int:
        """Blocks that hold the codes of such a text once it is compressed, where what is generated is encoded."""
        assert self.page_entries is not None, "the plan has a codec"
        later = (self.num_encoded_blocks(num_tokens) - self.num_whole_blocks) * self.block_size
        return -(-(self.sink_places + self.num_moved + max(later, self.num_awaited)) // self.page_entries)

    def peak_tokens(self, num_tokens: int) -> int:
        """Most tokens' worth of blocks the request holds at once on its way to `num_tokens` tokens."""
        peak, freed = 0, 0
        for stop in self.stops:
            peak = max(peak, min(num_tokens, stop) - freed)
            if num_tokens <= stop:
                return peak
            freed = (self.num_whole_blocks_at(stop) - self.num_blocks_at(stop)) * self.block_size
        later = num_tokens - freed
        if self.evicts:  # a block beside its pages
            later = min(later, (self.num_stored_blocks + 1) * self.block_size)
        if self.encodes:  # a block that is encoded at the end of the step beside its codes
            in_codes = self.num_encoded_blocks(num_tokens) - self.num_code_blocks(num_tokens) - 1
            later = min(later, num_tokens - in_codes * self.block_size)
        return max(peak, later)
