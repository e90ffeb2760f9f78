"""Torch definition of `encoded_attention`: specification, CPU path and oracle."""

from typing import Protocol

import torch


class _Entries(Protocol):
    """See `PagedEntries`."""

    @property
    def pages(self) -> torch.Tensor: ...

    @property
    def tables(self) -> torch.Tensor: ...

    @property
    def lengths(self) -> torch.Tensor: ...


def encoded_attention_reference(
    queries: torch.Tensor, encoded: _Entries, dense: _Entries, num_bits: int, quant_group_size: int, scale: float
) -> torch.Tensor:
    """See `encoded_attention`; arguments are taken as checked."""
    head_dim, out = queries.shape[2], torch.empty_like(queries)
    of_group = 4 + quant_group_size * num_bits // 8
    data = _take(encoded, 2 * (head_dim // quant_group_size) * of_group)
    rows = _take(dense, 2 * head_dim)
    for s, (q, codes, own) in enumerate(zip(queries, data, rows, strict=True)):
        decoded = _decode(codes.unflatten(1, (-1, of_group)), num_bits).flatten(1).to(queries.dtype)
        keys, values = torch.cat([decoded, own]).float().split(head_dim, dim=1)
        out[s] = (q.float() @ keys.T * scale).softmax(dim=1) @ values
    return out


def _decode(groups: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Numbers of groups of bytes, [n, groups, B] -> [n, groups, B'] float32."""
    header = groups[..., :4].clone(memory_format=torch.contiguous_format)
    low, step = header.view(torch.float16).float().split(1, dim=-1)
    codes = [(groups[..., 4:] >> shift) & (2**num_bits - 1) for shift in range(0, 8, num_bits)]
    return torch.stack(codes, dim=-1).flatten(-2).float() * step + low


def _take(entries: _Entries, width: int) -> list[torch.Tensor]:
    """Entries of each sequence, [n, width]."""
    found, per_page = [], entries.pages.shape[1] // width
    for table, length in zip(entries.tables, entries.lengths.tolist(), strict=True):
        pages = entries.pages[table[: -(-length // per_page)].long(), : per_page * width]
        found.append(pages.reshape(-1, width)[:length])
    return found
