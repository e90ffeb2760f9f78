"""Which pages may be written while others are still read."""

import torch


def must_wait(sources: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Pages that cannot be filled before all sources are read, [M] bool; arguments as for `compact`.

    Sequences are moved side by side, in any order, each from its last page to its first, and of each page all sources
    are read before it is written. Page m may then be written at once if whatever reads it as a source belongs to pages
    m and later of its own sequence: they have been read by then.

    No page of a sequence waits if its K = n * block_size sources ascend strictly and it fills its own last n whole
    pages, holding the N places before position N: the j-th source has K - 1 - j others behind it, so it lies at
    N - K + j or before, which is the place it moves to. Hence a place is read only for itself or places behind it.

    The work is in proportion to what is moved, not to the cache, and nothing goes back to the host.
    """
    num_pages, block_size = sources.shape
    order = torch.arange(num_pages, device=pages.device)
    filled, by_id = pages.sort()
    read = torch.where(sources >= 0, sources // block_size, -1)
    at = torch.searchsorted(filled, read).clamp(max=num_pages - 1)
    owner = torch.where(filled[at] == read, by_id[at], num_pages).flatten()  # page m that this source lies in, if any
    reader = order.unsqueeze(1).expand(-1, block_size).flatten()
    first = torch.full((num_pages + 1,), num_pages, device=pages.device)
    first = first.scatter_reduce(0, owner, reader, "amin")[:num_pages]
    last = torch.full((num_pages + 1,), -1, device=pages.device)
    last = last.scatter_reduce(0, owner, reader, "amax")[:num_pages]
    end = starts[torch.searchsorted(starts, order, right=True)]  # of the sequence of page m
    return (first < order) | (last >= end)
