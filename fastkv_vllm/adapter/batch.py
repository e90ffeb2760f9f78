"""One engine step as the compressing attention sees it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastkv_vllm.adapter.merged import Held
from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.adapter.ragged import HeadPages
from fastkv_vllm.adapter.reads import HeadReads
from fastkv_vllm.adapter.recipe import Recipe
from fastkv_vllm.adapter.revival import RevivalStep
from fastkv_vllm.cache import PromptPlan


@dataclass(frozen=True)
class PrefillRows:
    """The rows of one request with an unfinished prompt, in the batch of one kind of layers.

    Fields:
        request_id: whose they are.
        plan: what will stay of its prompt.
        recipe: how that is chosen.
        first: number of the first row in the batch.
        count: rows.
        start: entries of the prompt cached before these rows; 0 where the layer sees all entries at once.
        blocks: ids of the prompt's blocks so far, in order, [B] int64; all ceil(P / block_size) where it ends. Those
            before the last stop do not tell what they hold.
        destination: ids of the blocks that take the kept pages; None: the prompt goes on after this step.
        held: pages it holds since a stop before these rows; None: `blocks` hold all.
        streaming: ids of the blocks that hold what heads do not let go of after this step; None: it takes the prompt to
            no stop within it.
        positions: of rows chosen at a cut, ascending, [count] int64; None: the prompt's own sequence.
        tokens: ids of the prompt's tokens, [P] int64, where some are read again.
    """

    request_id: str
    plan: PromptPlan
    recipe: Recipe
    first: int
    count: int
    start: int
    blocks: torch.Tensor
    destination: list[int] | None
    held: HeadPages | None = None
    streaming: list[int] | None = None
    positions: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def seen(self) -> torch.Tensor:
        """Positions of the entries that these rows' layers see once the prompt has ended, [n] int64."""
        return torch.arange(self.plan.num_tokens) if self.positions is None else self.positions


@dataclass(frozen=True)
class DecodeRows:
    """The rows of one compressed request whose entries are evicted while decoding, in the batch of some layers.

    Fields:
        request_id: whose they are.
        first: number of the first row in the batch.
        count: rows, all of one block.
        block: id of that block.
        num_filled: entries in it, these rows' among them.
        evicts: the block is full and given back after this step: what stays is chosen now.
    """

    request_id: str
    first: int
    count: int
    block: int
    num_filled: int
    evicts: bool

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class LayerRows:
    """The rows of all requests of a step in one layer, whose attention has run.

    Fields:
        layer: its index.
        scale: of the products of queries and keys as they are read: the softmax scale, times that of stored keys.
        query: [T, Hq, D]; key, value: [T, H, D]: roped.
        kv_cache: the layer's cache, [num_blocks, H, block_size, 2 * D], with these rows written.
        layout: of its pages.
    """

    layer: int
    scale: float
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    layout: PageLayout

    @property
    def num_heads(self) -> int:
        """KV heads of the layer."""
        return self.kv_cache.shape[1]

    def keys(self, prefill: PrefillRows) -> torch.Tensor:
        """Keys of all entries of a prompt so far, [H, n, D]; those of eight bits as the cache has them."""
        if not prefill.start and self.layout.float8 is None:
            return self.key[prefill.rows].transpose(0, 1)
        return self.layout.read_keys(self.kv_cache, prefill.blocks, prefill.start + prefill.count)

    def values(self, prefill: PrefillRows) -> torch.Tensor:
        """Values of the same, [H, n, D]."""
        if not prefill.start and self.layout.float8 is None:
            return self.value[prefill.rows].transpose(0, 1)
        return self.layout.read_values(self.kv_cache, prefill.blocks, prefill.start + prefill.count)


@dataclass(frozen=True)
class Batch:
    """What the metadata of a step must know beside vLLM's own.

    Fields:
        prefills: requests with an unfinished prompt.
        decodes: compressed requests whose entries are rated in this step.
        null_blocks: row of the block table -> leading null blocks of a request compressed evenly.
        held: row of the block table -> pages of a request compressed unevenly or encoded; it is not read through that
            table.
        block_size: tokens per block.
        revival: of the requests in `held` whose rows may come back, if there are any.
        in_graph: a captured graph runs the step: each request decodes one token and is in `held`.
    """

    prefills: tuple[PrefillRows, ...]
    decodes: tuple[DecodeRows, ...]
    null_blocks: dict[int, int]
    held: dict[int, Held]
    block_size: int
    revival: RevivalStep | None = None
    in_graph: bool = False

    def read_view(self, common: Any) -> Any:
        """The same metadata with the null blocks of compressed requests cut off.

        Reads of a compressed request start at its kept pages; writes keep their slots, which vLLM computed from the
        true table.

        Args:
            common: vLLM's CommonAttentionMetadata; not changed.
        """
        if not self.null_blocks:
            return common
        common = copy.copy(common)
        common.block_table_tensor = common.block_table_tensor.clone()
        common.seq_lens = common.seq_lens.clone()
        common.seq_lens_cpu_upper_bound = common.seq_lens_cpu_upper_bound.clone()
        for row, count in self.null_blocks.items():
            table = common.block_table_tensor[row]
            table[:-count] = table[count:].clone()
            for lengths in (common.seq_lens, common.seq_lens_cpu_upper_bound):
                lengths[row] -= count * self.block_size
        common.max_seq_len = int(common.seq_lens_cpu_upper_bound.max())
        return common


def take_requests(common: Any, requests: Sequence[int], counts: Sequence[int]) -> Any:
    """Metadata of some of a batch's requests, in the order given, with so many rows each.

    Slots and positions stay those of the whole batch.

    Args:
        common: vLLM's CommonAttentionMetadata; not changed.
        requests: their numbers in the batch.
        counts: rows of each.
    """
    part = copy.copy(common)
    rows, index = torch.tensor(counts, dtype=torch.int32, device="cpu"), torch.tensor(requests, device="cpu")
    part.query_start_loc_cpu = torch.nn.functional.pad(rows.cumsum(0, dtype=torch.int32), (1, 0))
    part.query_start_loc = part.query_start_loc_cpu.to(common.seq_lens.device)
    part.seq_lens = common.seq_lens[index]
    part.seq_lens_cpu_upper_bound = common.seq_lens_cpu_upper_bound[index]
    part.block_table_tensor = common.block_table_tensor[index]
    part.num_reqs, part.num_actual_tokens = len(requests), int(rows.sum())
    part.max_query_len, part.max_seq_len = int(rows.max()), int(part.seq_lens_cpu_upper_bound.max())
    return part


def take_sequences(common: Any, reads: HeadReads) -> Any:
    """Metadata of sequences that are one (request, KV head) each; tables and lengths of a layer are to be filled in.

    Args:
        common: vLLM's CommonAttentionMetadata of the batch; not changed.
        reads: of its requests, or of some.
    """
    part = copy.copy(common)
    part.query_start_loc, part.query_start_loc_cpu = reads.query_start, reads.host_query_start
    part.num_reqs, part.num_actual_tokens = len(reads.host_query_start) - 1, int(reads.host_query_start[-1])
    part.max_query_len, part.max_seq_len = max(r.count for r in reads.rows), int(reads.host_seq_lens.max())
    return part
