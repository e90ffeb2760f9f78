"""A configuration made into the objects that carry it out."""

from dataclasses import dataclass
from functools import lru_cache

from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import Allocator, Method


@dataclass(frozen=True)
class Recipe:
    """How the prompt of a request is compressed.

    Fields:
        config: of the request, filled in for the model.
        method: rates its entries.
        allocator: shares its budget.
    """

    config: CompressionConfig
    method: Method
    allocator: Allocator

    @property
    def needs(self) -> tuple[str, ...]:
        """What is needed of a layer: the inputs of `score`, queries to choose channels by, and the guard's."""
        own = ("queries",) if self.config.drops_channels else ()
        guards = ("queries", "keys") if self.config.min_attention_recall is not None else ()
        return tuple(dict.fromkeys((*self.method.needs, *own, *guards)))


@lru_cache(maxsize=128)
def recipe_of(config: CompressionConfig) -> Recipe:
    """The recipe of a configuration; equal configurations share one."""
    return Recipe(config, config.make_method(), config.make_allocator())
