"""From a budget to a plan: whole pages, cuts that drop something, or no compression."""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from fastkv_vllm.cache.plan import PromptPlan


class LeftAlone(Enum):
    """Why a prompt is not compressed."""

    SHORT = "short"
    BUDGET_COVERS_PROMPT = "budget_covers_prompt"
    SESSION = "session"  # its prompt may still grow
    REQUESTED = "requested"  # the request wants no compression


def plan_prompt(
    draft: PromptPlan, *, num_kept: int, min_tokens: int, layers_keep_rows: bool = False, most_kept: int | None = None
) -> PromptPlan | LeftAlone:
    """Round a budget to whole pages.

    Blocks held after the prompt are ceil(num_kept / block_size), one of them the partial tail block if there is
    one, so that a request never holds a block more than its budget; entries kept are within block_size - 1 of
    num_kept. Only forced entries raise it: sinks, window and recent ones always find room.

    Args:
        draft: all of the plan but its pages, with the rows wished after each cut: they are raised to what stays, and
            cuts that drop none are left out.
        num_kept: budget per (layer, KV head), window included.
        min_tokens: prompts below this are left alone; more than window and residual.
        layers_keep_rows: each layer keeps rows that a cut leaves, all of them; num_kept is the mean over layers of
            the rows wished. Rows are then whole pages beside the tail, fewer rather than more, and the mean is what
            they may add up to.
        most_kept: budget that a guard may raise the other to, at least num_kept; not with layers_keep_rows. It decides
            what is given back at first, and how many rows go on. None: no guard.
    """
    if draft.num_tokens < min_tokens:
        return LeftAlone.SHORT
    size, tail = draft.block_size, draft.num_tail
    cuts, num_pages = draft.cuts, _pages_before_tail(draft, num_kept)
    fewest = draft.least_pages * size + tail
    if layers_keep_rows:
        raised = max([0, *(fewest - wished for _, wished in cuts)])
        num_pages = (num_kept + raised - tail) // size + 1
        cuts = tuple((layer, (wished - tail) // size * size + tail) for layer, wished in cuts)
    plan = replace(draft, num_pages=min(max(num_pages, draft.least_pages), draft.num_whole_blocks))
    if plan.num_freed_blocks <= 0:
        return LeftAlone.BUDGET_COVERS_PROMPT
    if most_kept is not None:
        most = min(max(_pages_before_tail(draft, most_kept), plan.num_pages), plan.num_whole_blocks)
        plan = replace(plan, num_pages=most, planned_pages=plan.num_pages)
    cuts = _cuts_that_drop(cuts, plan.num_tokens, fewest if layers_keep_rows else plan.num_kept)
    return replace(plan, cuts=cuts, cut_from=plan.cut_from if cuts else None)


def _pages_before_tail(draft: PromptPlan, num_kept: int) -> int:
    """Pages of a budget beside the blocks of the tail."""
    return -(-num_kept // draft.block_size) - -(-draft.num_tail // draft.block_size)


def _cuts_that_drop(wished: Sequence[tuple[int, int]], num_rows: int, least: int) -> tuple[tuple[int, int], ...]:
    """Layers and the rows that go on after them, of those after which there are fewer, and as many as must be."""
    effective = []
    for layer, rows in wished:
        if max(rows, least) < num_rows:
            num_rows = max(rows, least)
            effective.append((layer, num_rows))
    return tuple(effective)
