"""Records of two layers' entries: what comes back is the reference's, and records fit as promised."""

import math

import pytest
import torch

from fastkv_vllm.codecs import VECTOR_CODECS, EntryShape, PairCodec
from tests.reference.codecs import stored
from tests.reference.merging import merge_pair

ENTRY = EntryShape(32, torch.float32)


def own_entries(codec: PairCodec, upper: torch.Tensor, retained: torch.Tensor, most: int) -> torch.Tensor:
    """The upper layer's retained entries in order, as they come back from its pages; NaN where there are fewer."""
    own = torch.full((*upper.shape[:2], most, upper.shape[3]), math.nan)
    for sequence, mask in enumerate(retained):
        data = codec.vectors.encode(*upper[sequence][:, mask])
        own[sequence, :, : int(mask.sum())] = torch.stack(codec.vectors.decode(data, ENTRY))
    return own


@pytest.mark.parametrize("name", [None, *VECTOR_CODECS])
@pytest.mark.parametrize("values_only", [False, True])
@pytest.mark.parametrize(("t", "gamma", "most"), [(0.6, 0.05, 32), (0.6, 0.5, 7), (0.0, 1.0, 64), (1.0, 0.0, 0)])
def test_restored_is_the_references(t: float, gamma: float, most: int, values_only: bool, name: str | None) -> None:
    torch.manual_seed(0)
    lower, upper = torch.randn(3, 2, 64, 32), torch.randn(3, 2, 64, 32)
    codec = PairCodec(t, gamma, values_only, VECTOR_CODECS[name or "exact"])
    records, retained = codec.merge(lower.clone(), upper.clone(), most)
    assert records.dtype == torch.uint8
    assert records.shape == (3, 64, codec.num_bytes(ENTRY))
    assert int(retained.sum(dim=1).max()) <= most
    restored = codec.restore(records, own_entries(codec, upper, retained, most), ENTRY)
    for sequence in range(3):
        pairs = [tuple(layer[sequence]) for layer in (lower, upper)]
        expected = merge_pair(*pairs, t=t, gamma=gamma, most=most, values_only=values_only, codec=name)
        for got, want, own in zip(restored[:, sequence], expected, pairs, strict=True):
            off = ((got - torch.stack(want)).abs() > 1e-5 * (1 + got.abs())).float().mean()
            assert off == 0 if name in (None, "exact") else off < 0.03, "but for vectors with a code that noise decides"
            as_stored = torch.stack(stored(name or "exact", *own))
            assert torch.equal(got[:, retained[sequence]], as_stored[:, retained[sequence]])
            assert torch.equal(got[0], as_stored[0]) is values_only or most == 64


def test_equal_layers_come_back_as_they_are() -> None:
    torch.manual_seed(0)
    layer = torch.randn(2, 2, 32, 32)
    codec = PairCodec(0.6, 0.05, values_only=False, vectors=VECTOR_CODECS["exact"])
    records, retained = codec.merge(layer.clone(), layer.clone(), 32)
    restored = codec.restore(records, own_entries(codec, layer, retained, 32), ENTRY)
    torch.testing.assert_close(restored, torch.stack([layer, layer]), rtol=1e-5, atol=1e-6)


def test_codes_of_a_direction_do_not_change_its_magnitude() -> None:
    torch.manual_seed(0)
    layers = torch.randn(2, 2, 2, 32, 32)
    codec = PairCodec(0.6, 0.0, values_only=False, vectors=VECTOR_CODECS["int2"])
    records, retained = codec.merge(*layers.clone(), 0)
    restored = codec.restore(records, own_entries(codec, layers[1], retained, 0), ENTRY)
    torch.testing.assert_close(restored.norm(dim=-1), layers.norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert bool((restored != layers).any())


@pytest.mark.parametrize(
    ("name", "num_keys_and_values", "num_values"),
    [("exact", 31, 21), ("fp8", 60, 41), ("int8", 56, 39), ("int4", 102, 73), ("int2", 170, 128)],
)
def test_records_that_fit_into_a_page(name: str, num_keys_and_values: int, num_values: int) -> None:
    """By hand: a bf16 page of 32 entries, head size 64, has 8192 bytes; a record of int4 2 * 36 + 8 or 3 * 36 + 4."""
    entry = EntryShape(64, torch.bfloat16)
    for values_only, num_records in ((False, num_keys_and_values), (True, num_values)):
        assert PairCodec(0.6, 0.05, values_only, VECTOR_CODECS[name]).page_entries(32, entry) == num_records
