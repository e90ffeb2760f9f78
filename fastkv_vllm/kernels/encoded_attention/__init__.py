"""Attention of one query to entries that lie encoded in pages, read without decoding them anywhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastkv_vllm.kernels.encoded_attention.forms import Form, Kind, Vectors
from fastkv_vllm.kernels.encoded_attention.reference import encoded_attention_reference
from fastkv_vllm.kernels.implementations import choose

__all__ = ["Form", "Kind", "PagedEntries", "Vectors", "encoded_attention", "takes"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes of an element -> channels of a vector, groups and their number rounded up to powers of two: room of a program.
MOST_CHANNELS = {2: 256, 4: 128}


@dataclass(frozen=True)
class PagedEntries:
    """Entries of sequences in pages, all stored in one form.

    Record i of sequence s lies in page tables[s, i // n] at place i % n, n being the records of a page.

    Fields:
        pages: [num_pages, bytes] uint8; rows may lie apart, what is in them may not.
        tables: [S, columns] int32; what lies beyond a sequence's last page is not looked at.
        lengths: entries of each sequence, [S] int32, `first` included.
        form: where bytes lie.
        decode: records [n, num_bytes] uint8 -> keys [n * group_size, Dk] and values [n * group_size, Dv] float32: what
            `form` says, in torch.
        first: entries of each sequence that are not read, at its beginning.
        key_channels, value_channels: channel that each stored number is of, [S, Dk] and [S, Dv] int64; None: all
            channels are stored, in order. Those not stored are 0.
    """

    pages: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    form: Form
    decode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    first: int = 0
    key_channels: torch.Tensor | None = None
    value_channels: torch.Tensor | None = None


def takes(form: Form, dtype: torch.dtype) -> bool:
    """Whether there is room for vectors of such entries, once decoded to this dtype."""
    return max(_padded(form.keys), _padded(form.values)) <= MOST_CHANNELS[dtype.itemsize]


def _padded(vectors: Vectors) -> int:
    num_groups, width = 1, vectors.size
    if vectors.kind == Kind.BY_TOKEN:
        num_groups, width = vectors.size // vectors.channels, vectors.channels
    return 1 << (num_groups - 1).bit_length() << (width - 1).bit_length()


def encoded_attention(
    queries: torch.Tensor, parts: Sequence[PagedEntries], *, scale: float, impl: str | None = None
) -> torch.Tensor:
    """Softmax attention of a token's query heads to entries that are stored in several ways.

    out[s, g] = softmax(scale * queries[s, g] . keys[s]) values[s], over the entries of all parts, decoded and rounded
    to the queries' dtype. Sums run in float32.

    Args:
        queries: of the query heads of each (request, KV head), a sequence, [S, G, D], float32, float16 or bfloat16.
        parts: entries of the sequences; each sequence has one at least in any of them.
        scale: of the logits.
        impl: see `implementations.choose`.

    Returns:
        [S, G, D], the queries' dtype.

    Raises:
        ValueError: shapes, dtypes or implementation do not fit.

    Source: split keys merged by log-sum-exp as Flash-Decoding has it.
    """
    if queries.dim() != 3 or queries.dtype not in DTYPES:
        raise ValueError(
            f"queries must be [S, G, D], float32, float16 or bfloat16; got {list(queries.shape)} {queries.dtype}"
        )
    for number, part in enumerate(parts):
        _check(f"part {number}", part, queries)
    if choose(impl, queries.device) == "reference":
        return encoded_attention_reference(queries, parts, scale)
    from fastkv_vllm.kernels.encoded_attention.triton import encoded_attention_triton

    return encoded_attention_triton(queries, parts, scale)


def _check(name: str, part: PagedEntries, queries: torch.Tensor) -> None:
    pages, tables, lengths, form = part.pages, part.tables, part.lengths, part.form
    num_sequences, _, head_dim = queries.shape
    if pages.dim() != 2 or pages.dtype != torch.uint8 or pages.shape[1] < form.num_bytes or pages.stride(1) != 1:
        raise ValueError(
            f"{name}: pages must be [num_pages, {form.num_bytes} or more] uint8, side by side; got "
            f"{list(pages.shape)} {pages.dtype}, strides {pages.stride()}"
        )
    if tables.dim() != 2 or len(tables) != num_sequences or tables.dtype != torch.int32:
        raise ValueError(
            f"{name}: tables must be [{num_sequences}, columns] int32; got {list(tables.shape)} {tables.dtype}"
        )
    if lengths.shape != (num_sequences,) or lengths.dtype != torch.int32:
        raise ValueError(f"{name}: lengths must be [{num_sequences}] int32; got {list(lengths.shape)} {lengths.dtype}")
    if part.first % form.group_size:
        raise ValueError(f"{name}: first must be a multiple of the record's {form.group_size}; got {part.first}")
    for what, vectors, channels in (
        ("key_channels", form.keys, part.key_channels),
        ("value_channels", form.values, part.value_channels),
    ):
        if channels is None:
            if vectors.size != head_dim:
                raise ValueError(f"{name}: {what} must be given where {vectors.size} of {head_dim} are stored")
        elif channels.shape != (num_sequences, vectors.size) or channels.dtype != torch.int64:
            raise ValueError(
                f"{name}: {what} must be [{num_sequences}, {vectors.size}] int64; got {list(channels.shape)} "
                f"{channels.dtype}"
            )
    if not takes(form, queries.dtype):
        raise ValueError(
            f"{name}: vectors must have at most {MOST_CHANNELS[queries.dtype.itemsize]} channels of {queries.dtype}, "
            f"groups and their number padded to powers of two; got {form.keys} and {form.values}"
        )
