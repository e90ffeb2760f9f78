"""Bookkeeping in plain Python: what stays of a prompt, what a step does, and that no block is lost."""

from fastkv_vllm.cache.budgets import share_pages
from fastkv_vllm.cache.fitting import LeftAlone, plan_prompt
from fastkv_vllm.cache.integrity import check_integrity
from fastkv_vllm.cache.plan import PromptPlan
from fastkv_vllm.cache.step import StepPlan
from fastkv_vllm.cache.streaming import Streaming

__all__ = ["LeftAlone", "PromptPlan", "StepPlan", "Streaming", "check_integrity", "plan_prompt", "share_pages"]
