"""Torch definition of `encoded_attention`: specification, CPU path and oracle."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastkv_vllm.kernels.encoded_attention import PagedEntries


def encoded_attention_reference(queries: torch.Tensor, parts: Sequence["PagedEntries"], scale: float) -> torch.Tensor:
    """See `encoded_attention`; arguments are taken as checked."""
    out = torch.empty_like(queries)
    for s, q in enumerate(queries):
        read = [_entries(part, s, queries) for part in parts]
        keys, values = (torch.cat(each).float() for each in zip(*read, strict=True))
        out[s] = (q.float() @ keys.T * scale).softmax(dim=1) @ values
    return out


def _entries(part: "PagedEntries", s: int, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence with all channels, [n, D] each, the queries' dtype."""
    form, length = part.form, int(part.lengths[s])
    if length <= part.first:
        nothing = queries.new_empty(0, queries.shape[2])
        return nothing, nothing
    per_page = part.pages.shape[1] // form.num_bytes
    num_records = -(-length // form.group_size)
    pages = part.pages[part.tables[s, : -(-num_records // per_page)].long(), : per_page * form.num_bytes]
    records = pages.reshape(-1, form.num_bytes)[part.first // form.group_size : num_records]
    read = []
    of_parts = part.key_channels, part.value_channels
    for vectors, channels in zip(part.decode(records), of_parts, strict=True):
        rounded = vectors[: length - part.first].to(queries.dtype)
        if channels is not None:
            whole = rounded.new_zeros(len(rounded), queries.shape[2])
            rounded = whole.scatter_(1, channels[s].expand(len(rounded), -1), rounded)
        read.append(rounded)
    if form.skips_retained:
        at = form.values.magnitude
        magnitudes = records[:, at : at + queries.element_size()].clone(memory_format=torch.contiguous_format)
        there = magnitudes.view(queries.dtype).flatten() >= 0
        read = [vectors[there] for vectors in read]
    return read[0], read[1]
