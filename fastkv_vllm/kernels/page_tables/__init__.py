"""Page tables of a request's sequences, one for each layer and KV head, in place."""

import torch

from fastkv_vllm.kernels.implementations import choose
from fastkv_vllm.kernels.page_tables.reference import page_tables_reference


def page_tables(
    held: torch.Tensor,
    counts: torch.Tensor,
    blocks: torch.Tensor,
    *,
    first: torch.Tensor,
    out: torch.Tensor,
    impl: str | None = None,
) -> None:
    """Write where each layer reads each KV head of a request: its held pages, then those of the blocks written since.

    Block b of the request's own table is page first[l] + b * H + h of layer l. Nothing goes back to the host.

    Args:
        held: ids of the pages held, in order, [L, H, most] int64.
        counts: how many, [L, H] int64, each at most `most`.
        blocks: ids of the blocks since, in order, [B] int32 or int64.
        first: id of each layer's first page, [L] int64.
        out: [L, H, width] int32 or int64, such as a part of a larger buffer, width at least most + B; its first
            most + B columns are written, with 0 behind a sequence's last page.
        impl: see `implementations.choose`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or `impl` does not run here.
    """
    num_layers, num_heads, most = held.shape
    needed = most + len(blocks)
    expected = {
        "held": (held, (num_layers, num_heads, most), {torch.int64}),
        "counts": (counts, (num_layers, num_heads), {torch.int64}),
        "blocks": (blocks, (blocks.numel(),), {torch.int32, torch.int64}),
        "first": (first, (num_layers,), {torch.int64}),
        "out": (out, (num_layers, num_heads, out.shape[-1]), {torch.int32, torch.int64}),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(sorted(map(str, dtypes)))
            raise ValueError(f"{name} must be {list(shape)} {wanted}; got {list(tensor.shape)} {tensor.dtype}")
    if out.shape[2] < needed or out.stride(2) != 1:
        raise ValueError(
            f"out must have {needed} columns or more, side by side; got {out.shape[2]}, strides {out.stride()}"
        )
    if choose(impl, out.device) == "triton":
        from fastkv_vllm.kernels.page_tables.triton import page_tables_triton as implementation
    else:
        implementation = page_tables_reference
    implementation(held, counts, blocks, first, out)
