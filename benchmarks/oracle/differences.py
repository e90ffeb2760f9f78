"""Where our definition of a method and kvpress's part, and how a comparison takes each difference out.

`aligned` is a pair of settings under which both must keep the same entries up to ties. Each `Difference` says what
was taken out; where it can be put back alone, `left_in` does so, and the overlap then measured is its size. Where only
counts differ that size is known: a smaller budget is a subset (overlap: the smaller count over the larger), and a tail
of t tokens over a window of w costs at most t - w of the kept entries. The other differences make another vote.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.oracle.engine_child import BLOCK_SIZE
from benchmarks.questions import CHECKPOINT, TSP_LAYER
from fastkv_vllm.cache import LeftAlone, PromptPlan
from fastkv_vllm.config import CompressionConfig

NUM_LAYERS = 8  # of the tiny model
KVPRESS_VOTING = {"window_size": 64, "kernel_size": 5}  # SnapKVPress as shipped
_EVICTING = ("streamingllm", "tova")  # methods that go on after the prompt
POOLING = ("snapkv", "fastkv", "pyramidkv", "adakv")  # methods whose window votes are pooled over positions
DUO = "duoattention"
GATES = CHECKPOINT.parent / "duo.json"
_SINKS, _RECENT = 64, 256  # entries of a streaming head


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Fields:
        method, config: ours.
        press, settings: theirs, `compression_ratio` not among the settings.
        num_tokens: tokens of each prompt.
        num_kept: entries they are to keep, of each layer and head or, where budgets are uneven, in the mean, shared
            by their own arithmetic; None: as many as we do, in each layer and head.
        layers: those whose entries are compared.
    """

    method: str
    config: dict[str, Any]
    press: str
    settings: dict[str, Any]
    num_tokens: int
    num_kept: int | None = None
    layers: range = field(default=range(NUM_LAYERS))

    @property
    def plan(self) -> PromptPlan:
        plan = CompressionConfig.from_mapping(self.method, self.config).plan(self.num_tokens, BLOCK_SIZE)
        if isinstance(plan, LeftAlone):
            raise ValueError(f"{self.method} {self.config} leaves {self.num_tokens} tokens alone: {plan.value}")
        return plan

    @property
    def kept_by_us(self) -> int:
        """Entries of each layer and head, or their mean."""
        return self.plan.num_kept

    @property
    def kept_by_them(self) -> int:
        return self.kept_by_us if self.num_kept is None else self.num_kept

    @property
    def compares_answers(self) -> bool:
        """Whether all layers are compared and have read the prompt alike: an answer depends on that."""
        return len(self.layers) == NUM_LAYERS and self.method != DUO


@dataclass(frozen=True)
class Difference:
    """One difference of definition.

    Fields:
        methods: ours that it concerns.
        what: the point.
        ours, theirs: what each side does.
        taken_out: how an aligned pair has none of it.
        left_in: an aligned pair with this difference put back; None where it cannot be, or cannot matter.
    """

    methods: tuple[str, ...]
    what: str
    ours: str
    theirs: str
    taken_out: str
    left_in: Callable[[Pair], Pair] | None = None


def compression_ratio(num_tokens: int, num_kept: int) -> float:
    """What makes kvpress's `int(num_tokens * (1 - compression_ratio))` exactly `num_kept`: half an entry of room."""
    if not 0 < num_kept < num_tokens:
        raise ValueError(f"num_kept must be in 1..{num_tokens - 1}; got {num_kept}")
    ratio = 1 - (num_kept + 0.5) / num_tokens
    assert int(num_tokens * (1 - ratio)) == num_kept, f"{num_tokens} * (1 - {ratio}) is not {num_kept} and a half"
    return ratio


def aligned(method: str, retention_ratio: float, num_tokens: int, **voting: int) -> Pair:
    """Settings under which kvpress must keep what we keep, as far as it has the method.

    Args:
        method: ours.
        retention_ratio: ours; kvpress gets the count that follows from it.
        num_tokens: tokens of each prompt.
        voting: `window_size` and `kernel_size` of both sides, instead of our defaults.

    Raises:
        ValueError: the prompt is left alone, or ends in a block tail longer than the window.
    """
    config: dict[str, Any] = {"retention_ratio": retention_ratio}
    settings: dict[str, Any] = {}
    layers = range(NUM_LAYERS)
    if method in _EVICTING:
        config["evict_while_decoding"] = False
    if method == "streamingllm":
        return Pair(method, config, method, {"n_sink": 4}, num_tokens)
    if method == "tova":
        config["window_size"] = 1
    else:
        config |= {"pooling": "avg", **voting}
    if method == "fastkv":
        config["tsp_layer"], layers = TSP_LAYER, range(TSP_LAYER + 1)
    full = CompressionConfig.from_mapping(method, config)
    if num_tokens % BLOCK_SIZE > full.window_size:
        raise ValueError(
            f"the length must leave at most {full.window_size} tokens over whole blocks of {BLOCK_SIZE}: a longer "
            f"tail is always kept, which kvpress cannot do; got {num_tokens}"
        )
    if method in POOLING:
        settings = {"window_size": full.window_size, "kernel_size": full.kernel_size}
    return Pair(method, config, "snapkv" if method == "fastkv" else method, settings, num_tokens, layers=layers)


def aligned_duo(num_tokens: int) -> Pair:
    """DuoAttention with as many retrieval heads as streaming ones, by the small model's gates.

    Raises:
        ValueError: so many tokens leave a head in between, or a streaming head part of a block.
    """
    twice = num_tokens + _SINKS + _RECENT
    if num_tokens % BLOCK_SIZE or twice % (2 * BLOCK_SIZE):
        raise ValueError(f"the length and the mean of both kinds of heads must be whole blocks; got {num_tokens}")
    gates = json.loads(GATES.read_text())["data"]["gates"]
    config = {"retention_ratio": twice / 2 / num_tokens, "head_weights": gates, "num_sink": _SINKS}
    settings = {"head_compression_ratio": 0.5, "sink_size": _SINKS, "recent_size": _RECENT}
    return Pair(DUO, config | {"streaming_tokens": _SINKS + _RECENT}, DUO, settings, num_tokens, twice // 2)


def _nominal_count(pair: Pair) -> int:
    return int(pair.num_tokens * pair.config["retention_ratio"])


def _as_shipped(pair: Pair) -> Pair:
    config = {name: value for name, value in pair.config.items() if name in ("retention_ratio", "tsp_layer")}
    return replace(pair, config=config, settings={}, num_kept=_nominal_count(pair))


_EVEN = ("snapkv", "streamingllm", "fastkv", "tova")
_VOTING = (*POOLING, "tova")
_ALL = (*POOLING, "streamingllm", "tova")
DIFFERENCES = (
    Difference(
        POOLING,
        "pooling over positions",
        "max, or avg",
        "avg",
        'ours set to "avg"',
        lambda pair: replace(pair, config=pair.config | {"pooling": "max"}),
    ),
    Difference(
        POOLING,
        "window_size",
        "8 unless set",
        "64 unless set",
        "theirs set to ours",
        lambda pair: replace(pair, settings=pair.settings | {"window_size": KVPRESS_VOTING["window_size"]}),
    ),
    Difference(
        POOLING,
        "kernel_size",
        "7 unless set",
        "5 unless set",
        "theirs set to ours",
        lambda pair: replace(pair, settings=pair.settings | {"kernel_size": KVPRESS_VOTING["kernel_size"]}),
    ),
    Difference(
        _EVEN,
        "budget",
        f"int(P * ratio), held in whole blocks of {BLOCK_SIZE}",
        "int(P * (1 - compression_ratio))",
        "compression_ratio computed from our count",
        lambda pair: replace(pair, num_kept=_nominal_count(pair)),
    ),
    Difference(
        ("pyramidkv",),
        "budgets of layers",
        "a series of what is beside the window, in whole pages",
        "a series of all; even where the last layer would have less than the window",
        "our counts given to it",
        lambda pair: replace(pair, num_kept=pair.kept_by_us),
    ),
    Difference(
        ("adakv",),
        "budgets of heads",
        "0.8 of the head's share of the layer's best and 0.2 of the even budget, in whole pages",
        "a head's best up to 0.2 of the even budget, then the layer's best",
        "our counts given to it: its heads' best",
        lambda pair: replace(pair, num_kept=pair.kept_by_us),
    ),
    Difference(("adakv",), "what does not stay", "leaves the cache", "is masked while decoding", "nothing: weight 0"),
    Difference(
        ("tova",),
        "window",
        "the last 8 tokens stay, the last one votes",
        "the last token stays and votes",
        "ours set to 1",
        lambda pair: replace(pair, config={n: value for n, value in pair.config.items() if n != "window_size"}),
    ),
    Difference(("tova",), "query heads", "sum over all of a layer", "mean over all of a layer", "nothing: same order"),
    Difference(
        _VOTING,
        f"block tail of P % {BLOCK_SIZE} tokens",
        "always stays",
        "no such thing",
        "a length whose tail lies in the window",
        lambda pair: replace(pair, num_tokens=pair.num_tokens // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE - 1),
    ),
    Difference(POOLING, "window queries", "sum", "mean", "nothing: the same order"),
    Difference(POOLING, "query heads of a group", "sum, after pooling", "mean, after pooling", "nothing: same order"),
    Difference(_VOTING, "the window's own score", "+inf", "best score + 1", "nothing: both always keep it"),
    Difference(_VOTING, "equal scores", "lower position", "as topk likes", "score gap of swapped entries reported"),
    Difference(_VOTING, "sinks", "none unless set", "none", "nothing"),
    Difference(("streamingllm",), "sinks", "4 unless set", "4 unless set", "nothing"),
    Difference(_ALL, "keys", "rotated once, at their place", "the same, without KeyRerotationPress", "nothing"),
    Difference(_EVICTING, "while decoding", "full blocks are chosen from, too", "all stays", "ours switched off"),
    Difference(_ALL, "when", "after the layer's full attention", "the same, in a forward hook", "nothing"),
    Difference((DUO,), "gates", "learnt on the model", "published for six models", "ours given to it"),
    Difference(
        (DUO,),
        "heads that stream",
        "as many as the budget asks for, one in between; whole pages",
        "a share of the heads, rounded",
        "a budget with none in between",
    ),
    Difference(
        (DUO,), "while a prompt is read", "they let go of entries", "all see all", "sets alone compared, no answers"
    ),
    Difference((DUO,), "what does not stay", "leaves the cache", "is masked while decoding", "nothing: weight 0"),
    Difference(
        _ALL,
        "what is compressed",
        "the prompt, its question too",
        "the context, before the question",
        "the whole prompt is their context",
    ),
    Difference(
        _ALL, "first token", "from full attention", "from the question's pass", "theirs from the context's pass"
    ),
    Difference(_ALL, "short prompts", "left alone below min_tokens", "compressed", "longer prompts"),
    Difference(
        ("fastkv",),
        f"layers after the TSP layer {TSP_LAYER}",
        "keep out of the rows that went on",
        "FastKV is not in kvpress; SnapKVPress",
        "only layers up to it compared, no answers",
        lambda pair: replace(pair, layers=range(TSP_LAYER + 1, NUM_LAYERS)),
    ),
    Difference(_ALL, "all of them, both sides as shipped", "", "", "", _as_shipped),
)
