"""Queries that vLLM cuts down to eight bits before a GPU's attention has them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionImpl

from fastkv_vllm.adapter import planned
from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionMetadata
from fastkv_vllm.adapter.batch import LayerRows
from fastkv_vllm.adapter.pages import RowLayout

NUM_ROWS, NUM_HEADS, GROUP, HEAD_DIM = 3, 2, 2, 8
SCALE, KEY_SCALE, QUERY_SCALE = 0.5, 0.25, 0.125
FLOAT8 = torch.float8_e4m3fn
LAYER = SimpleNamespace(
    layer_name="model.layers.5.self_attn.attn", _k_scale_float=KEY_SCALE, _q_scale_float=QUERY_SCALE
)


class Copying(AttentionImpl):
    """Answers with the queries, times their scale."""

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *scales: Any
    ):
        assert query.dtype == FLOAT8 and output.dtype == torch.bfloat16, "attention has queries as vLLM gave them"
        output.copy_(query.float() * QUERY_SCALE)
        return output


class Attention(CompressionAttentionImpl, Copying):
    def __init__(self) -> None:
        self.scale, self.head_size = SCALE, HEAD_DIM
        self.num_heads, self.num_kv_heads, self.num_queries_per_kv = NUM_HEADS * GROUP, NUM_HEADS, GROUP


def forward(metadata: CompressionMetadata) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries as they are, as vLLM cuts them down, and what attention gives."""
    queries = torch.randn(NUM_ROWS, NUM_HEADS * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    entries = torch.zeros(NUM_ROWS, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    stored, output = (queries / QUERY_SCALE).to(FLOAT8), torch.empty(queries.shape, dtype=torch.bfloat16)
    Attention().forward(LAYER, stored, entries, entries, torch.empty(0), metadata, output)
    return queries, stored, output


def test_they_vote_times_their_scale() -> None:
    rated: list[LayerRows] = []
    compressor: Any = SimpleNamespace(
        layout=RowLayout(32, HEAD_DIM, torch.bfloat16, "fp8"), after_attention=lambda _, __, rows: rated.append(rows)
    )
    prefills: Any = (object(),)
    queries, stored, _ = forward(CompressionMetadata("ordinary", NUM_ROWS, prefills, compressor=compressor))
    (rows,) = rated
    assert rows.layer == 5 and rows.query.dtype == torch.bfloat16 and torch.equal(rows.query.float(), stored.float())
    assert rows.scale == SCALE * KEY_SCALE * QUERY_SCALE
    assert torch.allclose(rows.query.float() * QUERY_SCALE, queries, rtol=2**-4, atol=1e-3)


def test_rows_read_head_by_head() -> None:
    """What attention gives is of the model's dtype, as its queries were."""
    rows, heads = torch.arange(NUM_ROWS).repeat(NUM_HEADS), torch.arange(NUM_HEADS).repeat_interleave(NUM_ROWS)
    reads: Any = SimpleNamespace(queries=(rows, heads), cache=lambda layer: torch.empty(0), metadata=[None] * 6)
    _, stored, output = forward(CompressionMetadata(None, NUM_ROWS, reads=(reads,)))
    assert torch.equal(output, (stored.float() * QUERY_SCALE).bfloat16())


@pytest.mark.parametrize("num_scales", [1, NUM_HEADS])
def test_a_scale_for_each_head_is_refused(num_scales: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the cache is made, among all that does not hold; here there is no cache either."""
    one, keys = torch.ones(1), torch.ones(num_scales)
    layer = SimpleNamespace(impl=Attention(), _q_scale=one, _k_scale=keys, _v_scale=one)
    monkeypatch.setattr(planned, "get_layers_from_vllm_config", lambda *_: {LAYER.layer_name: layer})
    runner = planned.PlannedRunner()
    runner.vllm_config = None
    cache: Any = SimpleNamespace(kv_cache_groups=[])
    with pytest.raises(RuntimeError) as refused:
        runner._require_our_classes(cache)
    said = f"needs one scale for all heads of a layer, got {num_scales}" in str(refused.value)
    assert said == (num_scales > 1)
