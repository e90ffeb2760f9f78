"""Page tables of sequences that are one (request, KV head) each, in buffers that stay."""

import torch

from fastkv_vllm.kernels.implementations import choose
from fastkv_vllm.kernels.page_tables.reference import page_tables_reference


def page_tables(
    held: torch.Tensor,
    counts: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    num_whole: torch.Tensor,
    seq_lens: torch.Tensor,
    first: torch.Tensor,
    block_size: int,
    out: tuple[torch.Tensor, torch.Tensor],
    impl: str | None = None,
) -> None:
    """Write where each layer reads each (request, KV head), and how many entries.

    Sequence r * H + h of layer l reads its held pages and then those of the blocks written since the prompt's whole
    ones, block b of its own table as page first[l] + b * H + h; its length is
    counts[r, l, h] * block_size + seq_lens[r] - num_whole[r] * block_size.

    A request that holds no pages of its own (counts and num_whole 0) reads all its blocks. Nothing goes back to
    the host.

    Args:
        held: ids of the pages held, in order of request, layer, KV head and place, [sum of counts], int64.
        counts: how many, [R, L, H] int64, each at most num_whole of the request.
        block_tables: the engine's, [R, max_blocks] int32.
        num_whole: whole blocks that the held pages stand for, [R] int64.
        seq_lens: tokens of each request after the step, at least num_whole * block_size, [R] int32.
        first: id of each layer's first page, [L] int64.
        block_size: entries of a page.
        out: tables [L, R * H, width] and lengths [L, R * H], int32, such as parts of larger buffers, width at least
            max_blocks; changed in place. What lies beyond a sequence's last page stays as it is.
        impl: "reference", "triton" or None for that of the device.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or `impl` does not run here.
    """
    num_reqs, num_layers, num_heads = counts.shape
    tables, lengths = out
    expected = {
        "held": (held, (held.numel(),), torch.int64),
        "counts": (counts, (num_reqs, num_layers, num_heads), torch.int64),
        "block_tables": (block_tables, (num_reqs, block_tables.shape[-1]), torch.int32),
        "num_whole": (num_whole, (num_reqs,), torch.int64),
        "seq_lens": (seq_lens, (num_reqs,), torch.int32),
        "first": (first, (num_layers,), torch.int64),
        "tables": (tables, (num_layers, num_reqs * num_heads, tables.shape[-1]), torch.int32),
        "lengths": (lengths, (num_layers, num_reqs * num_heads), torch.int32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {list(shape)} {dtype}; got {list(tensor.shape)} {tensor.dtype}")
    if not block_tables.stride(1) == tables.stride(2) == lengths.stride(1) == 1:
        raise ValueError("block_tables, tables and lengths must have the entries of a row side by side")
    if tables.shape[2] < block_tables.shape[1]:
        raise ValueError(f"tables must be as wide as block_tables, {block_tables.shape[1]}; got {tables.shape[2]}")
    if choose(impl, tables.device) == "triton":
        from fastkv_vllm.kernels.page_tables.triton import page_tables_triton as implementation
    else:
        implementation = page_tables_reference
    implementation(held, counts, block_tables, num_whole, seq_lens, first, block_size, tables, lengths)
