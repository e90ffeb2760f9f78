"""What the settings must be: each is checked, and filled in from the method where it was left out."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from fastkv_vllm.codecs import CODECS, MERGES, NO_CODEC, VECTOR_CODECS
from fastkv_vllm.kernels.window_scores import POOLINGS
from fastkv_vllm.methods import (
    CUT_BUDGETS,
    DENSITY,
    HEAD_BUDGETS,
    LAYER_BUDGETS,
    MODEL_BUDGETS,
    UNIFORM,
    Method,
    method_class,
)

if TYPE_CHECKING:
    from fastkv_vllm.config.tree import CompressionConfig

UNMEASURED = "none"  # in the place of a file, said in so many words


def complete(config: "CompressionConfig") -> None:
    """Check a new configuration and fill in what its method knows; call while it is made.

    Raises:
        ValueError: a value is out of range or two exclude each other; the message says what is allowed.
    """
    cls = method_class(config.method)
    _check_numbers(config)
    _complete_votes(config, cls)
    _complete_shares(config, cls)
    _complete_codec(config, cls)
    _complete_budgets(config, cls)
    _complete_encoding(config, cls)
    _complete_cuts(config, cls)
    _check_owners(config, cls)
    _complete_guard(config, cls)
    _check_requests(config)


def _check_numbers(config: "CompressionConfig") -> None:
    for name, value in vars(config).items():
        check(not isinstance(value, int) or abs(value) < 2**31, name, "less than 2^31", config)
    check_only_one(config, "retention_ratio", "budget")
    check_only_one(config, "tsp_ratio", "tsp_tokens")
    check(config.retention_ratio is None or is_share(config.retention_ratio), "retention_ratio", "in (0, 1]", config)
    for name, low in LOWEST.items():
        value = getattr(config, name)
        allowed = is_int(value) and value >= low
        check(allowed or (value is None and name in OPTIONAL), name, f"an integer >= {low}", config)
    check(config.kernel_size % 2 == 1, "kernel_size", "odd", config)
    check(config.kernel_size <= WIDEST_KERNEL, "kernel_size", f"at most {WIDEST_KERNEL}", config)
    check(config.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}", config)
    check(config.min_tokens > config.window_size, "min_tokens", f"more than window_size = {config.window_size}", config)


def _complete_votes(config: "CompressionConfig", cls: type[Method]) -> None:
    for name in ("num_sink", "recent_share", "value_norms", "decay"):
        fill_in(config, name, getattr(cls, f"default_{name}"))
    check(is_number(config.recent_share) and 0 <= config.recent_share < 1, "recent_share", "in [0, 1)", config)
    check(isinstance(config.value_norms, bool), "value_norms", "true or false", config)
    check(not config.value_norms or cls.votes(), "value_norms", f"false: in {config.method} nobody votes", config)
    if config.all_queries_vote:
        check(is_number(config.decay) and 0 < config.decay <= 1, "decay", "in (0, 1]", config)
    else:
        check(config.decay is None, "decay", f"left out: in {config.method} not all queries vote", config)


def _complete_shares(config: "CompressionConfig", cls: type[Method]) -> None:
    """Measured shares of rows stand in for the retention ratio, which is their mean over layers."""
    shares = config.layer_shares
    if shares is None:
        return
    rule = f"left out: {config.method} has no schedule that calibration could find"
    check(cls.schedule_artefact is not None, "layer_shares", rule, config)
    if isinstance(shares, str):
        check(config.retention_ratio is None, "retention_ratio", "left out: it follows from layer_shares", config)
        return  # numbers take its place before the model is served
    holds = is_list(shares) and len(shares) > 0 and all(map(is_share, shares))
    rule = (
        "the path of a file of `fastkv-vllm calibrate decays`, or a share in (0, 1] for each layer but the last, never "
        "rising"
    )
    check(holds and all(a >= b for a, b in pairwise(shares)), "layer_shares", rule, config)
    mean = (sum(shares) + shares[-1]) / (len(shares) + 1)
    fill_in(config, "retention_ratio", mean)
    rule = f"left out: it follows from layer_shares, {mean:g}"
    check(config.retention_ratio == mean, "retention_ratio", rule, config)
    object.__setattr__(config, "layer_shares", tuple(map(float, shares)))


def _complete_budgets(config: "CompressionConfig", cls: type[Method]) -> None:
    by_votes = [DENSITY] if "queries" in cls.needs else []  # of the last queries' rows
    for name, known in (
        ("layer_budgets", [*LAYER_BUDGETS, *by_votes]),
        ("head_budgets", [*HEAD_BUDGETS, *MODEL_BUDGETS]),
    ):
        fill_in(config, name, getattr(cls, name))
        names = [getattr(cls, name)] if getattr(cls, name) in CUT_BUDGETS else [UNIFORM, *known]
        check(getattr(config, name) in names, name, f"one of {', '.join(names)}", config)
    if cls.one_choice:
        rule = f"uniform: in {config.method} all heads keep the same entries"
        check(config.head_budgets == UNIFORM, "head_budgets", rule, config)
    fill_in(config, "halting_loss", cls.default_halting_loss)
    loss = config.halting_loss
    check(loss is None or (is_number(loss) and 0 < loss < 1), "halting_loss", "in (0, 1)", config)
    rule = f"left out: heads of {config.method} let go of entries before the last query that the rule asks"
    check(loss is None or not config.streams, "halting_loss", rule, config)
    rule = f"left out: in {config.method} layers keep all rows they see"
    check(loss is None or not cls.revives, "halting_loss", rule, config)
    by_layer = config.layer_owners is None and config.merge_layers is None
    evicts = cls.default_evict_while_decoding and config.codec == NO_CODEC and by_layer
    fill_in(config, "evict_while_decoding", evicts)
    check(isinstance(config.evict_while_decoding, bool), "evict_while_decoding", "true or false", config)
    rule = f"false: entries stored with codec {config.codec!r} cannot be chosen from again"
    check(config.codec == NO_CODEC or not config.evict_while_decoding, "evict_while_decoding", rule, config)
    if cls.revives:
        rule = f"false: in {config.method} what a layer holds of the prompt is chosen anew with each token"
        check(not config.evict_while_decoding, "evict_while_decoding", rule, config)
    check_head_weights(config)
    check(is_number(config.head_beta) and 1 <= config.head_beta < math.inf, "head_beta", "a number >= 1", config)
    check(is_number(config.head_floor) and 0 <= config.head_floor <= 1, "head_floor", "in [0, 1]", config)
    if config.budget is None and config.layer_shares is None:
        fill_in(config, "retention_ratio", cls.default_retention_ratio)


def _complete_codec(config: "CompressionConfig", cls: type[Method]) -> None:
    fill_in(config, "codec", cls.default_codec or NO_CODEC)
    rule = f"the path of a file of `fastkv-vllm calibrate channels`, or {UNMEASURED!r}"
    groups = config.channel_groups
    check(groups is None or (isinstance(groups, str) and groups != ""), "channel_groups", rule, config)
    check(config.codec in (NO_CODEC, *CODECS), "codec", f"one of {', '.join((NO_CODEC, *CODECS))}", config)
    if config.codec == NO_CODEC:
        for name in ("residual_window", "channel_ratio", "value_channel_ratio"):
            check(getattr(config, name) is None, name, "left out without a codec", config)
        return
    rule = f"{NO_CODEC!r}: {config.method} moves its entries before the prompt ends, or reads tokens again"
    check(not (cls.streams or cls.reads_again), "codec", rule, config)
    rule = f"{NO_CODEC!r}: in {config.method} rows come back into the places of entries, while it decodes"
    check(not cls.revives, "codec", rule, config)
    rule = f"1 with codec {config.codec!r}, which groups all channels of a head"
    assert config.codec is not None, "filled in above"
    measured = CODECS[config.codec].artefact is not None
    for name, share in (("channel_ratio", cls.default_channel_ratio), ("value_channel_ratio", 1.0)):
        fill_in(config, name, share)
        check(is_share(getattr(config, name)), name, "in (0, 1]", config)
        check(not measured or getattr(config, name) == 1, name, rule, config)
    fill_in(config, "residual_window", max(config.window_size, cls.default_residual_window))
    low, value, high = config.window_size, config.residual_window, config.min_tokens
    rule = f"at least window_size = {low} and less than min_tokens = {high}"
    check(is_int(value) and low <= value < high, "residual_window", rule, config)


def _complete_encoding(config: "CompressionConfig", cls: type[Method]) -> None:
    """Whether what is generated is encoded: room for it is counted in blocks of all layers and heads alike."""
    is_even = not config.make_allocator().is_ragged and config.halting_loss is None
    by_itself = config.layer_owners is None and config.merge_layers is None
    has_room = config.codec != NO_CODEC and is_even and by_itself
    fill_in(config, "encode_generated", cls.default_encode_generated and has_room)
    encodes = config.encode_generated
    check(isinstance(encodes, bool), "encode_generated", "true or false", config)
    check(not encodes or config.codec != NO_CODEC, "encode_generated", "false without a codec", config)
    rule = "false where layers or heads keep differently many entries"
    check(not encodes or is_even, "encode_generated", rule, config)
    _complete_drafts(config, cls)


def _complete_drafts(config: "CompressionConfig", cls: type[Method]) -> None:
    """How many tokens are drafted: only where entries can be read in two ways, and what is generated is not encoded."""
    assert config.codec is not None, "filled in before"
    has_view = config.codec != NO_CODEC and CODECS[config.codec].draft_view() is not None
    fill_in(config, "draft_tokens", cls.default_draft_tokens if has_view and not config.encode_generated else 0)
    drafts = config.draft_tokens
    check(drafts is not None and drafts <= MOST_DRAFTS, "draft_tokens", f"at most {MOST_DRAFTS}", config)
    rule = f"0 with codec {config.codec!r}, which has no coarser view"
    check(not drafts or has_view, "draft_tokens", rule, config)
    rule = "0 where what is generated is encoded: a token that is not accepted must leave nothing behind"
    check(not drafts or not config.encode_generated, "draft_tokens", rule, config)


def _complete_cuts(config: "CompressionConfig", cls: type[Method]) -> None:
    if not cls.propagates:
        for name in ("tsp_layer", "tsp_ratio", "tsp_tokens", "rank_variance", "min_tsp_layer", "max_tsp_tokens"):
            check(getattr(config, name) is None, name, f"left out: {config.method} does not propagate rows", config)
    _complete_rank_variance(config, cls)
    if cls.reads_again:
        _check_reading_again(config)
        check_cuts(config)
        return
    check_cuts(config)
    if cls.layer_budgets in CUT_BUDGETS:
        for name in ("budget", "tsp_tokens", "rank_variance"):
            rule = f"left out: where {config.method} cuts rows follows from retention_ratio"
            check(getattr(config, name) is None, name, rule, config)
        _freeze_cuts(config)
        return
    if cls.propagates and config.tsp_tokens is None:
        fill_in(config, "tsp_ratio", max(0.2, config.retention_ratio or 0.0))
    if config.retention_ratio is not None and config.tsp_ratio is not None:
        rule = f"at least retention_ratio = {config.retention_ratio}: late layers cannot keep more than they see"
        check(each(config.tsp_ratio)[-1] >= config.retention_ratio, "tsp_ratio", rule, config)
    if config.budget is not None and config.tsp_tokens is not None:
        rule = f"at least budget = {config.budget}: late layers cannot keep more than they see"
        check(each(config.tsp_tokens)[-1] >= config.budget, "tsp_tokens", rule, config)
    _freeze_cuts(config)


def _check_owners(config: "CompressionConfig", cls: type[Method]) -> None:
    """Layers that read others' entries have no choice, no budget and no place of their own."""
    owners = config.layer_owners
    _complete_merging(config, cls)
    if owners is None and config.merge_layers is None and not cls.shares_layers:
        return
    rule = f"left out: in {config.method} what a layer keeps follows from its own cuts of the prompt"
    check(cls.layer_budgets not in CUT_BUDGETS, "layer_owners", rule, config)
    of_heads = (UNIFORM, *HEAD_BUDGETS) if config.merge_layers is None else (UNIFORM,)
    codecs = (NO_CODEC,) if config.merge_layers is None else (NO_CODEC, *VECTOR_CODECS)
    for name, allowed, rule in (
        ("layer_budgets", (UNIFORM,), UNIFORM),
        ("head_budgets", of_heads, " or ".join(of_heads)),
        ("codec", codecs, " or ".join(codecs)),
        ("channel_ratio", (None, 1.0), "left out"),
        ("value_channel_ratio", (None, 1.0), "left out"),
        ("encode_generated", (False,), "false"),
        ("evict_while_decoding", (False,), "false"),
        ("halting_loss", (None,), "left out"),
        ("rank_variance", (None,), "left out"),
    ):
        check(getattr(config, name) in allowed, name, f"{rule} where layers read the entries of others", config)
    rule = f"left out: {config.method} reads tokens again, whose entries are not compressed"
    check(not cls.reads_again, "layer_owners", rule, config)
    if owners is None or isinstance(owners, str):
        return  # `for_model` wants numbers
    rule = (
        "the path of a file of `fastkv-vllm calibrate sharing`, of `merging` where layers are merged, or for each "
        "layer the one whose entries it reads: its own number, or that of an earlier one that reads its own, for one "
        "layer at least"
    )
    numbers = is_list(owners) and all(is_int(owner) and 0 <= owner <= n for n, owner in enumerate(owners))
    holds = numbers and all(owners[owner] == owner for owner in owners) and len(set(owners)) < len(owners)
    check(holds, "layer_owners", rule, config)
    if config.merge_layers is not None:
        rule = "a layer's own number or that of the one before it: neighbours are merged, in pairs"
        check(all(owner >= layer - 1 for layer, owner in enumerate(owners)), "layer_owners", rule, config)
    object.__setattr__(config, "layer_owners", tuple(owners))


def _complete_guard(config: "CompressionConfig", cls: type[Method]) -> None:
    """The guard raises one number of pages, alike in all layers and heads, that nothing else may change."""
    floor = config.min_attention_recall
    if floor is None:
        rule = "left out without min_attention_recall"
        check(config.max_retention_ratio is None, "max_retention_ratio", rule, config)
        return
    check(is_number(floor) and 0 < floor < 1, "min_attention_recall", "in (0, 1)", config)
    for unfit, reason in (
        (cls.reads_again, "reads tokens again, whose entries all stay"),
        (cls.layer_budgets in CUT_BUDGETS, "keeps in each layer what follows from its own cuts"),
        (cls.shares_layers, "lets layers read the entries of others"),
        (config.streams, "lets heads let go of entries before the last queries look at them"),
    ):
        check(not unfit, "min_attention_recall", f"left out: {config.method} {reason}", config)
    for name, allowed in (
        ("budget", None),
        ("tsp_tokens", None),
        ("layer_budgets", UNIFORM),
        ("head_budgets", UNIFORM),
        ("codec", NO_CODEC),
        ("halting_loss", None),
        ("layer_owners", None),
        ("merge_layers", None),
    ):
        rule = f"{allowed or 'left out'} with min_attention_recall"
        check(getattr(config, name) == allowed, name, rule, config)
    rows = each(config.tsp_ratio)[-1] if config.tsp_ratio is not None else 1.0
    fill_in(config, "max_retention_ratio", rows)
    check(is_share(config.max_retention_ratio), "max_retention_ratio", "in (0, 1]", config)
    low, high = config.retention_ratio, config.max_retention_ratio
    assert low is not None and high is not None, "there is no budget in tokens"
    check(low <= high, "max_retention_ratio", f"at least retention_ratio = {low:g}", config)
    rule = f"at most tsp_ratio = {rows:g}: late layers cannot keep more than they see"
    check(high <= rows, "max_retention_ratio", rule, config)


def _complete_merging(config: "CompressionConfig", cls: type[Method]) -> None:
    fill_in(config, "merge_layers", cls.default_merge_layers)
    merging = config.merge_layers
    check(merging in (None, *MERGES), "merge_layers", f"one of {', '.join(MERGES)}, or left out", config)
    rule = f"left out: in {config.method} each layer chooses entries of its own"
    check(merging is None or not cls.votes(), "merge_layers", rule, config)
    for name, default in (("merge_t", 0.6), ("merge_gamma", 0.05), ("merge_limit", 0.05)):
        if merging is None:
            check(getattr(config, name) is None, name, "left out without merge_layers", config)
            continue
        fill_in(config, name, default)
        check(is_number(getattr(config, name)) and 0 <= getattr(config, name) <= 1, name, "in [0, 1]", config)


def _check_requests(config: "CompressionConfig") -> None:
    """What requests may ask for; the server's own settings keep to it."""
    check(isinstance(config.allow_request_override, bool), "allow_request_override", "true or false", config)
    least = config.min_retention_ratio
    check(is_number(least) and 0 <= least <= 1, "min_retention_ratio", "in [0, 1]", config)
    if least > 0:
        check(config.budget is None, "budget", f"left out: min_retention_ratio = {least:g} is of a ratio", config)
        if config.retention_ratio is not None:
            rule = f"at least min_retention_ratio = {least:g}"
            check(config.retention_ratio >= least, "retention_ratio", rule, config)


def _complete_rank_variance(config: "CompressionConfig", cls: type[Method]) -> None:
    fill_in(config, "rank_variance", cls.default_rank_variance)
    share = config.rank_variance
    check(share is None or (is_number(share) and 0 < share < 1), "rank_variance", "in (0, 1)", config)
    if share is None:
        check(config.min_tsp_layer is None, "min_tsp_layer", "left out without rank_variance", config)
    else:
        check(not is_list(config.tsp_layer), "tsp_layer", "one layer, the latest, with rank_variance", config)


def _check_reading_again(config: "CompressionConfig") -> None:
    """One layer is rated once; the tokens it chooses are all that stays, in all layers."""
    method = config.method
    for name in ("tsp_ratio", "tsp_tokens", "rank_variance", "halting_loss"):
        rule = f"left out: {method} reads as many tokens again as stay"
        check(getattr(config, name) is None, name, rule, config)
    rule = f"left out: in {method} no rows wait between chunks"
    check(config.max_tsp_tokens is None, "max_tsp_tokens", rule, config)
    check(not is_list(config.tsp_layer), "tsp_layer", f"one layer: {method} reads again once", config)
    rule = f"{UNIFORM}: in {method} all layers keep the same entries"
    check(config.layer_budgets == UNIFORM, "layer_budgets", rule, config)
    rule = f"false: {method} rates a prompt at one layer, and nothing after it"
    check(not config.evict_while_decoding, "evict_while_decoding", rule, config)
    rule = f"false: in {method} ratings are inner products, below zero, too"
    check(not config.value_norms, "value_norms", rule, config)


def _freeze_cuts(config: "CompressionConfig") -> None:
    for name in CUTS:
        if isinstance(getattr(config, name), list):
            object.__setattr__(config, name, tuple(getattr(config, name)))


LOWEST = {
    "budget": 1,
    "window_size": 1,
    "num_sink": 0,
    "kernel_size": 1,
    "pyramid_beta": 1,
    "streaming_tokens": 1,
    "min_tokens": 1,
    "min_tsp_layer": 0,
    "residual_window": 0,
    "draft_tokens": 0,
    "max_tsp_tokens": 1,
}


WIDEST_KERNEL = 1023  # entries; pooling's work grows with it
MOST_DRAFTS = 64


OPTIONAL = {"budget", "num_sink", "min_tsp_layer", "residual_window", "draft_tokens", "max_tsp_tokens"}


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer that fits the 32 bits of counts and indices."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def is_number(value: object) -> TypeGuard[int | float]:
    return is_int(value) or isinstance(value, float)


def is_share(value: object) -> bool:
    return is_number(value) and 0 < value <= 1


# Settings that take a value or a list of one for each cut -> is one value allowed, what it must be, order of a list.
CUTS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any, Any], bool], str]] = {
    "tsp_layer": (lambda value: is_int(value) and value >= 0, "an integer >= 0", operator.lt, "rises"),
    "tsp_ratio": (is_share, "in (0, 1]", operator.ge, "never rises"),
    "tsp_tokens": (lambda value: is_int(value) and value >= 1, "an integer >= 1", operator.ge, "never rises"),
}


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def each(value: object) -> Sequence[Any]:
    """Values of a setting of the cuts; none where it is left out."""
    if value is None:
        return ()
    return value if is_list(value) else (value,)


def as_json(value: object) -> object:
    """As JSON has it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value


def check_cuts(config: "CompressionConfig") -> None:
    for name, (is_allowed, rule, in_order, order) in CUTS.items():
        values = each(getattr(config, name))
        holds = all(map(is_allowed, values)) and all(in_order(*pair) for pair in pairwise(values))
        empty = is_list(getattr(config, name)) and not values
        check(holds and not empty, name, f"{rule} or a list of such that {order}", config)
    share = "tsp_ratio" if config.tsp_tokens is None else "tsp_tokens"
    wrong, right = (share, "tsp_layer") if is_list(config.tsp_layer) else ("tsp_layer", share)
    if is_list(getattr(config, right)):
        value, model = getattr(config, wrong), list(getattr(config, right))
        check(is_list(value) and len(value) == len(model), wrong, f"a list as long as {right} = {model}", config)


def fill_in(config: "CompressionConfig", name: str, value: object) -> None:
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)


def check_only_one(config: "CompressionConfig", first: str, second: str) -> None:
    if getattr(config, first) is not None and getattr(config, second) is not None:
        raise ValueError(f"kv_compression_config: give {first} or {second}, not both")


def check(holds: bool, name: str, rule: str, config: "CompressionConfig") -> None:
    if not holds:
        raise ValueError(f"kv_compression_config: {name} must be {rule}; got {getattr(config, name)!r}")


def check_head_weights(config: "CompressionConfig") -> None:
    """Weights are given where budgets need them and nowhere else; numbers become tuples."""
    if config.head_budgets not in MODEL_BUDGETS:
        rule = f"left out: head_budgets {config.head_budgets!r} does not use it"
        check(config.head_weights is None, "head_weights", rule, config)
        return
    rule = f"{UNIFORM}: head_budgets {config.head_budgets!r} shares the pages of all layers"
    check(config.layer_budgets == UNIFORM, "layer_budgets", rule, config)
    weights = config.head_weights
    if weights is None or isinstance(weights, str):
        return  # `for_model` wants numbers
    rows = weights if isinstance(weights, list | tuple) else ()
    flat = [weight for row in rows if isinstance(row, list | tuple) for weight in row]
    numbers = all(is_number(weight) and 0 <= weight < math.inf for weight in flat)
    lists = all(isinstance(row, list | tuple) for row in rows)
    rule = (
        "the path of a file of `fastkv-vllm calibrate`, or a list of numbers >= 0 for each layer, not all 0, for "
        f"head_budgets {config.head_budgets!r}"
    )
    check(lists and numbers and any(flat), "head_weights", rule, config)
    object.__setattr__(config, "head_weights", tuple(tuple(map(float, row)) for row in rows))
