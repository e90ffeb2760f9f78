"""What one process is to do, with which configuration, and whether it did it."""

from dataclasses import astuple, dataclass, field
from typing import Any

from fastkv_vllm.methods import method_class

BLOCK_SIZE = 32
STEP_TOKENS = 2048
WARM_UP_TOKENS = 2048
RANDOM_IDS = (3, 512)  # token ids of random prompts, the special ones left out


@dataclass(frozen=True)
class Setup:
    """A configuration to measure.

    Fields:
        name: heads its rows.
        method: value of kv_compression; None: plain vLLM.
        config: value of kv_compression_config.
        engine: more engine arguments. A setup with some and without a method is a rival: what vLLM has itself.
        entry_bytes: bytes of one number in the cache, for engines to be held to; None: whatever it takes.
        environment: more variables of its process.
        leaves_alone: its method must leave all prompts alone.
    """

    name: str
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    entry_bytes: int | None = 2
    environment: dict[str, str] = field(default_factory=dict)
    leaves_alone: bool = False

    @property
    def compresses(self) -> bool:
        """Whether prompts must come out compressed."""
        return self.method is not None and not self.leaves_alone

    @property
    def propagates(self) -> bool:
        """Whether fewer rows must leave the last TSP layer than reached the first."""
        return self.method is not None and self.compresses and method_class(self.method).propagates

    @property
    def is_rival(self) -> bool:
        return self.method is None and bool(self.engine)


PLAIN = Setup("plain")
PLAIN_REQUESTS = Setup("plain", "none", leaves_alone=True)  # of an engine whose other requests are compressed
UNLOADED = Setup("unloaded", environment={"VLLM_PLUGINS": ""})
SNAPKV = Setup("snapkv", "snapkv", {"retention_ratio": 0.1})
FASTKV = Setup("fastkv", "fastkv", {"retention_ratio": 0.1, "tsp_layer": 7, "tsp_ratio": 0.2})
# One cut after half of the layers cannot make a prompt faster than 2 times; earlier, milder ones can.
CUTS = Setup(
    "fastkv, three cuts",
    "fastkv",
    {"retention_ratio": 0.1, "tsp_layer": [3, 7, 11], "tsp_ratio": [0.5, 0.25, 0.125]},
)
RETAINING = Setup("retention 1.0", "snapkv", {"retention_ratio": 1.0}, leaves_alone=True)
CACHED = Setup("plain, prefix caching", engine={"enable_prefix_caching": True})
CACHED_SNAPKV = Setup("snapkv, prefix caching", "snapkv", {"retention_ratio": 0.1}, {"enable_prefix_caching": True})
ADAKV = Setup("adakv", "adakv", {"retention_ratio": 0.1})
PYRAMIDKV = Setup("pyramidkv", "pyramidkv", {"retention_ratio": 0.1})
EVEN_HEADS = Setup(
    "snapkv, head by head", "snapkv", {"retention_ratio": 0.1, "head_budgets": "adaptive", "head_floor": 1.0}
)
# Heads that calibration might have found in the random model, which has none that retrieve: what they cost is the same.
_WEIGHTS = [[1.0, 0.0] if layer % 2 else [0.2, 0.4] for layer in range(16)]
STREAMING = Setup("duoattention", "duoattention", {"retention_ratio": 0.5, "head_weights": _WEIGHTS})
QUANTSPEC = Setup("quantspec", "quantspec")
NO_DRAFTS = Setup("quantspec, no drafts", "quantspec", {"draft_tokens": 0})
# Those not named above, at their own default where a tenth is not what they are made for.
OTHERS = (
    *(Setup(name, name, {"retention_ratio": 0.1}) for name in ("streamingllm", "tova", "vatp", "h2o", "a2sf")),
    Setup("asl", "asl", {"retention_ratio": 0.1}),
    Setup("gemfilter", "gemfilter", {"retention_ratio": 0.1, "tsp_layer": 7}),
    Setup("vl_cache", "vl_cache", {"retention_ratio": 0.1}),
    Setup("headkv", "headkv", {"retention_ratio": 0.1, "head_weights": _WEIGHTS}),
    STREAMING,
    Setup("dbudgetkv", "dbudgetkv", {"retention_ratio": 0.9}),
    Setup("pyramidinfer", "pyramidinfer", {"retention_ratio": 0.6}),
    Setup("lazyllm", "lazyllm", {"retention_ratio": 0.5}),
    Setup("kvsharer", "kvsharer", {"layer_owners": [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15]}),
)
# Entries stored in fewer bytes: methods at their own default, then snapkv in about the bytes of a tenth.
STORED_SMALLER = (
    Setup("think", "think", {"retention_ratio": 0.1}),
    Setup("kivi", "kivi"),
    Setup("skvq", "skvq", {"channel_groups": "none"}),
    NO_DRAFTS,
    Setup("minicache", "minicache", {"merge_limit": 1.0}),
    Setup("snapkv, int8", "snapkv", {"retention_ratio": 0.2, "codec": "int8"}),
    Setup("snapkv, int4x2", "snapkv", {"retention_ratio": 0.2, "codec": "int4x2"}),
    Setup("snapkv, int4", "snapkv", {"retention_ratio": 0.4, "codec": "int4"}),
    Setup("snapkv, skvq", "snapkv", {"retention_ratio": 0.7, "codec": "skvq", "num_sink": 5, "channel_groups": "none"}),
)
# In turn: each answers after the one before it, the first after the last.
BESIDE_CODES = (
    PLAIN_REQUESTS,
    SNAPKV,
    Setup("snapkv, int4", "snapkv", {"retention_ratio": 0.4, "codec": "int4"}),
    Setup("snapkv, after int4", "snapkv", {"retention_ratio": 0.1}),
)
FP8 = Setup("fp8", engine={"kv_cache_dtype": "fp8"}, entry_bytes=1)


@dataclass(frozen=True)
class Load:
    """What an engine is to do after one request that warms it up: greedy answers that no token ends.

    Fields:
        num_requests: requests; all sent at once unless `concurrency` says otherwise.
        prompt_tokens, output_tokens: tokens of each.
        step_tokens: max_num_batched_tokens.
        num_blocks: blocks of the pool, null block included, where a number takes 2 bytes; a setup whose numbers take
            one gets twice as many: all have the same bytes. None: as many as fit into 1 GiB.
        concurrency: most requests under way at a time; only a server's load has it.
        goodput_ms: longest time to the first token, and per token after it, of a request that counts as served well;
            only a server's load has it.
        task: a task of the tiny model's language, asked instead of random tokens.
        shared_tokens: leading tokens that all prompts share with the one that warms up.
        turns: how often each request comes, each time with more tokens behind its prompt.
        turn_tokens: how many more.
    """

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    step_tokens: int = STEP_TOKENS
    num_blocks: int | None = None
    concurrency: int | None = None
    goodput_ms: tuple[int, int] | None = None
    task: str | None = None
    shared_tokens: int = 0
    turns: int = 1
    turn_tokens: int = 0

    @property
    def most_tokens(self) -> int:
        """Tokens of a request when it comes for the last time."""
        return self.prompt_tokens + (self.turns - 1) * self.turn_tokens + self.output_tokens

    def blocks_of(self, setup: Setup) -> int | None:
        """Blocks of the pool for a setup."""
        return None if self.num_blocks is None else self.num_blocks * 2 // (setup.entry_bytes or 2)


@dataclass(frozen=True)
class Counters:
    """What a compressing engine says it did since it was started."""

    compressed: int
    left_alone: int
    tsp_rows_in: int
    tsp_rows_out: int

    def since(self, earlier: "Counters") -> "Counters":
        """What was done since an earlier look at the same engine."""
        now, then = astuple(self), astuple(earlier)
        return Counters(*(a - b for a, b in zip(now, then, strict=True)))


def require_done(setup: Setup, counters: Counters | None, *, num_prompts: int, num_preemptions: int) -> None:
    """Refuse figures of an engine that compressed when it should not have, or the other way round.

    Args:
        setup: what the engine was told.
        counters: what it says; None: it has no such counters.
        num_prompts: prompts sent to it.
        num_preemptions: requests sent back; a prompt that ends twice counts twice.

    Raises:
        RuntimeError: they do not go together: a figure would be a lie.
    """
    if setup.method is None:
        if counters is not None:
            raise RuntimeError(f"{setup.name}: an engine without a method runs a compressing scheduler")
        return
    if counters is None:
        raise RuntimeError(f"{setup.name}: the engine has no compressing scheduler")
    wanted, other = counters.compressed, counters.left_alone
    if not setup.compresses:
        wanted, other = other, wanted
    if other != 0 or not num_prompts <= wanted <= num_prompts + num_preemptions:
        verb = "compress" if setup.compresses else "leave alone"
        sent = f"{num_prompts} prompts to {verb}, {num_preemptions} preemptions"
        raise RuntimeError(f"{setup.name}: {sent}; the engine counted {counters}")
    if setup.propagates != (counters.tsp_rows_out < counters.tsp_rows_in):
        raise RuntimeError(f"{setup.name}: rows that went on after the last TSP layer: {counters}")
