"""Pages that some heads let go of while a prompt is read."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Streaming:
    """How heads let go of entries while a prompt is read: those that keep less than all of it.

    Whenever `period` more blocks have been read, a head that holds more than its pages keeps its first ones and its
    most recent ones of them. Where that is does not depend on how the prompt is cut into chunks.

    Fields:
        period: blocks between stops.
        num_sink_pages: first pages of a head that it never lets go of.
        pages: that each layer and KV head may hold after a stop, more than num_sink_pages, [L][H].
    """

    period: int
    num_sink_pages: int
    pages: tuple[tuple[int, ...], ...]

    def of_rank(self, rank: int, num_ranks: int) -> "Streaming":
        """The same for the KV heads of one of so many ranks, which hold them in order, equally many each."""
        width = len(self.pages[0]) // num_ranks
        return replace(self, pages=tuple(layer[rank * width : (rank + 1) * width] for layer in self.pages))

    @property
    def first_stop(self) -> int:
        """Blocks read at the first stop where a head lets go of something."""
        return (min(map(min, self.pages)) // self.period + 1) * self.period

    def counts(self, num_blocks: int) -> list[list[int]]:
        """Pages of each layer and KV head after a stop with so many blocks read, [L][H]."""
        return [[min(pages, num_blocks) for pages in layer] for layer in self.pages]

    def num_blocks(self, num_blocks: int) -> int:
        """Blocks that hold these pages."""
        counts = self.counts(num_blocks)
        return -(-sum(map(sum, counts)) // sum(map(len, counts)))
