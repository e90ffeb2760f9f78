"""Torch definition of `page_tables`: specification, CPU path and oracle."""

import torch


def page_tables_reference(
    held: torch.Tensor,
    counts: torch.Tensor,
    block_tables: torch.Tensor,
    num_whole: torch.Tensor,
    seq_lens: torch.Tensor,
    first: torch.Tensor,
    block_size: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """See `page_tables`; arguments are taken as checked."""
    _, num_layers, num_heads = counts.shape
    heads = torch.arange(num_heads, device=counts.device)
    parts = held.split(counts.flatten().tolist())
    for request, (whole, length) in enumerate(zip(num_whole.tolist(), seq_lens.tolist(), strict=True)):
        later = block_tables[request, whole : -(-length // block_size)].to(torch.int64)
        appended = first[:, None, None] + later * num_heads + heads[:, None]  # [L, H, blocks]
        for layer in range(num_layers):
            for head in range(num_heads):
                pages = torch.cat([parts[(request * num_layers + layer) * num_heads + head], appended[layer, head]])
                tables[layer, request * num_heads + head, : len(pages)] = pages.to(torch.int32)
    entries = counts * block_size + (seq_lens - num_whole * block_size)[:, None, None]  # [R, L, H]
    lengths.copy_(entries.transpose(0, 1).flatten(1))
