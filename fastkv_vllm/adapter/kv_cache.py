"""KV-cache specification and block manager of compressible layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from fastkv_vllm.cache import PromptPlan, check_integrity


@dataclass(frozen=True, kw_only=True)
class CompressibleSpec(FullAttentionSpec):
    """Full attention whose requests may hold null blocks; no field of its own, since `merge` would lose it."""


class CompressingManager(FullAttentionManager):
    """vLLM's full-attention manager plus three acts: give back surplus blocks at a prompt's stops, later
    full ones, later ones that are encoded.

    Positions never shift: freed prompt blocks become null blocks in the request's table, followed by the blocks
    that hold the kept pages, so all of vLLM's block arithmetic stays true.

    With prefix caching the kept pages go to fresh blocks, the originals keep their hashes. Room for them is certain:
    allocation leaves free what the prompts that come to a stop in this step still need (`_reserved_blocks`). From its
    first stop on no block of a request is hashed or shared.

    State per request, dropped whenever its blocks are popped (finish, abort, preemption): `plans`, `stopping` (the stop
    of its prompt up to which it is allocated and not yet compressed), `null_blocks` (holds compressed pages), `ended`
    (its whole prompt is compressed), `unsettled` (ended in a step whose worker has not told yet how many of the blocks
    its kept pages needed), `stashing` (rows are held of it: it waits between chunks, or they may come back).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, PromptPlan] = {}
        self.stopping: dict[str, int] = {}
        self.ended: set[str] = set()
        self.stashing: set[str] = set()
        self.null_blocks: dict[str, int] = {}
        self.unsettled: dict[str, list[int]] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        plan = self.plans.get(request_id)
        if apply_admission_cap and plan is not None:
            # A resumed request needs its whole prompt or its compressed prompt plus answer, never both at once.
            num_tokens = plan.peak_tokens(num_tokens)
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )
        return needed + self._reserved_blocks(request_id, num_tokens, new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        plan = self.plans.get(request_id)
        if plan is not None and request_id not in self.ended:
            stop = plan.stop_at(num_tokens)
            if stop is not None:
                self.stopping[request_id] = stop
            if plan.has_stash and (plan.revives or stop is None):
                self.stashing.add(request_id)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # The table of a compressed request no longer says what its blocks hold.
        if request.request_id not in self.null_blocks:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.plans.pop(request_id, None)
        self.stopping.pop(request_id, None)
        self.ended.discard(request_id)
        self.stashing.discard(request_id)
        self.null_blocks.pop(request_id, None)
        self.unsettled.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]

    def compress(self, stops: Mapping[str, int]) -> dict[str, list[int]]:
        """Give the surplus blocks of requests whose prompt this step takes to a stop back to the pool.

        The step that does must be the one being scheduled: workers run steps in order, and within a layer they read all
        sources of a step before they write its destinations.

        Args:
            stops: request -> its prompt's tokens read after the step; all of them, or a stop within.

        Returns:
            Request -> ids of the blocks that take its kept pages, in order.
        """
        wholes = {rid: self.req_to_blocks[rid][: self.plans[rid].num_whole_blocks_at(n)] for rid, n in stops.items()}
        moving = [rid for rid in stops if self.enable_caching and rid not in self.null_blocks]
        for rid in moving:
            self.block_pool.free_blocks(reversed(wholes[rid]))
        destinations = {}
        for rid, stop in stops.items():
            plan, whole = self.plans[rid], wholes[rid]
            num_kept = plan.num_blocks_at(stop)
            if rid in moving:
                kept = self.block_pool.get_new_blocks(num_kept)
            else:
                own = whole[self.null_blocks.get(rid, 0) :]
                kept = own[len(own) - num_kept :]
                self.block_pool.free_blocks(reversed(own[: len(own) - num_kept]))
            self.null_blocks[rid] = len(whole) - num_kept
            self.req_to_blocks[rid][: len(whole)] = [self._null_block] * self.null_blocks[rid] + kept
            self.stopping.pop(rid, None)
            if not plan.revives:
                self.stashing.discard(rid)
            destinations[rid] = [block.block_id for block in kept]
            if stop == plan.num_tokens:
                self.ended.add(rid)
                self.unsettled[rid] = destinations[rid]
        return destinations

    def settle(self, request_id: str, destination: list[int], surplus: int) -> int:
        """Give back the leading blocks of a destination that its step's kept pages did not need.

        A later step may be in flight, scheduled when the blocks still were the request's. It does not touch them: the
        request's pages are read where the worker has put them, not through its table, new entries go to blocks after
        the prompt's, and a step that takes the blocks for another request runs after it.

        Args:
            request_id: whose prompt ended.
            destination: what `compress` returned for that step: the very list, so that a request preempted, finished
                or compressed anew since then, whose blocks went back as a whole, is not mistaken for it.
            surplus: blocks.

        Returns:
            Blocks that went back.
        """
        if self.unsettled.get(request_id) is not destination:
            return 0
        del self.unsettled[request_id]
        table, first = self.req_to_blocks[request_id], self.null_blocks[request_id]
        self.block_pool.free_blocks(reversed(table[first : first + surplus]))
        table[first : first + surplus] = [self._null_block] * surplus
        self.null_blocks[request_id] += surplus
        return surplus

    def evict(self, request_ids: Iterable[str]) -> None:
        """Give back the last block of compressed requests, full after the step being scheduled, one null block more.

        Its worker reads the block's entries before any other step, or another request's kept pages, can overwrite them.
        """
        for rid in request_ids:
            table = self.req_to_blocks[rid]
            self.block_pool.free_blocks([table.pop()])
            table.insert(0, self._null_block)
            self.null_blocks[rid] += 1

    def encode(self, num_tokens: Mapping[str, int]) -> dict[str, bool]:
        """Take the block that has just left the residual window from compressed requests with so many tokens.

        It goes back, one null block more, or stays as a place for codes. One that other requests may read, as they may
        whole blocks of the prompt, never stays: room for its codes was kept.

        Returns:
            Request -> whether the block stays.
        """
        stays = {}
        for rid, n in num_tokens.items():
            plan, table = self.plans[rid], self.req_to_blocks[rid]
            stays[rid] = plan.num_code_blocks(n) > plan.num_code_blocks(n - self.block_size)
            if not stays[rid]:
                self.block_pool.free_blocks([table.pop(plan.num_encoded_blocks(n) - 1)])
                table.insert(0, self._null_block)
                self.null_blocks[rid] += 1
        return stays

    def num_stash_rows(self) -> int:
        """Residual rows that workers hold, or will when these prompts have ended."""
        return sum(self.plans[rid].num_stash_rows for rid in self.stashing)

    def check_idle(self) -> None:
        """Without requests all blocks are free and nothing is remembered; constant time.

        Raises:
            RuntimeError: a block was lost or a request's state was left behind.
        """
        free, total = self.block_pool.get_num_free_blocks(), self.block_pool.num_gpu_blocks - 1
        left = [*self.plans, *self.stopping, *self.stashing, *self.null_blocks, *self.ended, *self.unsettled]
        if free != total or left:
            raise RuntimeError(f"block pool integrity: idle with {free} of {total} blocks free and state of {left}")

    def check_integrity(self) -> None:
        """Raise RuntimeError where blocks are lost, held twice or shared against the rules."""
        pool = self.block_pool
        real = [block for block in pool.blocks if not block.is_null]
        check_integrity(
            num_blocks=len(pool.blocks),
            null_block=pool.null_block.block_id,
            free=[block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
            ref_counts={block.block_id: block.ref_cnt for block in real},
            tables={rid: [block.block_id for block in blocks] for rid, blocks in self.req_to_blocks.items()},
            hashed=[block.block_id for block in real if block.block_hash is not None],
            private={rid: [block.block_id for block in self._private_blocks(rid)] for rid in self.null_blocks},
        )

    def _private_blocks(self, request_id: str) -> list[KVCacheBlock]:
        """Blocks of a compressed request that no other may read.

        Whole blocks of its tail may be hashed and shared: nobody writes them again.
        """
        table, nulls = self.req_to_blocks[request_id], self.null_blocks[request_id]
        if request_id not in self.ended:
            return table[nulls:]
        plan = self.plans[request_id]
        num_whole = nulls + plan.num_stored_blocks if plan.encodes else plan.num_whole_blocks
        whole, shared = (max(nulls, n) for n in (num_whole, plan.num_tokens // plan.block_size))
        return table[nulls:whole] + table[shared:]

    def _reserved_blocks(self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock]) -> int:
        """Free blocks an allocation must leave for prompts that come to a stop in this step (prefix caching only).

        Each needs fresh blocks for the pages that stay and gives back those prompt blocks that no other request holds.
        A hit in `new_computed_blocks` makes a block shared, so a sibling that would take a stopping prompt's way out
        waits. After its first stop all blocks of a request are its own, and it needs none.
        """
        if not self.enable_caching:
            return 0
        stopping = dict(self.stopping)
        plan = self.plans.get(request_id)
        stop = None if plan is None else plan.stop_at(num_tokens)
        if stop is not None:
            stopping[request_id] = stop
        hit = {block.block_id for block in new_computed_blocks}
        balance = 0
        for rid, stop in stopping.items():
            if rid in self.null_blocks:
                continue
            num_whole = self.plans[rid].num_whole_blocks_at(stop)
            whole = self.req_to_blocks.get(rid, [])[:num_whole]
            returned = sum(block.ref_cnt == 1 and block.block_id not in hit for block in whole)
            if rid == request_id:
                returned += num_whole - len(whole) - len(new_computed_blocks)
                returned += sum(block.ref_cnt == 0 for block in new_computed_blocks)
            balance += self.plans[rid].num_blocks_at(stop) - returned
        return max(balance, 0)


KVCacheSpecRegistry._ensure_registered()  # a registry that is not empty never gets vLLM's own specs
KVCacheSpecRegistry.register(CompressibleSpec, CompressingManager, uniform_type_base_spec=FullAttentionSpec)
