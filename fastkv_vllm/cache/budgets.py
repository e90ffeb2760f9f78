"""From wished budgets to whole pages, none lost and none made up."""

from collections.abc import Sequence


def share_pages(wanted: Sequence[float], total: int, *, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Share `total` pages: beyond the least each must have, each next page goes to whom most is missing.

    Where the wishes add up to `total` and lie within the bounds this is rounding by the largest remainder.

    Args:
        wanted: wished pages, any real numbers.
        total: pages to share; sum(low) <= total <= sum(high).
        low, high: least and most pages of each.

    Returns:
        Pages of each, ties to the first; they add up to `total`.

    Raises:
        ValueError: the bounds leave no room for the total.
    """
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"total must be in {sum(low)}..{sum(high)}, the sums of the bounds; got {total}")
    # Start near the end: floor, then a page at a time in the same order as if started from `low`.
    pages = [min(max(int(w), a), b) for w, a, b in zip(wanted, low, high, strict=True)]
    owners = range(len(pages))
    for _ in range(total - sum(pages)):
        lacking = max((i for i in owners if pages[i] < high[i]), key=lambda i: (wanted[i] - pages[i], -i))
        pages[lacking] += 1
    for _ in range(sum(pages) - total):
        last = min((i for i in owners if pages[i] > low[i]), key=lambda i: (wanted[i] - (pages[i] - 1), -i))
        pages[last] -= 1
    return pages
