"""Compression methods, one file each; importing this package fills the registry."""

from fastkv_vllm.methods.a2sf import A2SF
from fastkv_vllm.methods.adakv import AdaKV
from fastkv_vllm.methods.asl import ASL
from fastkv_vllm.methods.base import Method, add_heads
from fastkv_vllm.methods.budgets import (
    CUT_BUDGETS,
    HEAD_BUDGETS,
    LAYER_BUDGETS,
    MODEL_BUDGETS,
    UNIFORM,
    Allocator,
    BudgetOptions,
)
from fastkv_vllm.methods.dbudgetkv import DBudgetKV
from fastkv_vllm.methods.density import DENSITY, density
from fastkv_vllm.methods.duoattention import DuoAttention
from fastkv_vllm.methods.fastkv import FastKV
from fastkv_vllm.methods.gemfilter import GemFilter
from fastkv_vllm.methods.guard import attention_mass, guarded_pages, recall_by_pages
from fastkv_vllm.methods.h2o import H2O
from fastkv_vllm.methods.halting import halting_pages, kept_norms, last_attention
from fastkv_vllm.methods.headkv import HeadKV
from fastkv_vllm.methods.kivi import KIVI
from fastkv_vllm.methods.kvsharer import KVSharer
from fastkv_vllm.methods.lazyllm import LazyLLM
from fastkv_vllm.methods.minicache import MiniCache
from fastkv_vllm.methods.pyramidinfer import PyramidInfer
from fastkv_vllm.methods.pyramidkv import PyramidKV
from fastkv_vllm.methods.quantspec import QuantSpec
from fastkv_vllm.methods.registry import method_class, method_names, register
from fastkv_vllm.methods.settling import OBSERVED, RankWatch
from fastkv_vllm.methods.skvq import SKVQ
from fastkv_vllm.methods.snapkv import SnapKV
from fastkv_vllm.methods.streamingllm import StreamingLLM
from fastkv_vllm.methods.think import ThinK
from fastkv_vllm.methods.tova import TOVA
from fastkv_vllm.methods.vatp import VATP
from fastkv_vllm.methods.vl_cache import VLCache

__all__ = [
    "A2SF",
    "ASL",
    "CUT_BUDGETS",
    "DENSITY",
    "H2O",
    "HEAD_BUDGETS",
    "KIVI",
    "LAYER_BUDGETS",
    "MODEL_BUDGETS",
    "OBSERVED",
    "SKVQ",
    "TOVA",
    "UNIFORM",
    "VATP",
    "AdaKV",
    "Allocator",
    "BudgetOptions",
    "DBudgetKV",
    "DuoAttention",
    "FastKV",
    "GemFilter",
    "HeadKV",
    "KVSharer",
    "LazyLLM",
    "Method",
    "MiniCache",
    "PyramidInfer",
    "PyramidKV",
    "QuantSpec",
    "RankWatch",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "VLCache",
    "add_heads",
    "attention_mass",
    "density",
    "guarded_pages",
    "halting_pages",
    "kept_norms",
    "last_attention",
    "method_class",
    "method_names",
    "recall_by_pages",
    "register",
]
