"""How an engine lays out the entries of a page: in rows, or as the CPU engine's own writer tells when asked."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from vllm import _custom_ops as ops

from fastkv_vllm.kernels.compact import compact

# vLLM's `--kv-cache-dtype` -> what the bytes of such a cache are.
FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_BASE = 8  # digits of this base are exact in every cache dtype, e5m2 with its three significant bits too
_DIGITS = 7


@dataclass(frozen=True)
class PageLayout(ABC):
    """Where entry t, element d of a page lies.

    A page of one layer and KV head is `2 * block_size * head_dim` numbers of a cache [blocks, H, block_size, 2 * D].

    Fields:
        block_size: entries per page.
        head_dim: elements per key or value.
        dtype: in which entries are read, the model's.
        cache_dtype: "auto", or a key of FLOAT8.
    """

    block_size: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: str

    @property
    def float8(self) -> torch.dtype | None:
        """Of the bytes that are stored, a key being what is read times the layer's scale; None: the model's dtype."""
        return FLOAT8.get(self.cache_dtype)

    def _readable(self, entries: torch.Tensor) -> torch.Tensor:
        """Entries as they are stored, in the model's dtype."""
        return entries if self.float8 is None else entries.view(self.float8).to(self.dtype)

    def read_keys(self, kv_cache: torch.Tensor, blocks: torch.Tensor, num_entries: int) -> torch.Tensor:
        """The first `num_entries` keys stored in `blocks`, [H, num_entries, D], of the model's dtype.

        See `read_values` for the values.

        Args:
            kv_cache: one layer's cache, [num_blocks, H, block_size, 2 * D].
            blocks: block ids in order, [B] int64.
            num_entries: at most B * block_size.
        """
        return self._first(kv_cache, 0, blocks, num_entries)

    def read_values(self, kv_cache: torch.Tensor, blocks: torch.Tensor, num_entries: int) -> torch.Tensor:
        """The first `num_entries` values stored in `blocks`, [H, num_entries, D]; arguments as for `read_keys`."""
        return self._first(kv_cache, 1, blocks, num_entries)

    @abstractmethod
    def take(
        self, kv_cache: torch.Tensor, pages: torch.Tensor, within: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of entries by page as they are stored, each [..., D].

        Args:
            kv_cache: [num_blocks, H, block_size, 2 * D]; page block * H + head.
            pages, within: page, and entry number within it, of each, [...] int64.
        """

    @abstractmethod
    def write(self, kv_cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store entries at slots, all heads at the same ones.

        Args:
            kv_cache: one layer's cache, [num_blocks, H, block_size, 2 * D]; changed in place.
            keys, values: as they are stored, [K, H, D].
            slots: [K] int64, block id * block_size + offset.
        """

    @abstractmethod
    def move(self, cache: torch.Tensor, sources: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor) -> None:
        """Fill pages with entries from anywhere in the pool, bytes as they are; see `kernels.compact`.

        Args:
            cache: all pages, [num_pages, 1, block_size, 2 * D]; changed in place.
            sources: slots they come from, page * block_size + offset, [M, block_size] int64; -1: what is there stays.
            pages: to fill, [M] int64, each at most once.
            starts: first of the pages of each sequence and their number, [sequences + 1] int64.
        """

    @abstractmethod
    def _read(self, kv_cache: torch.Tensor, part: int, blocks: torch.Tensor) -> torch.Tensor:
        """Keys (part 0) or values of whole blocks, [B, H, block_size, D]."""

    def _first(self, kv_cache: torch.Tensor, part: int, blocks: torch.Tensor, num_entries: int) -> torch.Tensor:
        entries = self._read(kv_cache, part, blocks[: -(-num_entries // self.block_size)])
        return entries.transpose(0, 1).reshape(kv_cache.shape[1], -1, self.head_dim)[:, :num_entries]


@dataclass(frozen=True)
class RowLayout(PageLayout):
    """An entry is a row, its key before its value: vLLM's backends for GPUs."""

    def take(
        self, kv_cache: torch.Tensor, pages: torch.Tensor, within: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._rows(kv_cache)[pages, within].split(self.head_dim, dim=-1)
        return keys, values

    def write(self, kv_cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        num_heads = kv_cache.shape[1]
        heads = torch.arange(num_heads, device=slots.device)
        pages = (slots // self.block_size).unsqueeze(1) * num_heads + heads
        self._rows(kv_cache)[pages, (slots % self.block_size).unsqueeze(1)] = torch.cat([keys, values], dim=-1)

    def move(self, cache: torch.Tensor, sources: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor) -> None:
        compact(cache, sources, pages, starts=starts)

    def _rows(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """Entries of all pages, [pages, block_size, 2 * D]; a view."""
        return kv_cache.view(-1, self.block_size, 2 * self.head_dim)

    def _read(self, kv_cache: torch.Tensor, part: int, blocks: torch.Tensor) -> torch.Tensor:
        return self._readable(kv_cache[..., part * self.head_dim : (part + 1) * self.head_dim][blocks])


@dataclass(frozen=True)
class ProbedLayout(PageLayout):
    """Keys of a page before its values: the CPU engine.

    Inside each half the order depends on the instruction set vLLM chose ("vec" stores keys transposed, "amx" in tiles),
    so it is not coded here: `probe` writes numbered entries through vLLM's own op and reads where they went.

    Fields:
        isa: vLLM's name of the layout.
        key_offsets, value_offsets: offsets inside a half, [block_size * head_dim] int64, entry-major.
    """

    isa: str
    key_offsets: torch.Tensor
    value_offsets: torch.Tensor

    @classmethod
    def probe(
        cls, *, block_size: int, head_dim: int, dtype: torch.dtype, isa: str, cache_dtype: str = "auto"
    ) -> "ProbedLayout":
        """Layout of pages of this shape; fields of the class.

        Raises:
            RuntimeError: the op does not store each element once; this build of vLLM is not understood.
        """
        size = block_size * head_dim
        ids = torch.arange(size)
        found = torch.zeros(2, size, dtype=torch.int64)
        float8 = FLOAT8.get(cache_dtype)
        for power in range(_DIGITS):
            digit = ((ids // _BASE**power) % _BASE).to(dtype).view(block_size, 1, head_dim)
            page = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=torch.uint8 if float8 else dtype)
            key_cache, value_cache = page.chunk(2, dim=2)
            slots = torch.arange(block_size)
            ops.cpu_attn_reshape_and_cache(digit, digit, key_cache, value_cache, slots, isa, kv_cache_dtype=cache_dtype)
            found += page.view(float8 or dtype).view(2, size).float().to(torch.int64) * _BASE**power
        if not all(torch.equal(half.sort().values, ids) for half in found):
            raise RuntimeError(f"the cache layout {isa!r} of this vLLM does not store each element exactly once")
        return cls(block_size, head_dim, dtype, cache_dtype, isa, *(half.argsort() for half in found))

    def _read(self, kv_cache: torch.Tensor, part: int, blocks: torch.Tensor) -> torch.Tensor:
        num_blocks, num_heads = kv_cache.shape[:2]
        halves = kv_cache.view(num_blocks, num_heads, 2, -1)[blocks, :, part]  # [B, H, block_size * D]
        shape = (len(blocks), num_heads, self.block_size, self.head_dim)
        strides = self._strides[part]
        if strides is None:
            entries = halves[..., (self.key_offsets, self.value_offsets)[part]].view(shape)
        else:
            entries = halves.as_strided(shape, (*halves.stride()[:2], *strides))
        return self._readable(entries)

    @cached_property
    def _strides(self) -> list[tuple[int, int] | None]:
        """Of keys and values: steps from entry to entry and from element to element, where all are equal.

        A view is 5x faster than an index.
        """
        found: list[tuple[int, int] | None] = []
        for half in (self.key_offsets, self.value_offsets):
            offsets = half.view(self.block_size, self.head_dim)
            entry, element = int(offsets[1, 0]), int(offsets[0, 1])
            grid = torch.arange(self.block_size).unsqueeze(1) * entry + torch.arange(self.head_dim) * element
            found.append((entry, element) if torch.equal(offsets, grid) else None)
        return found

    def take(
        self, kv_cache: torch.Tensor, pages: torch.Tensor, within: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = kv_cache.view(kv_cache.shape[0] * kv_cache.shape[1], 2, -1)
        pages = pages.unsqueeze(-1)
        keys = flat[pages, 0, self.key_offsets.view(self.block_size, -1)[within]]
        values = flat[pages, 1, self.value_offsets.view(self.block_size, -1)[within]]
        return keys, values

    def write(self, kv_cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        num_blocks, num_heads, block_size, _ = kv_cache.shape
        if self.float8 is None:
            key_cache, value_cache = kv_cache.view(num_blocks, num_heads, 2 * block_size, -1).chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, self.isa)
            return
        flat, within = kv_cache.view(num_blocks * num_heads, 2, -1), slots % block_size
        pages = (slots // block_size * num_heads).unsqueeze(1) + torch.arange(num_heads)
        for half, (entries, offsets) in enumerate(((keys, self.key_offsets), (values, self.value_offsets))):
            flat[pages.unsqueeze(2), half, offsets.view(block_size, -1)[within].unsqueeze(1)] = entries

    def move(self, cache: torch.Tensor, sources: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor) -> None:
        page, offset = (sources >= 0).nonzero(as_tuple=True)
        slots = sources[page, offset]
        keys, values = self.take(cache, slots // self.block_size, slots % self.block_size)
        self.write(cache, keys.unsqueeze(1), values.unsqueeze(1), pages[page] * self.block_size + offset)
