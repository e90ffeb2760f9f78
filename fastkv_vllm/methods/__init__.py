"""Compression methods, one file each; importing this package fills the registry."""

from fastkv_vllm.methods.adakv import AdaKV
from fastkv_vllm.methods.base import Method
from fastkv_vllm.methods.budgets import HEAD_BUDGETS, LAYER_BUDGETS, UNIFORM, Allocator, BudgetOptions
from fastkv_vllm.methods.fastkv import FastKV
from fastkv_vllm.methods.pyramidkv import PyramidKV
from fastkv_vllm.methods.registry import method_class, method_names, register
from fastkv_vllm.methods.snapkv import SnapKV
from fastkv_vllm.methods.streamingllm import StreamingLLM

__all__ = [
    "HEAD_BUDGETS",
    "LAYER_BUDGETS",
    "UNIFORM",
    "AdaKV",
    "Allocator",
    "BudgetOptions",
    "FastKV",
    "Method",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "method_class",
    "method_names",
    "register",
]
