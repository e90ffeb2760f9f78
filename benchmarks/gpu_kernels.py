"""Kernels on inputs of a real size, for `benchmarks.gpu`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from benchmarks.roofline import MODELS
from fastkv_vllm.codecs import CODECS, Codec, EntryShape
from fastkv_vllm.codecs.affine import CHANNELS
from fastkv_vllm.kernels import csrc
from fastkv_vllm.kernels.column_sums import age_weights, column_sums
from fastkv_vllm.kernels.compact import compact
from fastkv_vllm.kernels.encoded_attention import PagedEntries, encoded_attention
from fastkv_vllm.kernels.merge_layers import LayerPair, measure_layers, restore_layers
from fastkv_vllm.kernels.page_tables import page_tables
from fastkv_vllm.kernels.propagate import gather_stream
from fastkv_vllm.kernels.quantise import dequantise, quantise
from fastkv_vllm.kernels.select import select
from fastkv_vllm.kernels.window_scores import paged_window_scores

MODEL = "llama-3.1-8b"
BLOCK_SIZE = 16


@dataclass(frozen=True)
class KernelCase:
    """A kernel with inputs of a real size.

    Fields:
        op: folder of `fastkv_vllm/kernels/`.
        shape: of the inputs, for the table.
        run: one call.
        num_bytes: what any way of doing it must read and write.
        rival: what torch has for it; None: nothing alike.
    """

    op: str
    shape: str
    run: Callable[[], object]
    num_bytes: int
    rival: Callable[[], object] | None = None


def kernel_cases(device: torch.device, num_tokens: int) -> list[KernelCase]:
    """Kernels on a layer of the model with a prompt of so many tokens, a multiple of 160."""
    shape = MODELS[MODEL]
    heads, group, dim = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim
    made = {"device": device, "dtype": torch.bfloat16}
    num_blocks, num_kept, rows = num_tokens // BLOCK_SIZE, num_tokens // 10, shape.num_layers * heads
    pages = torch.randn(num_blocks * heads, BLOCK_SIZE, 2 * dim, **made)
    tables = (torch.arange(num_blocks, device=device) * heads + torch.arange(heads, device=device).unsqueeze(1)).int()
    window, queries = torch.randn(1, 32, heads * group, dim, **made), torch.randn(512, heads * group, dim, **made)
    keys = pages.view(num_blocks, heads, BLOCK_SIZE, 2 * dim)[..., :dim].transpose(0, 1).flatten(1, 2)
    scores = torch.randn(rows, num_tokens, device=device)
    hidden, residual = torch.randn(2, num_tokens, shape.hidden_size, **made)
    chosen = torch.randperm(num_tokens, device=device)[: num_tokens // 5].sort().values
    read_keys, text = heads * num_tokens * dim * 2, f"{num_tokens} tokens"
    num_keys = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    weights = age_weights(len(queries), 1.0, device)
    rate = partial(
        paged_window_scores,
        window,
        pages,
        tables.unsqueeze(0),
        num_keys,
        max_num_keys=num_tokens,
        kernel_size=7,
        pooling="max",
    )
    return [
        KernelCase("window_scores", f"32 queries, {heads} heads, {text}", rate, read_keys),
        *_xformers_cases(window, keys, rate, read_keys),
        KernelCase(
            "column_sums",
            f"{len(queries)} queries, {heads} heads, {text}",
            lambda: column_sums(queries, keys, start=num_tokens - len(queries), weights=weights),
            read_keys,
        ),
        KernelCase(
            "select",
            f"{num_kept} of {num_tokens}, {rows} rows",
            lambda: select(scores, num_kept),
            rows * (num_tokens * 4 + num_kept * 8),
            lambda: scores.topk(num_kept).indices.sort().values,
        ),
        *_cuda_cases(scores, num_kept),
        _compact_case(pages, heads, num_tokens, num_kept),
        _page_tables_case(device, shape.num_layers, heads, num_blocks),
        KernelCase(
            "propagate",
            f"{len(chosen)} of {num_tokens} rows of {shape.hidden_size}",
            lambda: gather_stream(hidden[:0], hidden, residual, chosen),
            3 * len(chosen) * shape.hidden_size * 2,
            lambda: (hidden + residual)[chosen],
        ),
        *_merge_cases(pages, heads),
        *_quantise_cases(keys),
        *(_encoded_attention_case(keys, group, codec) for codec in ("int4", "fp8", "kivi4", "int4x2", "skvq")),
    ]


def _xformers_cases(
    window: torch.Tensor, keys: torch.Tensor, rate: Callable[..., torch.Tensor], num_bytes: int
) -> list[KernelCase]:
    """The same scores where xformers' attention gives the log-sum-exp, out of keys that are gathered already."""
    if not _has_xformers():
        return []
    fmha = import_module("xformers.ops.fmha")
    heads, num_tokens, dim = keys.shape
    queries = window.unflatten(2, (heads, -1))  # groups of query heads, as xformers has them
    entries = keys.transpose(0, 1)[None, :, :, None].expand(1, num_tokens, *queries.shape[2:4], dim)
    unseen = fmha.attn_bias.LowerTriangularFromBottomRightMask()

    def by_xformers() -> torch.Tensor:
        _, lse = fmha.memory_efficient_attention_forward_requires_grad(
            queries, entries, entries, attn_bias=unseen, scale=1.0
        )
        return rate(lse=lse[..., : queries.shape[1]].permute(0, 3, 1, 2).flatten(2).float().contiguous())

    shape = f"{queries.shape[1]} queries, {heads} heads, {num_tokens} tokens, log-sum-exp by xformers"
    return [KernelCase("window_scores", shape, by_xformers, num_bytes)]


def _cuda_cases(scores: torch.Tensor, num_kept: int) -> list[KernelCase]:
    """The CUDA library's select."""
    if not csrc.LIBRARY.exists():
        return []
    rows, num_tokens = scores.shape
    return [
        KernelCase(
            "select",
            f"{num_kept} of {num_tokens}, {rows} rows, CUDA library",
            lambda: select(scores, num_kept, impl="cuda"),
            rows * (num_tokens * 4 + num_kept * 8),
        )
    ]


def _merge_cases(pages: torch.Tensor, heads: int) -> list[KernelCase]:
    """Half of the pages as a layer's, the other half as the next layer's: measured, and both layers written again."""
    num_pages, size, width = pages.shape
    cache = pages.view(num_pages, size, 2, width // 2).transpose(1, 2)
    lower, upper = torch.arange(num_pages, dtype=torch.int32, device=pages.device).view(2, heads, -1)
    lengths = torch.full((heads,), lower.shape[1] * size, dtype=torch.int32, device=pages.device)
    pair = LayerPair(cache, lower, upper, lengths)
    magnitudes, retained = measure_layers(pair).magnitudes, pair.is_held & False
    shape = f"{heads} heads, {pair.num_entries} entries of two layers"
    num_bytes = pages.numel() * pages.element_size()
    found = []
    for name, impl in {"": None, ", CUDA library": "cuda"}.items():
        if impl is None or csrc.LIBRARY.exists():
            measure = partial(measure_layers, pair, impl=impl)
            restore = partial(
                restore_layers, pair, lower, upper[:, :0], magnitudes=magnitudes, retained=retained, impl=impl
            )
            found += [
                KernelCase("merge_layers", f"{shape}, measured{name}", measure, num_bytes + magnitudes.numel() * 8),
                KernelCase("merge_layers", f"{shape}, restored{name}", restore, num_bytes * 3 // 2),
            ]
    return found


def _compact_case(pages: torch.Tensor, heads: int, num_tokens: int, num_kept: int) -> KernelCase:
    """Chosen entries of each head to the last pages of its prompt."""
    device, size = pages.device, BLOCK_SIZE
    num_pages = num_kept // size
    kept = torch.stack(
        [torch.randperm(num_tokens, device=device)[: num_pages * size].sort().values for _ in range(heads)]
    )
    head = torch.arange(heads, device=device).unsqueeze(1)
    sources = ((kept // size * heads + head) * size + kept % size).view(heads * num_pages, size)
    last = torch.arange(num_tokens // size - num_pages, num_tokens // size, device=device)
    destinations = (last * heads + head).flatten()
    starts = torch.arange(heads + 1, device=device) * num_pages
    cache = pages.unsqueeze(1)
    flat = pages.view(-1, pages.shape[-1])

    def by_torch() -> None:
        pages[destinations] = flat[sources]

    return KernelCase(
        "compact",
        f"{num_pages * size} of {num_tokens} entries, {heads} heads",
        lambda: compact(cache, sources, destinations, starts=starts),
        2 * sources.numel() * pages.shape[-1] * pages.element_size(),
        by_torch,
    )


def _quantise_cases(keys: torch.Tensor) -> list[KernelCase]:
    """The keys of a layer as codec int4 stores them, and back."""
    groups = keys.flatten(0, 1).unflatten(1, (-1, CHANNELS))
    data = quantise(groups, 4)
    shape = f"{keys.shape[0]} heads, {keys.shape[1]} tokens"
    return [
        KernelCase(
            "quantise",
            f"{shape}, to 4 bits",
            lambda: quantise(groups, 4),
            groups.numel() * groups.element_size() + data.numel(),
            lambda: quantise(groups, 4, impl="reference"),
        ),
        KernelCase(
            "quantise",
            f"{shape}, back",
            lambda: dequantise(data, 4),
            data.numel() + groups.numel() * 4,
            lambda: dequantise(data, 4, impl="reference"),
        ),
    ]


def _encoded_attention_case(keys: torch.Tensor, group: int, name: str) -> KernelCase:
    """A decode step of 8 requests that hold entries of a codec, a tenth of a prompt, and 64 as they are."""
    num_reqs, num_dense, codec, exact = 8, 64, CODECS[name], CODECS["exact"]
    heads, num_tokens, dim = keys.shape
    num_kept, num_sequences = num_tokens // 10 // codec.group_size * codec.group_size, num_reqs * heads
    vectors, entry = keys[:, :num_kept].flatten(0, 1), EntryShape(dim, keys.dtype)
    data = codec.encode(vectors, vectors).unflatten(0, (heads, -1))
    encoded = data.flatten(1).repeat(num_reqs, 1)
    dense = keys.new_ones(num_sequences, num_dense * 2 * dim).view(torch.uint8)
    tables = torch.arange(num_sequences, dtype=torch.int32, device=keys.device).unsqueeze(1)

    def part(pages: torch.Tensor, length: int, of: Codec) -> PagedEntries:
        lengths = torch.full_like(tables[:, 0], length)
        return PagedEntries(pages, tables, lengths, of.form(entry), partial(of.decode, entry=entry))

    parts = [part(encoded, num_kept, codec), part(dense, num_dense, exact)]
    queries = keys.new_ones(num_sequences, group, dim)
    return KernelCase(
        "encoded_attention",
        f"{num_reqs} requests, {heads} heads, {num_kept} {name} entries and {num_dense} as they are",
        lambda: encoded_attention(queries, parts, scale=dim**-0.5),
        encoded.numel() + dense.numel(),
    )


def _page_tables_case(device: torch.device, num_layers: int, heads: int, num_blocks: int) -> KernelCase:
    """A request that holds a tenth of its prompt's pages begins another block."""
    num_held, num_since = num_blocks // 10, 8
    whole = {"dtype": torch.int64, "device": device}
    held = torch.randint(num_blocks, (num_layers, heads, num_held), **whole)
    counts = torch.full((num_layers, heads), num_held, **whole)
    blocks = torch.randint(num_blocks, (num_since,), dtype=torch.int32, device=device)
    first = torch.arange(num_layers, **whole) * num_blocks * heads
    out = torch.zeros(num_layers, heads, num_held + num_since, dtype=torch.int32, device=device)
    return KernelCase(
        "page_tables",
        f"{num_layers} layers, {heads} heads, {num_held} pages each",
        lambda: page_tables(held, counts, blocks, first=first, out=out),
        held.numel() * 12,
    )


def left_out() -> list[str]:
    """What `kernel_cases` has rows of only where it is installed, and is not."""
    found = {"the CUDA library (make csrc)": csrc.LIBRARY.exists(), "xformers": _has_xformers()}
    return [name for name, is_there in found.items() if not is_there]


def _has_xformers() -> bool:
    return find_spec("xformers") is not None
