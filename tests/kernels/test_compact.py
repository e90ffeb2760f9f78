"""`compact`: every filled slot holds the bytes its source held before the call, whatever overlaps."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkv_vllm.kernels.compact import compact
from fastkv_vllm.kernels.compact.overlap import must_wait
from tests.kernels.compare import assert_same

Move = tuple[Tensor, Tensor, Tensor]  # sources, pages, starts


def cache_of(num_pages: int, *, num_parts: int = 1, block_size: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random bytes as a cache, [num_pages, num_parts, block_size, width]."""
    generator = torch.Generator().manual_seed(num_pages)
    shape = (num_pages, num_parts, block_size, width * dtype.itemsize)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(dtype)


def last_pages(num_whole: int, counts: list[int], block_size: int, draw: random.Random) -> Move:
    """Prompts of so many whole pages each keep random entries in their own last pages, one for each count."""
    sources, pages = [], []
    for i, count in enumerate(counts):
        own = range(i * num_whole, (i + 1) * num_whole)
        kept = sorted(draw.sample(range(num_whole * block_size), count * block_size))
        sources += [own[0] * block_size + entry for entry in kept]
        pages += own[num_whole - count :]
    starts = torch.tensor([0, *counts]).cumsum(0)
    return torch.tensor(sources, dtype=torch.int64).view(-1, block_size), torch.tensor(pages, dtype=torch.int64), starts


def any_pages(num_pages: int, counts: list[int], block_size: int, draw: random.Random) -> Move:
    """Entries from anywhere, more than once, some skipped, into pages from anywhere."""
    total = sum(counts)
    sources = [[draw.randrange(-1, num_pages * block_size) for _ in range(block_size)] for _ in range(total)]
    pages = draw.sample(range(num_pages), total)
    starts = torch.tensor([0, *counts]).cumsum(0)
    return torch.tensor(sources, dtype=torch.int64).view(-1, block_size), torch.tensor(pages, dtype=torch.int64), starts


def moved(cache: Tensor, move: Move) -> Tensor:
    """What the cache must hold afterwards, entry by entry from a copy."""
    before, after, block_size = cache.clone(), cache.clone(), cache.shape[2]
    for row, page in zip(move[0].tolist(), move[1].tolist(), strict=True):
        for offset, slot in enumerate(row):
            if slot >= 0:
                after[page, :, offset] = before[slot // block_size, :, slot % block_size]
    return after


def check(function: Callable[..., Any], cache: Tensor, move: Move) -> None:
    expected = moved(cache, move)
    sources, pages, starts = move
    function(compact, cache, sources, pages, starts=starts)
    assert_same(cache.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, impl="reference", **kwargs)


SHAPES = [
    pytest.param(dtype, num_parts, block_size, width, id=f"{str(dtype)[6:]}-parts{num_parts}-B{block_size}-W{width}")
    for dtype, num_parts, block_size, width in [
        (torch.bfloat16, 1, 16, 256),
        (torch.bfloat16, 2, 16, 64),
        (torch.float16, 1, 32, 160),
        (torch.float32, 1, 16, 128),
        (torch.float8_e4m3fn, 1, 16, 256),
        (torch.float8_e5m2, 2, 16, 80),
        (torch.uint8, 1, 16, 37),  # rows of no whole word
        (torch.bfloat16, 1, 48, 64),  # no power of two
        (torch.bfloat16, 1, 128, 8),
        (torch.bfloat16, 1, 1, 2),
    ]
]


@pytest.mark.parametrize(("dtype", "num_parts", "block_size", "width"), SHAPES)
def test_bytes_arrive(run: Callable[..., Any], dtype: torch.dtype, num_parts: int, block_size: int, width: int) -> None:
    draw = random.Random(width)
    for move in (last_pages(7, [3, 0, 7, 1], block_size, draw), any_pages(28, [5, 0, 1, 11], block_size, draw)):
        for function in (run, reference):
            cache = cache_of(28, num_parts=num_parts, block_size=block_size, width=width, dtype=dtype)
            check(function, cache, move)


def strided_caches() -> Iterator[tuple[str, Tensor]]:
    """Pages 0 to 11 of 16 entries of 32 numbers among others, as engines lay them out."""
    whole = cache_of(40, block_size=16, width=64, dtype=torch.bfloat16)
    yield "halves of a row as two parts", whole[:12].view(12, 16, 2, 32).transpose(1, 2)
    yield "every third page", whole[1:36:3, :, :, 32:]
    yield "entries before pages", whole.view(40, 16, 1, 64)[:12, :, :, :32].permute(0, 2, 1, 3)
    yield "odd offset", whole.flatten()[1 : 1 + 12 * 16 * 33].view(12, 1, 16, 33)[..., :32]


@pytest.mark.parametrize(("name", "cache"), [pytest.param(*case, id=case[0]) for case in strided_caches()])
def test_strides_and_neighbours(run: Callable[..., Any], name: str, cache: Tensor) -> None:
    """What lies between the pages stays as it was."""
    storage = torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage())
    for function in (run, reference):
        move = any_pages(12, [2, 5], 16, random.Random(len(name)))
        whole, expected = storage.clone(), storage.clone()
        view, target = (t.as_strided(cache.shape, cache.stride(), cache.storage_offset()) for t in (whole, expected))
        target.copy_(moved(view, move))
        sources, pages, starts = move
        function(compact, view, sources, pages, starts=starts)
        assert_same(whole, expected)


moves = st.builds(
    lambda kind, counts, block_size, seed: (kind(8 * len(counts), counts, block_size, random.Random(seed)), block_size),
    st.just(any_pages),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**32),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves)
def test_any_overlap(run: Callable[..., Any], case: tuple[Move, int]) -> None:
    move, block_size = case
    num_pages = 8 * (len(move[2]) - 1)
    for function in (run, reference):
        check(function, cache_of(num_pages, block_size=block_size, width=2, dtype=torch.int16), move)


def interleaved(cache: Tensor, move: Move, group: int, draw: random.Random) -> Tensor:
    """The kernel's order of reads and writes, sequences in any order, as plain Python."""
    sources, pages, starts = move
    waits = must_wait(sources, pages, starts).tolist()
    cache, block_size, late = cache.clone(), cache.shape[2], []

    def write(page: int, rows: list[tuple[int, Tensor]]) -> None:
        for offset, entry in rows:
            cache[page, :, offset] = entry

    def sequence(start: int, end: int) -> Iterator[None]:
        for high in range(end, start, -group):
            now = range(max(start, high - group), high)
            read = {
                m: [(o, cache[s // block_size, :, s % block_size].clone()) for o, s in enumerate(row) if s >= 0]
                for m, row in ((m, sources[m].tolist()) for m in now)
            }
            yield
            for m in now:
                if waits[m]:
                    late.append((int(pages[m]), read[m]))
                else:
                    write(int(pages[m]), read[m])
                yield

    running = [sequence(start, end) for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
    while running:
        one = draw.choice(running)
        if next(one, "done") == "done":
            running.remove(one)
    for page, rows in late:
        write(page, rows)
    return cache


@settings(max_examples=150, deadline=None, derandomize=True)
@given(moves, st.integers(1, 4), st.integers(0, 2**32))
def test_pages_that_do_not_wait_are_safe_in_every_order(case: tuple[Move, int], group: int, seed: int) -> None:
    move, block_size = case
    cache = cache_of(8 * (len(move[2]) - 1), block_size=block_size, width=1, dtype=torch.int16)
    assert_same(interleaved(cache, move, group, random.Random(seed)), moved(cache, move))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from([1, 4, 16]), st.integers(0, 2**32))
def test_a_prompts_own_last_pages_never_wait(counts: list[int], block_size: int, seed: int) -> None:
    if sum(counts):
        assert not must_wait(*last_pages(6, counts, block_size, random.Random(seed))).any()


def test_what_waits() -> None:
    """A page read by another sequence, or by an earlier page of its own; not one that nobody or itself reads."""
    sources = torch.tensor([[8, 1], [2, 4], [7, -1], [5, 5]])
    pages, starts = torch.tensor([1, 4, 3, 6]), torch.tensor([0, 2, 4])
    assert must_wait(sources, pages, starts).tolist() == [False, True, False, False]
    assert must_wait(sources, pages, torch.tensor([0, 1, 4])).tolist() == [True, True, False, False]


def test_nothing_to_move(run: Callable[..., Any]) -> None:
    for move in (any_pages(4, [], 4, random.Random(0)), any_pages(4, [0, 0], 4, random.Random(0))):
        for function in (run, reference):
            check(function, cache_of(4, block_size=4, width=8, dtype=torch.bfloat16), move)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_pool_beyond_int32() -> None:
    """Pages whose first element lies past 2^31."""
    cache = torch.zeros(2**31 // 4096 + 8, 1, 16, 256, dtype=torch.float8_e4m3fn, device="cuda").view(torch.uint8)
    cache[-1] = torch.arange(16, dtype=torch.uint8, device="cuda").view(1, 16, 1)
    last = len(cache) - 1
    sources = torch.arange(last * 16, last * 16 + 16, device="cuda").flip(0).view(1, 16)
    pages, starts = torch.tensor([last - 1], device="cuda"), torch.tensor([0, 1], device="cuda")
    compact(cache, sources, pages, starts=starts)
    assert cache[-2, 0, :, 255].tolist() == list(range(15, -1, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": torch.zeros(3, 4, 8)}, r"cache must be \[num_pages, num_parts, block_size, width\]"),
        ({"cache": torch.zeros(3, 1, 4, 16)[..., ::2]}, r"strides \(64, 64, 16, 2\)"),
        ({"sources": torch.zeros(2, 3, dtype=torch.int64)}, r"sources must be \[2, 4\] int64; got \[2, 3\]"),
        ({"sources": torch.zeros(2, 4, dtype=torch.int32)}, r"got \[2, 4\] torch.int32"),
        ({"pages": torch.zeros(2, dtype=torch.int32)}, "pages and starts must be 1-D int64"),
        ({"starts": torch.zeros(2)}, "pages and starts must be 1-D int64"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "cache": torch.zeros(3, 1, 4, 8),
        "sources": torch.zeros(2, 4, dtype=torch.int64),
        "pages": torch.arange(2),
        "starts": torch.tensor([0, 2]),
    }
    with pytest.raises(ValueError, match=message):
        compact(**{**arguments, **change})


def call(dtype: torch.dtype, num_parts: int, block_size: int, width: int) -> None:
    """32 layers of 8 heads, 8192 tokens of which a tenth stays."""
    num_whole, count, num_sequences = 8192 // block_size, 8192 // block_size // 10, 256
    first = torch.arange(num_sequences).unsqueeze(1) * num_whole
    pages = (first + torch.arange(num_whole - count, num_whole)).flatten()
    sources = pages.unsqueeze(1) * block_size + torch.arange(block_size)
    cache = torch.empty(num_sequences * num_whole, num_parts, block_size, width, dtype=dtype)
    compact(cache, sources, pages, starts=torch.arange(num_sequences + 1) * count, impl="triton")


def call_of_one() -> None:
    """Triton makes constants of sizes and strides that are 1."""
    one = torch.zeros(1, dtype=torch.int64)
    compact(torch.zeros(1, 1, 1, 1), one.view(1, 1), one, starts=torch.tensor([0, 1]), impl="triton")


CALLS = {
    "one": call_of_one,
    "bf16": lambda: call(torch.bfloat16, 1, 16, 256),
    "fp8": lambda: call(torch.float8_e4m3fn, 1, 32, 128),
    "fp8-halves-D80": lambda: call(torch.float8_e4m3fn, 2, 16, 80),
    "fp32-B128": lambda: call(torch.float32, 1, 128, 256),
    "bytes": lambda: call(torch.uint8, 1, 16, 37),
}
