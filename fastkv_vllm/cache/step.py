"""What the scheduler tells the workers of one engine step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastkv_vllm.cache.plan import PromptPlan


@dataclass(frozen=True)
class StepPlan:
    """Orders of one engine step, from the scheduler to the workers.

    Fields:
        prefills: requests of this step whose prompt was unfinished before it.
        destinations: requests that finish their prompt in this step -> ids of the blocks that take their kept pages.
        null_blocks: requests of this step that hold compressed pages from an earlier one -> leading null blocks of
            their table.
        streaming: requests that let go of entries in this step and whose prompt goes on -> ids of the blocks that hold
            the others.
        partial: requests whose prompt is unfinished after this step; workers forget all others' prefill state.
        compressed: requests that hold compressed pages after this step; workers forget all others' page tables.
        evicting: requests compressed in an earlier step whose last block is full after this one: it is given back.
        encoding: requests compressed in an earlier step of which another block lies before the residual window after
            this one: it is encoded, and given back or, where true, a place for codes.
        renumbered: requests compressed in an earlier step whose prompt was read again: their rows follow the short one,
            at positions as much lower as the null blocks have slots.
    """

    prefills: Mapping[str, PromptPlan]
    destinations: Mapping[str, list[int]]
    streaming: Mapping[str, list[int]]
    null_blocks: Mapping[str, int]
    partial: frozenset[str]
    compressed: frozenset[str]
    evicting: frozenset[str] = frozenset()
    encoding: Mapping[str, bool] = field(default_factory=dict)
    renumbered: frozenset[str] = frozenset()
