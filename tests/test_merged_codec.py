"""Records of two layers' entries: what comes back is the reference's, and records fit as promised."""

import math

import pytest
import torch

from fastkv_vllm.codecs import EntryShape, PairCodec
from tests.reference.merging import merge_pair


def own_entries(upper: torch.Tensor, retained: torch.Tensor, most: int) -> torch.Tensor:
    """The upper layer's retained entries in order, as they lie in its pages; NaN where there are fewer."""
    own = torch.full((*upper.shape[:2], most, upper.shape[3]), math.nan)
    for sequence, mask in enumerate(retained):
        own[sequence, :, : int(mask.sum())] = upper[sequence][:, mask]
    return own


@pytest.mark.parametrize("values_only", [False, True])
@pytest.mark.parametrize(("t", "gamma", "most"), [(0.6, 0.05, 32), (0.6, 0.5, 7), (0.0, 1.0, 64), (1.0, 0.0, 0)])
def test_restored_is_the_references(t: float, gamma: float, most: int, values_only: bool) -> None:
    torch.manual_seed(0)
    lower, upper = torch.randn(3, 2, 64, 32), torch.randn(3, 2, 64, 32)
    codec = PairCodec(t, gamma, values_only)
    records, retained = codec.merge(lower.clone(), upper.clone(), most)
    assert records.shape == (3, 64, codec.width(32))
    assert int(retained.sum(dim=1).max()) <= most
    restored = codec.restore(records, own_entries(upper, retained, most))
    for sequence in range(3):
        pairs = [tuple(layer[sequence]) for layer in (lower, upper)]
        expected = merge_pair(*pairs, t=t, gamma=gamma, most=most, values_only=values_only)
        for got, want, own in zip(restored[:, sequence], expected, pairs, strict=True):
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)
            assert torch.equal(got[:, retained[sequence]], torch.stack(own)[:, retained[sequence]])
            assert torch.equal(got[0], own[0]) is values_only or most == 64


def test_equal_layers_come_back_as_they_are() -> None:
    torch.manual_seed(0)
    layer = torch.randn(2, 2, 32, 16)
    codec = PairCodec(0.6, 0.05, values_only=False)
    records, retained = codec.merge(layer.clone(), layer.clone(), 32)
    restored = codec.restore(records, own_entries(layer, retained, 32))
    torch.testing.assert_close(restored, torch.stack([layer, layer]), rtol=1e-5, atol=1e-6)


def test_records_that_fit_into_a_page() -> None:
    entry = EntryShape(64, torch.bfloat16)
    assert PairCodec(0.6, 0.05, values_only=False).page_entries(32, entry) == 31  # 132 of 4096 elements
    assert PairCodec(0.6, 0.05, values_only=True).page_entries(32, entry) == 21  # 194 of 4096
