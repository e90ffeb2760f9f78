"""`merge_layers`: directions and magnitudes as float64 defines them, both layers back, kept entries as they were."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.merge_layers import (
    LayerPair,
    distinct_entries,
    measure_layers,
    merge_layers,
    restore_layers,
)
from tests.kernels.compare import assert_accurate, assert_same
from tests.kernels.conftest import PLACES, runner
from tests.kernels.csrc_builds import on_cpu

NO_PAGE = 10**6  # in a page table where nobody may look
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Run = Callable[..., Any]


def pair_of(
    lengths: list[int], *, head_dim: int = 64, block_size: int = 16, dtype: torch.dtype = torch.float32
) -> LayerPair:
    """Random entries of two layers in pages all over a cache whose other pages are NaN, keys beside values."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
    num_pages = [-(-length // block_size) for length in lengths]
    width = max(num_pages) + 1
    ids = torch.randperm(2 * sum(num_pages) + 3 * len(lengths), generator=generator).to(torch.int32)
    tables = torch.full((2, len(lengths), width), NO_PAGE, dtype=torch.int32)
    cache = torch.full((len(ids) + 1, block_size, 2, head_dim), float("nan"), dtype=dtype)
    for table in tables:
        for row, count in zip(table, num_pages, strict=True):
            row[:count], ids = ids[:count], ids[count:]
            shape = (count, block_size, 2, head_dim)
            cache[row[:count].long()] = torch.randn(shape, generator=generator).to(dtype)
    return LayerPair(cache.transpose(1, 2), tables[0], tables[1], torch.tensor(lengths, dtype=torch.int32))


def vectors(pair: LayerPair, table: Tensor) -> Tensor:
    """Keys and values of all entries, [S, n, 2, D]; 0 beyond a sequence."""
    size = pair.cache.shape[2]
    found = pair.cache.new_zeros(pair.num_sequences, pair.num_entries, 2, pair.cache.shape[3])
    for s, length in enumerate(pair.lengths.tolist()):
        for i in range(length):
            found[s, i] = pair.cache[int(table[s, i // size]), :, i % size]
    return found


def put(pair: LayerPair, table: Tensor, sequence: int, entry: int, part: int, vector: Tensor) -> None:
    size = pair.cache.shape[2]
    pair.cache[int(table[sequence, entry // size]), part, entry % size] = vector


def exact_measures(pair: LayerPair) -> tuple[Tensor, Tensor]:
    """Magnitudes and distances by arccos, in float64."""
    both = torch.stack([vectors(pair, pair.lower), vectors(pair, pair.upper)], dim=3).double()  # [S, n, 2, 2, D]
    magnitudes = both.norm(dim=-1)
    cosines = (both[..., 0, :] * both[..., 1, :]).sum(-1) / magnitudes.prod(dim=-1)
    return magnitudes, (cosines.clamp(-1, 1).arccos() / math.pi).where((magnitudes > 0).all(dim=-1), 0.0)


def exact_directions(pair: LayerPair, t: float) -> Tensor:
    """Slerp of the unit vectors in float64, [S, n, 2, D]."""
    magnitudes, distances = exact_measures(pair)
    u = vectors(pair, pair.lower).double() / magnitudes[..., :1]
    v = vectors(pair, pair.upper).double() / magnitudes[..., 1:]
    angle = (distances * math.pi).unsqueeze(-1)
    return ((1 - t) * angle).sin() / angle.sin() * u + (t * angle).sin() / angle.sin() * v


# What runs elsewhere takes tensors and returns one.


def measure(cache: Tensor, lower: Tensor, upper: Tensor, lengths: Tensor, *, impl: str | None = None) -> Tensor:
    """[S, n, 2, 3]: two magnitudes and a distance."""
    measures = measure_layers(LayerPair(cache, lower, upper, lengths), impl=impl)
    return torch.cat([measures.magnitudes, measures.distances.unsqueeze(-1)], dim=-1)


def merge(
    cache: Tensor, lower: Tensor, upper: Tensor, lengths: Tensor, *, retained: Tensor, t: float, impl: str | None = None
) -> None:
    pair = LayerPair(cache, lower, upper, lengths)
    merge_layers(pair, measure_layers(pair, impl=impl), retained, t=t, impl=impl)


def restore(
    cache: Tensor,
    lower: Tensor,
    upper: Tensor,
    lengths: Tensor,
    *,
    shared: Tensor,
    kept: Tensor,
    magnitudes: Tensor,
    retained: Tensor,
    impl: str | None = None,
) -> None:
    pair = LayerPair(cache, lower, upper, lengths)
    restore_layers(pair, shared, kept, magnitudes=magnitudes, retained=retained, impl=impl)


def tensors(pair: LayerPair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pair.cache, pair.lower, pair.upper, pair.lengths


def a_call(head_dim: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        cache = torch.zeros(9, 16, 2, head_dim, dtype=dtype).transpose(1, 2)
        table = torch.zeros(8, 4, dtype=torch.int32)
        pair = LayerPair(cache, table, table, torch.full((8,), 64, dtype=torch.int32))
        magnitudes, retained = torch.ones(8, 64, 2, 2), torch.zeros(8, 64, dtype=torch.bool)
        measures = replace(measure_layers(pair, impl="triton"), magnitudes=magnitudes)
        merge_layers(pair, measures, retained, impl="triton")
        restore_layers(pair, table, table, magnitudes=magnitudes, retained=retained, impl="triton")

    return call


CALLS = {
    "64 bfloat16": a_call(64, torch.bfloat16),
    "128 bfloat16": a_call(128, torch.bfloat16),
    "256 float32": a_call(256, torch.float32),
}

LENGTHS = {"one entry": [1], "a block and its neighbours": [15, 16, 17], "one empty, a prime": [0, 31]}
each_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@pytest.fixture(params=[("reference", "cpu"), *PLACES], ids="-on-".join)
def run_all(request: pytest.FixtureRequest) -> Run:
    """`run_each`, and the reference, whose errors are bounded likewise."""
    return (
        (lambda f, *args, **kwargs: f(*args, **kwargs))
        if "reference" in request.param
        else runner(request, *request.param)
    )


def check_measures(run: Run, pair: LayerPair) -> None:
    before = pair.cache.clone()
    found = run(measure, *tensors(pair))
    magnitudes, distances = exact_measures(pair)
    u, v = (vectors(pair, table).float() for table in (pair.lower, pair.upper))
    plain = torch.stack([u.norm(dim=-1), v.norm(dim=-1)], dim=-1)
    cosines = (u * v).sum(-1) / plain.prod(dim=-1).clamp(min=1e-30)
    assert_accurate(found[..., :2], magnitudes, [plain])
    held = pair.is_held
    assert_accurate(found[..., 2][held], distances[held], [cosines.clamp(-1, 1).arccos()[held] / math.pi])
    assert not found[~held].any(), "0 beyond a sequence"
    assert_same(pair.cache, before)


@each_length
@each_dtype
def test_measures(run_all: Run, lengths: list[int], dtype: torch.dtype) -> None:
    check_measures(run_all, pair_of(lengths, dtype=dtype))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("block_size", [8, 32])
def test_other_shapes(run_all: Run, head_dim: int, block_size: int) -> None:
    pair = pair_of([block_size + 1, 3], head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16)
    check_measures(run_all, pair)
    check_merge(run_all, pair, 0.6)


def check_merge(run: Run, pair: LayerPair, t: float) -> None:
    """Merged entries have the slerp's direction, all else is what it was."""
    retained = torch.arange(pair.num_entries).expand(pair.num_sequences, -1) % 3 == 1
    exact, before = exact_directions(pair, t), pair.cache.clone()
    run(merge, *tensors(pair), retained=retained, t=t)
    is_merged = pair.is_held & ~retained
    found = vectors(pair, pair.lower)
    assert_accurate(found[is_merged], exact[is_merged], [exact[is_merged].to(found.dtype)])
    for s, i in is_merged.nonzero().tolist():
        for part in range(2):
            put(pair, pair.lower, s, i, part, vectors(replace(pair, cache=before), pair.lower)[s, i, part])
    assert_same(pair.cache, before)


@each_length
@each_dtype
def test_merge_is_the_slerp(run_all: Run, lengths: list[int], dtype: torch.dtype) -> None:
    check_merge(run_all, pair_of(lengths, dtype=dtype), 0.6)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_weights(run_all: Run, t: float) -> None:
    check_merge(run_all, pair_of([9]), t)


def test_degenerate_vectors(run_all: Run) -> None:
    """Zero, parallel, opposite: a direction of length 1 that restores what can be restored."""
    pair = pair_of([8])
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    cases = [(x, 3 * x), (x, -2 * x), (0 * x, x), (x, 0 * x), (0 * x, 0 * x), (x, x), (-x, x * 1e-3), (x * 1e4, x)]
    for i, (lower, upper) in enumerate(cases):
        for part, sign in enumerate((1, -1)):
            put(pair, pair.lower, 0, i, part, sign * lower)
            put(pair, pair.upper, 0, i, part, sign * upper)
    distances = run_all(measure, *tensors(pair))[0, :8, :, 2]
    assert ((distances - torch.tensor([0, 1, 0, 0, 0, 0, 1, 0]).unsqueeze(1)).abs() < 1e-6).all()
    unit = x / x.norm()
    expected = torch.stack([unit, -unit, unit, unit, 0 * x, unit, unit, unit])
    for t, sign in ((0.6, 1), (0.5, 1), (0.4, -1)):
        merged = replace(pair, cache=pair.cache.clone())
        run_all(merge, *tensors(merged), retained=torch.zeros(1, 32, dtype=torch.bool), t=t)
        signs = torch.tensor([1, sign, 1, 1, 1, 1, sign, 1]).unsqueeze(1)
        found = vectors(merged, pair.lower)[0, :8]
        for part, of_part in enumerate((1, -1)):
            errors = (found[:, part] - of_part * signs * expected).abs()
            assert errors.max() < 4 * torch.finfo(torch.float32).eps, f"t {t}: {errors.amax(dim=1).tolist()}"


@each_dtype
def test_restore_gives_both_layers_back(run_all: Run, dtype: torch.dtype) -> None:
    """In place over the shared pages: merged entries by direction and magnitude, retained ones bit for bit."""
    pair = pair_of([0, 33, 16], dtype=dtype)
    lower, upper = vectors(pair, pair.lower), vectors(pair, pair.upper)
    retained = torch.rand(3, pair.num_entries, generator=torch.Generator().manual_seed(2)) < 0.4
    is_kept = retained & pair.is_held
    magnitudes = measure_layers(pair).magnitudes
    merge(*tensors(pair), retained=retained, t=0.6)
    stored = vectors(pair, pair.lower).double()
    kept = torch.full((3, 4), NO_PAGE, dtype=torch.int32)
    spare = [p for p in range(len(pair.cache)) if p not in pair.lower.unique().tolist() + pair.upper.unique().tolist()]
    kept[1, :2], kept[2, 0] = torch.tensor(spare[:2]), spare[2]
    for s in range(3):
        for place, i in enumerate(is_kept[s].nonzero().flatten().tolist()):
            for part in range(2):
                put(pair, kept, s, place, part, upper[s, i, part])
    before = pair.cache.clone()
    run_all(restore, *tensors(pair), shared=pair.lower, kept=kept, magnitudes=magnitudes, retained=retained)
    unit = stored / stored.norm(dim=-1, keepdim=True)
    for layer, (table, original) in enumerate(((pair.lower, lower), (pair.upper, upper))):
        found = vectors(pair, table)
        assert_same(found[is_kept], original[is_kept])
        is_merged = pair.is_held & ~retained
        exact = (unit * magnitudes[..., layer, None].double())[is_merged]
        assert_accurate(found[is_merged], exact, [exact.to(dtype)])
    others = [p for p in range(len(pair.cache)) if p not in torch.cat([pair.lower, pair.upper]).unique().tolist()]
    assert_same(pair.cache[others], before[others])


def test_nothing_retained_needs_no_kept_page(run_all: Run) -> None:
    pair = pair_of([5])
    lower = vectors(pair, pair.lower)
    retained, kept = torch.zeros(1, pair.num_entries, dtype=torch.bool), torch.zeros(1, 0, dtype=torch.int32)
    magnitudes = measure_layers(pair).magnitudes
    run_all(merge, *tensors(pair), retained=retained, t=0.0)
    run_all(restore, *tensors(pair), shared=pair.lower, kept=kept, magnitudes=magnitudes, retained=retained)
    assert (vectors(pair, pair.lower) - lower).abs().max() < 1e-5, "at t 0 the direction is the lower layer's own"


def test_distinct_entries() -> None:
    """A band below the largest distance of each sequence, for keys or for values; wider with gamma."""
    distances = torch.tensor([[[0.0, 0.2], [0.1, 0.2], [0.9, 0.2], [1.0, 0.6], [0.3, 0.9]], [[0.4, 0.4]] * 5])
    lengths = torch.tensor([4, 5], dtype=torch.int32)
    for gamma, expected in [(0.0, []), (0.05, [3]), (0.11, [2, 3]), (0.95, [1, 2, 3]), (1.0, [1, 2, 3])]:
        found = distinct_entries(distances, lengths, gamma=gamma)
        assert found[0].nonzero().flatten().tolist() == expected, gamma
        assert not found[1].any(), "all equally far apart"
    assert distinct_entries(distances[:, :0], lengths * 0, gamma=0.5).shape == (2, 0)


def changed(**change: Any) -> LayerPair:
    return replace(pair_of([5, 9]), **change)


BAD = {
    "float64": (lambda: changed(cache=torch.zeros(4, 2, 16, 64).double()), "cache must be"),
    "one part": (lambda: changed(cache=torch.zeros(4, 1, 16, 64)), r"cache must be \[num_pages, 2, block_size, D\]"),
    "elements apart": (lambda: changed(cache=torch.zeros(4, 2, 64, 16).transpose(2, 3)), "side by side"),
    "int64 table": (lambda: changed(lower=torch.zeros(2, 2).long()), r"lower must be \[2, 2\] torch.int32"),
    "two widths": (lambda: changed(upper=torch.zeros(2, 3).int()), "must be of one shape"),
    "lengths": (lambda: changed(lengths=torch.zeros(2).long()), "lengths must be"),
    "gamma": (lambda: distinct_entries(torch.zeros(1, 2, 2), torch.ones(1).int(), gamma=1.5), "gamma must be in"),
    "t": (lambda: merge(*tensors(pair_of([5])), retained=torch.zeros(1, 32).bool(), t=2.0), "t must be in"),
    "retained": (lambda: merge(*tensors(pair_of([5])), retained=torch.zeros(1, 3).bool(), t=0.5), "retained must be"),
    "no GPU": (lambda: measure_layers(pair_of([5]), impl="triton"), "impl='triton' needs tensors on a GPU"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cuda_does_not_have_is_named(csrc_on_cpu: Path) -> None:
    with pytest.raises(NotImplementedError, match="head_dim 64, 128 and 256; got 96"):
        on_cpu(csrc_on_cpu, measure, *tensors(pair_of([5], head_dim=96)))
    pair = pair_of([5], head_dim=65)
    cache = pair.cache[..., 1:]
    with pytest.raises(NotImplementedError, match="loads 16 bytes at once"):
        on_cpu(csrc_on_cpu, measure, *tensors(replace(pair, cache=cache)))


def test_triton_takes_any_head_dim(run: Run) -> None:
    check_measures(run, pair_of([17], head_dim=96))
    check_merge(run, pair_of([17], head_dim=65), 0.6)
