"""Moves of kept entries, keys and values, into whole pages of the cache they lie in."""

import torch

from fastkv_vllm.kernels.compact.reference import compact_reference
from fastkv_vllm.kernels.implementations import choose


def compact(
    cache: torch.Tensor, sources: torch.Tensor, pages: torch.Tensor, *, starts: torch.Tensor, impl: str | None = None
) -> None:
    """Fill pages with entries from anywhere in the cache.

    cache[pages[m], :, o] = cache as it was[sources[m, o] // block_size, :, sources[m, o] % block_size]

    All entries are read before the first is written: a page that is filled may hold entries that this call moves, of
    the same sequence or of another. Bytes are moved as they are.

    Args:
        cache: pages of all layers and KV heads, [num_pages, num_parts, block_size, width], any dtype, any strides but
            that of the last dimension, 1; changed in place. One part of width 2 * D where key and value of an entry
            lie side by side, two of width D where the keys of a page lie apart from its values.
        sources: slots the entries come from, page * block_size + offset, [M, block_size] int64; -1: this slot of the
            page stays as it is.
        pages: ids of the pages to fill, [M] int64, each at most once.
        starts: first of the pages of each sequence, that is of each (request, layer, KV head), in `pages`, then M:
            [sequences + 1] int64, ascending from 0. The result does not depend on it, the memory moved does: a sequence
            whose entries ascend and whose pages lie no earlier than they in its own text, such as the last pages of its
            prompt, moves once; a page that another sequence still reads moves twice, through a copy.
        impl: "reference", "triton" or None for that of the device.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or `impl` does not run here.
    """
    if cache.dim() != 4 or cache.stride(3) != 1:
        raise ValueError(
            "cache must be [num_pages, num_parts, block_size, width] with elements of an entry side by side; got "
            f"{list(cache.shape)}, strides {cache.stride()}"
        )
    if sources.dtype != torch.int64 or sources.shape != (len(pages), cache.shape[2]):
        raise ValueError(
            f"sources must be [{len(pages)}, {cache.shape[2]}] int64; got {list(sources.shape)} {sources.dtype}"
        )
    if pages.dtype != torch.int64 or pages.dim() != 1 or starts.dtype != torch.int64 or starts.dim() != 1:
        raise ValueError(
            f"pages and starts must be 1-D int64; got {list(pages.shape)} {pages.dtype}, "
            f"{list(starts.shape)} {starts.dtype}"
        )
    if choose(impl, cache.device) == "triton":
        from fastkv_vllm.kernels.compact.triton import compact_triton

        compact_triton(cache, sources, pages, starts)
    else:
        compact_reference(cache, sources, pages)
