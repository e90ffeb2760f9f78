"""The configuration tree: built once from one mapping, checked, frozen."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

from fastkv_vllm.cache import LeftAlone, PromptPlan, plan_prompt
from fastkv_vllm.kernels.window_scores import POOLINGS
from fastkv_vllm.methods import (
    HEAD_BUDGETS,
    LAYER_BUDGETS,
    UNIFORM,
    Allocator,
    BudgetOptions,
    Method,
    method_class,
)


@dataclass(frozen=True)
class CompressionConfig:
    """What `--kv-compression NAME --kv-compression-config JSON` says.

    Fields (defaults are those of FastKV v3, arXiv 2502.01068):
        method: registered name.
        retention_ratio: share of a prompt's entries kept per layer and KV head, (0, 1]; 1.0 = off.
        budget: entries kept per layer and KV head, instead of retention_ratio.
        tsp_layer: last layer that sees the whole prompt, 0-based; None: num_layers // 2 - 1, which is the value
            published for Llama-3.1-8B (15), Ministral-8B (17) and Mistral-Nemo-12B (19). Several, rising: rows are
            cut after each.
        tsp_ratio: share of a prompt's rows that go on after it, (0, 1]; 1.0 = no TSP; None: 0.2 where the method
            propagates, retention_ratio if that is more. One for each layer where tsp_layer has several.
        tsp_tokens: rows that go on, instead of tsp_ratio.
        window_size: last prompt tokens whose queries vote and that always stay.
        num_sink: first tokens that always stay; None: the method's own default.
        kernel_size: width of the pooling over positions, odd.
        pooling: "max" (FastKV v3) or "avg" (v1, v2).
        layer_budgets: how layers share the budget, "uniform" or "pyramid"; None: the method's own.
        head_budgets: how the KV heads of a layer share its budget, "uniform" or "adaptive"; None: the method's own.
        pyramid_beta: steepness of the pyramid: the last layer has a beta-th of the even budget.
        head_floor: share of the even budget each head has of its own under "adaptive", [0, 1].
        min_tokens: prompts below this are left alone.
        max_tsp_tokens: most prompt tokens whose residual rows wait for their last chunk, over all requests; prompts
            wait for their turn beyond it; None: the model's maximum length.
    """

    method: str
    retention_ratio: float | None = None
    budget: int | None = None
    tsp_layer: int | tuple[int, ...] | None = None
    tsp_ratio: float | tuple[float, ...] | None = None
    tsp_tokens: int | tuple[int, ...] | None = None
    window_size: int = 8
    num_sink: int | None = None
    kernel_size: int = 7
    pooling: str = "max"
    layer_budgets: str | None = None
    head_budgets: str | None = None
    pyramid_beta: int = 20
    head_floor: float = 0.2
    min_tokens: int = 512
    max_tsp_tokens: int | None = None

    def __post_init__(self) -> None:
        cls = method_class(self.method)
        _only_one(self, "retention_ratio", "budget")
        _only_one(self, "tsp_ratio", "tsp_tokens")
        _check(self.retention_ratio is None or _is_share(self.retention_ratio), "retention_ratio", "in (0, 1]", self)
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            allowed = _is_int(value) and value >= low
            _check(allowed or (value is None and name in _OPTIONAL), name, f"an integer >= {low}", self)
        _check(self.kernel_size % 2 == 1, "kernel_size", "odd", self)
        _check(self.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}", self)
        _check(self.min_tokens > self.window_size, "min_tokens", f"more than window_size = {self.window_size}", self)
        if not cls.propagates:
            for name in ("tsp_layer", "tsp_ratio", "tsp_tokens", "max_tsp_tokens"):
                _check(getattr(self, name) is None, name, f"left out: {self.method} does not propagate rows", self)
        _check_cuts(self)
        _default(self, "num_sink", cls.default_num_sink)
        for name, known in (("layer_budgets", LAYER_BUDGETS), ("head_budgets", HEAD_BUDGETS)):
            _default(self, name, getattr(cls, name))
            names = [UNIFORM, *known]
            _check(getattr(self, name) in names, name, f"one of {', '.join(names)}", self)
        _check(_is_number(self.head_floor) and 0 <= self.head_floor <= 1, "head_floor", "in [0, 1]", self)
        if self.budget is None:
            _default(self, "retention_ratio", 0.1)
        if cls.propagates and self.tsp_tokens is None:
            _default(self, "tsp_ratio", max(0.2, self.retention_ratio or 0.0))
        if self.retention_ratio is not None and self.tsp_ratio is not None:
            rule = f"at least retention_ratio = {self.retention_ratio}: late layers cannot keep more than they see"
            _check(_each(self.tsp_ratio)[-1] >= self.retention_ratio, "tsp_ratio", rule, self)
        if self.budget is not None and self.tsp_tokens is not None:
            rule = f"at least budget = {self.budget}: late layers cannot keep more than they see"
            _check(_each(self.tsp_tokens)[-1] >= self.budget, "tsp_tokens", rule, self)
        for name in _CUTS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def from_mapping(cls, method: str, mapping: Mapping[str, Any]) -> "CompressionConfig":
        """Configuration of `method` from the JSON object of the command line.

        Raises:
            ValueError: an unknown key or a value out of range; the message says what is allowed.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError(f"kv_compression_config must be a JSON object; got {mapping!r}")
        known = [field.name for field in dataclasses.fields(cls) if field.name != "method"]
        unknown = sorted(set(mapping) - set(known))
        if unknown:
            raise ValueError(f"kv_compression_config: unknown key {', '.join(unknown)}; known keys: {', '.join(known)}")
        return cls(method=method, **mapping)

    def to_mapping(self) -> dict[str, Any]:
        """All fields as plain JSON types; `CompressionConfig(**mapping)` gives the same configuration back."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def for_model(self, *, num_layers: int, max_model_len: int) -> "CompressionConfig":
        """The same configuration with the defaults that depend on the model filled in, and checked against it.

        Args:
            num_layers: decoder layers.
            max_model_len: longest sequence the engine accepts, tokens.

        Raises:
            ValueError: a TSP layer is not followed by another layer, or the stash is smaller than a prompt.
        """
        if not self.uses_tsp:
            return self
        layer = num_layers // 2 - 1 if self.tsp_layer is None else self.tsp_layer
        limit = max_model_len if self.max_tsp_tokens is None else self.max_tsp_tokens
        if not 0 <= _each(layer)[-1] < num_layers - 1:
            raise ValueError(
                f"kv_compression_config: tsp_layer must be in 0..{num_layers - 2}, the model has {num_layers} layers; "
                f"got {_plain(layer)}"
            )
        if limit < max_model_len:
            raise ValueError(
                f"kv_compression_config: max_tsp_tokens must be at least the model's maximum length {max_model_len}; "
                f"got {limit}; raise it or lower --max-model-len"
            )
        return dataclasses.replace(self, tsp_layer=layer, max_tsp_tokens=limit)

    @property
    def uses_tsp(self) -> bool:
        """Whether late layers may see fewer rows than early ones."""
        if not method_class(self.method).propagates or self.retention_ratio == 1:
            return False
        return self.tsp_ratio is None or _each(self.tsp_ratio)[-1] < 1

    @property
    def tsp_layers(self) -> tuple[int, ...]:
        """Layers after which rows are cut, ascending; empty before `for_model` where they are not given."""
        return tuple(_each(self.tsp_layer))

    def make_method(self) -> Method:
        """The configured method object."""
        return method_class(self.method)(
            window_size=self.window_size, kernel_size=self.kernel_size, pooling=self.pooling
        )

    def make_allocator(self) -> Allocator:
        """How layers and KV heads share the budget."""
        assert self.layer_budgets is not None and self.head_budgets is not None, "filled in by __post_init__"
        return Allocator(self.layer_budgets, self.head_budgets, BudgetOptions(self.pyramid_beta, self.head_floor))

    def plan(self, num_tokens: int, block_size: int) -> PromptPlan | LeftAlone:
        """What stays of a prompt of `num_tokens` tokens; its cuts are known once `for_model` has set their layers."""
        assert self.num_sink is not None, "filled in by __post_init__"
        num_kept = int(num_tokens * self.retention_ratio) if self.retention_ratio is not None else self.budget
        assert num_kept is not None, "one of retention_ratio and budget is set"
        cuts: list[tuple[int, int]] = []
        if self.uses_tsp and self.tsp_layers:
            rows = _each(self.tsp_tokens) or [int(num_tokens * share) for share in _each(self.tsp_ratio)]
            cuts = list(zip(self.tsp_layers, rows, strict=True))
        return plan_prompt(
            num_tokens,
            block_size=block_size,
            num_kept=num_kept,
            cuts=cuts,
            window_size=self.window_size,
            num_sink=self.num_sink,
            min_tokens=self.min_tokens,
            is_ragged=self.make_allocator().is_ragged,
        )


_LOWEST = {
    "budget": 1,
    "window_size": 1,
    "num_sink": 0,
    "kernel_size": 1,
    "pyramid_beta": 1,
    "min_tokens": 1,
    "max_tsp_tokens": 1,
}


_OPTIONAL = {"budget", "num_sink", "max_tsp_tokens"}


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_int(value) or isinstance(value, float)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1


# Settings that take a value or a list of one for each cut -> is one value allowed, what it must be, order of a list.
_CUTS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any, Any], bool], str]] = {
    "tsp_layer": (lambda value: _is_int(value) and value >= 0, "an integer >= 0", operator.lt, "rises"),
    "tsp_ratio": (_is_share, "in (0, 1]", operator.ge, "never rises"),
    "tsp_tokens": (lambda value: _is_int(value) and value >= 1, "an integer >= 1", operator.ge, "never rises"),
}


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _each(value: object) -> Sequence[Any]:
    """Values of a setting of the cuts; none where it is left out."""
    if value is None:
        return ()
    return value if _is_list(value) else (value,)


def _plain(value: object) -> object:
    """As JSON has it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value


def _check_cuts(config: CompressionConfig) -> None:
    for name, (is_allowed, rule, in_order, order) in _CUTS.items():
        values = _each(getattr(config, name))
        holds = all(map(is_allowed, values)) and all(in_order(*pair) for pair in pairwise(values))
        empty = _is_list(getattr(config, name)) and not values
        _check(holds and not empty, name, f"{rule} or a list of such that {order}", config)
    share = "tsp_ratio" if config.tsp_tokens is None else "tsp_tokens"
    wrong, right = (share, "tsp_layer") if _is_list(config.tsp_layer) else ("tsp_layer", share)
    if _is_list(getattr(config, right)):
        value, model = getattr(config, wrong), list(getattr(config, right))
        _check(_is_list(value) and len(value) == len(model), wrong, f"a list as long as {right} = {model}", config)


def _default(config: CompressionConfig, name: str, value: object) -> None:
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)


def _only_one(config: CompressionConfig, first: str, second: str) -> None:
    if getattr(config, first) is not None and getattr(config, second) is not None:
        raise ValueError(f"kv_compression_config: give {first} or {second}, not both")


def _check(holds: bool, name: str, rule: str, config: CompressionConfig) -> None:
    if not holds:
        raise ValueError(f"kv_compression_config: {name} must be {rule}; got {getattr(config, name)!r}")
