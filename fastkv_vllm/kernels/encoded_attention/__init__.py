"""Attention of one query to entries that lie encoded in pages, read without decoding them anywhere else."""

from dataclasses import dataclass

import torch

from fastkv_vllm.kernels.encoded_attention.reference import encoded_attention_reference
from fastkv_vllm.kernels.implementations import choose

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes of an element -> channels of a vector, groups and their number rounded up to powers of two: room of a program.
MOST_CHANNELS = {2: 256, 4: 128}


@dataclass(frozen=True)
class PagedEntries:
    """Entries of sequences in pages, any number of them to a page.

    Entry i of sequence s lies in page tables[s, i // n] at place i % n, n being the entries of a page.

    Fields:
        pages: [num_pages, width]; rows may lie apart, what is in them may not.
        tables: [S, columns] int32; what lies beyond a sequence's last page is not looked at.
        lengths: entries of each sequence, [S] int32, at most columns * n.
    """

    pages: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


def takes(head_dim: int, quant_group_size: int, dtype: torch.dtype) -> bool:
    """Whether there is room for vectors of so many channels in groups of so many, once decoded to this dtype."""
    num_groups = head_dim // quant_group_size
    padded = 1 << (num_groups - 1).bit_length() << (quant_group_size - 1).bit_length()
    return padded <= MOST_CHANNELS[dtype.itemsize]


def encoded_attention(
    queries: torch.Tensor,
    encoded: PagedEntries,
    dense: PagedEntries,
    *,
    num_bits: int,
    quant_group_size: int,
    scale: float,
    impl: str | None = None,
) -> torch.Tensor:
    """Softmax attention of a token's query heads to entries that are encoded and entries that are not.

    out[s, g] = softmax(scale * queries[s, g] . keys[s]) values[s], over the encoded entries, decoded and rounded to the
    queries' dtype, and the dense ones. Sums run in float32.

    Args:
        queries: of the query heads of each (request, KV head), a sequence, [S, G, D], float32, float16 or bfloat16.
        encoded: entries of a key and a value, each as the groups that `quantise` gives, side by side;
            pages [num_pages, bytes] uint8, as many entries to a page as fit.
        dense: entries of a key and a value, each [D]; pages [num_pages, entries * 2 * D] of the queries' dtype. Each
            sequence has an entry at least, encoded or dense.
        num_bits: of a code: 2, 4 or 8.
        quant_group_size: numbers of a group, a divisor of D.
        scale: of the logits.
        impl: see `implementations.choose`.

    Returns:
        [S, G, D], the queries' dtype.

    Raises:
        ValueError: shapes, dtypes or implementation do not fit.

    Source: split keys merged by log-sum-exp as Flash-Decoding has it; codes of KIVI, arXiv 2402.02750, by token.
    """
    if queries.dim() != 3 or queries.dtype not in DTYPES:
        raise ValueError(
            f"queries must be [S, G, D], float32, float16 or bfloat16; got {list(queries.shape)} {queries.dtype}"
        )
    num_sequences, _, head_dim = queries.shape
    if num_bits not in (2, 4, 8):
        raise ValueError(f"codes must have 2, 4 or 8 bits; got {num_bits}")
    if quant_group_size < 1 or head_dim % quant_group_size or quant_group_size * num_bits % 8:
        raise ValueError(
            f"quant_group_size must divide {head_dim} and {num_bits} bits of each must fill bytes; got "
            f"{quant_group_size}"
        )
    if not takes(head_dim, quant_group_size, queries.dtype):
        most = MOST_CHANNELS[queries.dtype.itemsize]
        raise ValueError(
            f"vectors must have at most {most} channels of {queries.dtype}, groups and their number padded to powers "
            f"of two; got {head_dim} in groups of {quant_group_size}"
        )
    entry = 2 * (head_dim // quant_group_size) * (4 + quant_group_size * num_bits // 8)
    _check("encoded", encoded, torch.uint8, entry, num_sequences)
    _check("dense", dense, queries.dtype, 2 * head_dim, num_sequences)
    if choose(impl, queries.device) == "reference":
        return encoded_attention_reference(queries, encoded, dense, num_bits, quant_group_size, scale)
    from fastkv_vllm.kernels.encoded_attention.triton import encoded_attention_triton

    return encoded_attention_triton(queries, encoded, dense, num_bits, quant_group_size, scale)


def _check(name: str, entries: PagedEntries, dtype: torch.dtype, width: int, num_sequences: int) -> None:
    pages, tables, lengths = entries.pages, entries.tables, entries.lengths
    if pages.dim() != 2 or pages.dtype != dtype or pages.shape[1] < width or pages.stride(1) != 1:
        raise ValueError(
            f"{name} pages must be [num_pages, {width} or more] {dtype}, side by side; got {list(pages.shape)} "
            f"{pages.dtype}, strides {pages.stride()}"
        )
    if tables.dim() != 2 or len(tables) != num_sequences or tables.dtype != torch.int32:
        raise ValueError(
            f"{name} tables must be [{num_sequences}, columns] int32; got {list(tables.shape)} {tables.dtype}"
        )
    if lengths.shape != (num_sequences,) or lengths.dtype != torch.int32:
        raise ValueError(f"{name} lengths must be [{num_sequences}] int32; got {list(lengths.shape)} {lengths.dtype}")
