"""Steps of a small decoder without vLLM's engine: a prompt in chunks beside a request that is left alone, then tokens.

Compressor, batch views, reads head by head and cuts are the engine's own; attention is plain torch or what is given.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from fastkv_vllm.adapter import codes, detour, ranks, rating, tsp, uneven
from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionMetadataBuilder
from fastkv_vllm.adapter.batch import Batch, DecodeRows, PrefillRows
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.device import made_on
from fastkv_vllm.adapter.eviction import Evictor
from fastkv_vllm.adapter.pages import RowLayout
from fastkv_vllm.adapter.ragged import HeadPages
from fastkv_vllm.adapter.recipe import recipe_of
from fastkv_vllm.adapter.revival import RevivablePages, RevivalStep
from fastkv_vllm.adapter.tsp import TSPStep, segments_of
from fastkv_vllm.codecs import CODECS, ChannelGroups, Codec, EntryShape, SkvqCodec
from fastkv_vllm.config import CompressionConfig
from tests.named_gpu import OnGPU

NUM_LAYERS, NUM_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE = 4, 2, 2, 32, 16
HIDDEN = NUM_HEADS * GROUP * HEAD_DIM
PROMPT, CHUNK, OTHER = 157, 80, 20  # tokens: the prompt, its first chunk, the other request's
SMALL = {"min_tokens": 64, "retention_ratio": 0.4, "window_size": 8}
METHODS = {
    "snapkv": ("snapkv", SMALL),
    "streamingllm": ("streamingllm", SMALL),
    "h2o": ("h2o", SMALL),
    "adakv": ("adakv", SMALL),
    "pyramidkv": ("pyramidkv", SMALL),
    "vl_cache": ("vl_cache", SMALL),
    "dbudgetkv": ("dbudgetkv", SMALL | {"retention_ratio": 0.6}),
    "guarded": ("snapkv", SMALL | {"min_attention_recall": 0.6}),
    "vatp": ("vatp", SMALL),
    "fastkv": ("fastkv", SMALL | {"tsp_layer": 1, "tsp_ratio": 0.5}),
    "fastkv-adaptive": ("fastkv", SMALL | {"tsp_layer": 1, "tsp_ratio": 0.5, "head_budgets": "adaptive"}),
    "gemfilter": ("gemfilter", SMALL | {"tsp_layer": 1}),
    "evicting": ("adakv", SMALL | {"evict_while_decoding": True}),
    "int8": ("snapkv", SMALL | {"codec": "int8"}),
    "fp8": ("adakv", SMALL | {"codec": "fp8"}),
    "int4x2": ("snapkv", SMALL | {"codec": "int4x2"}),
    "skvq": ("snapkv", SMALL | {"codec": "skvq", "num_sink": 4, "channel_groups": "none"}),
    "think-int4": ("think", SMALL | {"codec": "int4"}),
    "think": ("think", SMALL | {"value_channel_ratio": 0.5}),
    "minicache": ("minicache", {"min_tokens": 64, "merge_limit": 1.0, "layer_owners": [0, 0, 2, 2]}),
    "duoattention": (
        "duoattention",
        SMALL | {"num_sink": 4, "streaming_tokens": 40, "head_weights": [[1.0, 0.0], [0.2, 0.4]] * 2},
    ),
    "lazyllm": ("lazyllm", {"min_tokens": 64, "retention_ratio": 0.4}),
    "kvsharer": ("kvsharer", {"min_tokens": 64, "layer_owners": [0, 1, 0, 3]}),
}


CPU = torch.device("cpu")


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def on_host(tensor: Tensor) -> Tensor:
    """Its data, to look at without waiting."""
    return tensor.inner if isinstance(tensor, OnGPU) else tensor


@dataclass
class Metadata:
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor


class PlainBuilder(AttentionMetadataBuilder):
    def __init__(self, device: torch.device) -> None:
        self.device, self.block_size = device, BLOCK_SIZE

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        common = common_attn_metadata
        lengths = on_host(common.seq_lens).tolist()
        assert max(lengths) <= common.max_seq_len and lengths == common.seq_lens_cpu_upper_bound.tolist()
        return Metadata(common.block_table_tensor, common.seq_lens, common.query_start_loc)


class Builder(CompressionMetadataBuilder, PlainBuilder):
    def page_layout(self, dtype: torch.dtype) -> RowLayout:
        return RowLayout(BLOCK_SIZE, HEAD_DIM, torch.float32, "auto")


class PlainAttention(AttentionImpl):
    """Of vLLM's pages whose entries are rows, [blocks, H, block_size, 2 * D]."""

    def __init__(self) -> None:
        self.num_heads, self.num_kv_heads, self.num_queries_per_kv = NUM_HEADS * GROUP, NUM_HEADS, GROUP
        self.head_size, self.scale = HEAD_DIM, HEAD_DIM**-0.5

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        starts, lengths = (on_host(each).tolist() for each in (attn_metadata.query_start, attn_metadata.seq_lens))
        for i, length in enumerate(lengths):
            pages = attn_metadata.block_table[i, : -(-length // BLOCK_SIZE)].long()
            entries = kv_cache[pages].transpose(1, 2).flatten(0, 1)[:length]  # [n, H, 2 * D]
            keys, values = entries.repeat_interleave(self.num_queries_per_kv, dim=1).split(HEAD_DIM, dim=-1)
            rows = slice(starts[i], starts[i + 1])
            logits = torch.einsum("qhd,khd->hqk", query[rows], keys) * self.scale
            order = torch.arange(length, device=query.device)
            unseen = order > order[length - (starts[i + 1] - starts[i]) :].unsqueeze(1)
            weights = logits.masked_fill(unseen, -torch.inf).softmax(dim=-1)
            output[rows] = torch.einsum("hqk,khd->qhd", weights, values)
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        slots = slot_mapping.clamp(min=0)  # padding goes to the null block
        RowLayout(BLOCK_SIZE, HEAD_DIM, torch.float32, "auto").write(kv_cache, key, value, slots)


class Attention(CompressionAttentionImpl, PlainAttention): ...


@dataclass(frozen=True)
class Backend:
    """What attention runs on: `builder` is made for a device, `attention` for each layer; codes are read in place."""

    builder: Callable[[torch.device], CompressionMetadataBuilder] = Builder
    attention: Callable[[], CompressionAttentionImpl] = Attention
    takes_codes: bool = True


class Layer(nn.Module):
    """Projections, attention through the forward context, and a residual stream."""

    def __init__(self, number: int, cache: Tensor, weights: Tensor, context: Any, attention: Any) -> None:
        super().__init__()
        self.layer_name, self.context = f"layers.{number}.self_attn.attn", context
        self.cache, self.weights, self.attention = cache, weights, attention
        # As vLLM's layers have.
        self._q_scale = self._k_scale = self._v_scale = torch.ones(())
        self._k_scale_float = self._v_scale_float = 1.0

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        x = torch.sin(residual + positions.unsqueeze(1) * 0.1)
        query, key, value = (x @ weight for weight in self.weights)
        query = query.view(-1, NUM_HEADS * GROUP, HEAD_DIM)
        key, value = (each[:, : NUM_HEADS * HEAD_DIM].reshape(-1, NUM_HEADS, HEAD_DIM) for each in (key, value))
        metadata, slots = (of[self.layer_name] for of in (self.context.attn_metadata, self.context.slot_mapping))
        self.attention.do_kv_cache_update(self, key, value, self.cache, slots)
        output = torch.empty_like(query)
        self.attention.forward(self, query, key, value, self.cache, metadata, output)
        return output.flatten(1), residual


def codecs(place: Any) -> dict[str, Codec]:
    """All, skvq with channels in an order of each head's own; `place` as for `Decoder`."""
    orders = torch.rand(NUM_LAYERS * NUM_HEADS, 2, HEAD_DIM, generator=torch.Generator().manual_seed(2)).argsort(dim=2)
    return CODECS | {"skvq": SkvqCodec(ChannelGroups(place(orders), place(torch.full((len(orders), 2, 2), 0.9))))}


class Decoder:
    """Runs steps on a device; `place` takes a tensor of the host there."""

    def __init__(self, device: torch.device, place: Any, context: Any, backend: Backend) -> None:
        generator = torch.Generator().manual_seed(1)
        self.device, self.place, self.context = device, place, context
        caches = torch.zeros(NUM_LAYERS, 24, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
        weights = torch.randn(NUM_LAYERS, 3, HIDDEN, HIDDEN, generator=generator) * HIDDEN**-0.5
        self.embedding = place(torch.randn(PROMPT + 60, HIDDEN, generator=generator))
        self.builder = backend.builder(device)
        self.layers = [
            Layer(i, place(caches[i]), place(weights[i]), context, backend.attention()) for i in range(NUM_LAYERS)
        ]
        for layer in self.layers:
            layer.isa = vars(self.builder).get("isa")  # as vLLM's CPU engine tells them
        self.compressor = Compressor(list(caches), self.builder.page_layout(caches.dtype), codecs(place))
        pool = self.compressor.pool
        self.compressor.pool = replace(pool, cache=place(pool.cache), first=place(pool.first))
        self.compressor.evictor = Evictor(self.compressor.pool)
        self.builder.compressor = self.compressor
        self.builder.takes_codes = backend.takes_codes

    def step(self, batch: Batch, tables: list[list[int]], counts: list[int], lengths: list[int]) -> Tensor:
        """Final rows of a step: each request's block table, rows, and tokens after the step."""
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        table = torch.zeros(len(tables), 16, dtype=torch.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = torch.tensor(blocks)
        slots = table[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=self.place(starts),
            query_start_loc_cpu=starts,
            seq_lens=self.place(seq_lens),
            seq_lens_cpu_upper_bound=seq_lens.clone(),
            num_reqs=len(counts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=self.place(table),
            slot_mapping=self.place(slots),
        )
        self.builder.batch = batch
        metadata = self.builder.build(0, common)
        names = {i: layer.layer_name for i, layer in enumerate(self.layers)}
        self.context.attn_metadata = dict.fromkeys(names.values(), metadata)
        self.context.slot_mapping = dict.fromkeys(names.values(), common.slot_mapping)
        cut, segments = None, segments_of(starts.tolist(), batch.prefills, batch.decodes)
        if any(prefill.plan.cuts for prefill in batch.prefills):
            cut = TSPStep(self.compressor, segments, self.builder, self.layers, names, lambda ids: self.embedding[ids])
        with ExitStack() as detours:
            for each in (batch.revival, cut):
                if each is not None:
                    detours.enter_context(each.detour())
            detours.enter_context(made_on(self.device))
            hidden = self.forward(self.place(positions))
            hidden = hidden if cut is None else cut.scatter(hidden, sum(counts))
            self.compressor.finish(batch.prefills)
        self.compressor.end_step()
        return hidden

    def forward(self, positions: Tensor) -> Tensor:
        """All layers, on the batch that the context tells of."""
        hidden, residual = self.embedding[positions % len(self.embedding)], None
        for layer in self.layers:
            hidden, residual = layer.forward(positions, hidden, residual)
        return hidden


class DecodeGraph:
    """Steps of up to `num_reqs` requests that decode a token each, as a captured graph runs them.

    A replay makes the calls of the capture again, on the same tensors: what the builder makes of a later step counts
    only by what it leaves in them.
    """

    def __init__(self, decoder: Decoder, num_reqs: int) -> None:
        self._decoder = decoder
        self._positions = torch.zeros(num_reqs, dtype=torch.int64)
        starts, lengths = torch.arange(num_reqs + 1, dtype=torch.int32), torch.ones(num_reqs, dtype=torch.int32)
        self._common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths.clone(),
            num_reqs=num_reqs,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            max_seq_len=16 * BLOCK_SIZE,
            block_table_tensor=torch.zeros(num_reqs, 16, dtype=torch.int32),
            slot_mapping=torch.full((num_reqs,), -1),
        )
        self._captured = decoder.builder.build_for_cudagraph_capture(self._common)
        self._replay()

    def step(self, held: dict[int, Any], tables: list[list[int]], lengths: list[int]) -> Tensor:
        """Rows of a step; requests up to the capture's number are padding."""
        common, count = self._common, len(tables)
        common.seq_lens.zero_()[:count] = torch.tensor(lengths)
        common.seq_lens_cpu_upper_bound.copy_(common.seq_lens)
        for starts in (common.query_start_loc, common.query_start_loc_cpu):
            starts.copy_(torch.arange(len(starts)).clamp(max=count))
        common.block_table_tensor.zero_()
        for row, blocks in enumerate(tables):
            common.block_table_tensor[row, : len(blocks)] = torch.tensor(blocks)
        self._positions[:count] = torch.tensor(lengths) - 1
        blocks = common.block_table_tensor[torch.arange(count), self._positions[:count] // BLOCK_SIZE].long()
        common.slot_mapping.fill_(-1)[:count] = blocks * BLOCK_SIZE + self._positions[:count] % BLOCK_SIZE
        self._decoder.builder.batch = Batch((), (), {}, held, BLOCK_SIZE, in_graph=True)
        common.max_seq_len = max(lengths)
        self._require_same_places(self._decoder.builder.build(0, common))
        return self._replay()[:count]

    def _require_same_places(self, metadata: Any) -> None:
        """What a kernel is given of a tensor is where it begins, and how it is laid out."""
        for ours, captured in zip(metadata.reads[0].metadata, self._captured.reads[0].metadata, strict=True):
            for name, tensor in vars(captured).items():
                if isinstance(tensor, Tensor) and name != "slot_mapping":
                    found = vars(ours)[name]
                    assert (found.data_ptr(), found.shape, found.stride()) == (
                        tensor.data_ptr(),
                        tensor.shape,
                        tensor.stride(),
                    ), f"{name} is elsewhere than when the graph was captured"

    def _replay(self) -> Tensor:
        context, names = self._decoder.context, [layer.layer_name for layer in self._decoder.layers]
        context.attn_metadata = dict.fromkeys(names, self._captured)
        context.slot_mapping = dict.fromkeys(names, self._common.slot_mapping)
        return self._decoder.forward(self._positions)


def as_a_kernel(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An op whose reference looks at tensors of a GPU, as its kernel there does not have to."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        before = list(OnGPU.waits)
        result = op(*args, **kwargs)
        OnGPU.waits[:] = before
        return result

    return run


@contextmanager
def stand_ins() -> Iterator[Any]:
    """In the place of vLLM's forward context, and of its ranks, of which there is one."""
    context = SimpleNamespace(attn_metadata={}, slot_mapping={}, skip_compiled=False)
    with pytest.MonkeyPatch.context() as patch:
        for module in (detour, tsp):
            patch.setattr(module, "get_forward_context", lambda: context)
        for module in (ranks, rating, uneven):
            patch.setattr(module, "tensor_model_parallel_all_reduce", lambda tensor: tensor)
        patch.setattr(ranks, "get_tensor_model_parallel_world_size", lambda: 1)
        patch.setattr(codes, "encoded_attention", as_a_kernel(codes.encoded_attention))
        yield context


def run(
    name: str,
    device: torch.device = CPU,
    place: Callable[[Tensor], Tensor] = as_it_is,
    backend: Backend | None = None,
    graph: bool = False,
) -> list[list[float]]:
    """Last rows of both requests in each step; the prompt must come out compressed. With `graph` that decodes them."""
    with stand_ins() as context:
        return _run(name, device, place, context, backend or Backend(), graph)


def _run(name: str, device: torch.device, place: Any, context: Any, backend: Backend, graph: bool) -> list[list[float]]:
    method, settings = METHODS[name]
    config = CompressionConfig(method, **settings)
    config = config.for_model(num_layers=NUM_LAYERS, num_kv_heads=NUM_HEADS, max_model_len=512)
    plan = config.plan(PROMPT, BLOCK_SIZE, 0, EntryShape(HEAD_DIM, torch.float32))
    decoder = Decoder(device, place, context, backend)
    ours, others, held = list(range(1, 12)), [20, 21, 22], decoder.compressor.held
    found, waits, start, nulls = [], [], 0, 0
    for end in sorted({CHUNK, *plan.stops}):
        stop, stays = plan.stop_at(end), None
        if stop is not None:
            whole = plan.num_whole_blocks_at(stop)
            stays = ours[whole - plan.num_blocks_at(stop) : whole]
        prefill = PrefillRows(
            request_id="a",
            plan=plan,
            recipe=recipe_of(config),
            first=0,
            count=end - start,
            start=start,
            blocks=place(torch.tensor(ours[: -(-PROMPT // BLOCK_SIZE)])),
            destination=stays if end == PROMPT else None,
            held=held.get("a"),
            streaming=None if end == PROMPT else stays,
            tokens=place(torch.arange(PROMPT)),
        )
        batch = Batch((prefill,), (), {}, {0: held["a"]} if "a" in held else {}, BLOCK_SIZE)
        other = (1, OTHER + 1) if start else (OTHER, OTHER)
        hidden = decoder.step(batch, [ours, others], [end - start, other[0]], [end, other[1]])
        found += [hidden[end - start - 1].tolist(), hidden[-1].tolist()]
        start = end
        if stays is not None:
            kept = stays[decoder.compressor.stats.surplus.get("a", 0) :]
            nulls = whole - len(kept)
            ours[:whole] = [0] * nulls + kept
    assert nulls, "nothing was given back"
    if graph:
        return found + _decode_in_graph(decoder, [ours, others], nulls)
    for i in range(4):
        pages, decodes, length = held.get("a"), [], PROMPT + i + 1
        if plan.evicts:
            filled = (length - 1) % BLOCK_SIZE + 1
            decodes = [DecodeRows("a", 0, 1, ours[(length - 1) // BLOCK_SIZE], filled, evicts=filled == BLOCK_SIZE)]
        revival = None
        if isinstance(pages, RevivablePages):
            revival = RevivalStep([pages], decoder.layers, decoder.compressor.stats)
        as_they_are = {} if pages is not None else {0: nulls}
        batch = Batch((), tuple(decodes), as_they_are, {} if pages is None else {0: pages}, BLOCK_SIZE, revival)
        OnGPU.waits.clear()
        hidden = decoder.step(batch, [ours, others], [1, 1], [length, OTHER + 3 + i])
        waits.append(list(OnGPU.waits))
        found += [hidden[0].tolist(), hidden[1].tolist()]
        if decodes and decodes[0].evicts:  # the block is given back, a null block stands for it
            ours.pop((length - 1) // BLOCK_SIZE)
            ours.insert(0, 0)
            nulls += 1
            if pages is not None:
                held["a"] = replace(pages, num_whole=pages.num_whole + 1)
    if pages is not None and not plan.evicts and not plan.revives:
        found.append(decoder.step(batch, [ours], [1], [PROMPT + 5])[0].tolist())  # alone: all its rows by heads
    if not (plan.evicts or plan.revives):
        assert waits[1:] == [[], [], []], "the host waits for the GPU while it decodes"
    return found


def _decode_in_graph(decoder: Decoder, tables: list[list[int]], nulls: int) -> list[list[float]]:
    """The same steps, of graphs captured for four requests and, at last, where one is alone, for two."""
    graphs, found, pool = [DecodeGraph(decoder, n) for n in (4, 2)], [], decoder.compressor.pool
    ours, theirs = decoder.compressor.held.get("a"), HeadPages.none(pool, 0)
    held = {0: HeadPages.none(pool, nulls) if ours is None else ours, 1: theirs}
    for i in range(4):
        found += graphs[0].step(held, tables, [PROMPT + i + 1, OTHER + 3 + i]).tolist()
    if ours is not None:
        found += graphs[1].step({0: held[0]}, tables[:1], [PROMPT + 5]).tolist()
    return found
