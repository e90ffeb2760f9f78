"""Settings that make the small models compress, and the prompts most tests send."""

import random

from tests.engine.oracle import make_prompts

SMALL = {"min_tokens": 128, "retention_ratio": 0.2}
TSP = SMALL | {"tsp_layer": 3, "tsp_ratio": 0.3}
EVICTING = {"evict_while_decoding": True}
CUTS = SMALL | {"tsp_layer": [2, 4, 5], "tsp_ratio": [0.6, 0.4, 0.3]}
# With random weights ranks hardly settle: MIXED is cut after layers 3, 5 and 6.
ASL = SMALL | {"tsp_ratio": 0.3, "rank_variance": 0.96}
GEMFILTER = SMALL | {"tsp_layer": 3}
METHODS = {
    "fastkv": TSP,
    "asl": ASL,
    "gemfilter": GEMFILTER,
    "snapkv": SMALL,
    "streamingllm": SMALL,
    "tova": SMALL,
    "vatp": SMALL | {"num_sink": 5},
    "h2o": SMALL,
}
# Name -> method and configuration: the methods, and a schedule of cuts.
EXACT = {name: (name, config) for name, config in METHODS.items()} | {"fastkv-cuts": ("fastkv", CUTS)}
DUO = {"min_tokens": 128, "num_sink": 4, "streaming_tokens": 60, "retention_ratio": 0.4}
# With random weights layers lose 0.4 of the norm once a tenth to three quarters of the oldest entries are gone.
HALTING = {"min_tokens": 128, "retention_ratio": 0.6, "halting_loss": 0.4}
# Of 8 layers with 2 KV heads.
WEIGHTS = [[0.1, 0.3], [0.9, 0.0], [0.2, 0.2], [0.05, 0.4], [0.7, 0.1], [0.0, 0.0], [0.3, 0.6], [0.8, 0.2]]
# Name -> method and configuration with budgets that differ by layer, by head, by both, and after a cut.
RAGGED = {
    "pyramidkv": ("pyramidkv", SMALL),
    "adakv": ("adakv", SMALL),
    "pyramidkv-adaptive": ("pyramidkv", SMALL | {"head_budgets": "adaptive", "num_sink": 3}),
    "fastkv-adaptive": ("fastkv", TSP | {"head_budgets": "adaptive"}),
    "fastkv-pyramid-adaptive-norms": (
        "fastkv",
        TSP | {"layer_budgets": "pyramid", "head_budgets": "adaptive", "value_norms": True, "num_sink": 20},
    ),
    "fastkv-cuts-pyramid-adaptive": ("fastkv", CUTS | {"layer_budgets": "pyramid", "head_budgets": "adaptive"}),
    "headkv": ("headkv", SMALL | {"head_weights": WEIGHTS}),
    "fastkv-importance": ("fastkv", TSP | {"head_budgets": "importance", "head_weights": WEIGHTS, "head_beta": 1.01}),
    "duoattention": ("duoattention", DUO | {"head_weights": WEIGHTS}),
    "pyramidinfer": ("pyramidinfer", {"min_tokens": 128}),
    "pyramidinfer-measured": (
        "pyramidinfer",
        {"min_tokens": 128, "layer_shares": [1.0, 0.8, 0.8, 0.8, 0.5, 0.4, 0.4], "value_norms": True},
    ),
    "lazyllm": ("lazyllm", {"min_tokens": 128, "retention_ratio": 0.4}),
    "vl_cache": ("vl_cache", SMALL),
    "fastkv-density": ("fastkv", TSP | {"layer_budgets": "density", "window_size": 20}),
    "dbudgetkv": ("dbudgetkv", HALTING),
    "snapkv-halting": ("snapkv", HALTING | {"halting_loss": 0.1, "layer_budgets": "pyramid"}),
    "asl-pyramid-adaptive": ("asl", ASL | {"layer_budgets": "pyramid", "head_budgets": "adaptive"}),
    "fastkv-halting": ("fastkv", HALTING | {"tsp_layer": 3, "tsp_ratio": 0.7}),
    "streamingllm-pyramid": ("streamingllm", SMALL | {"layer_budgets": "pyramid"}),
}
# Of 8 layers with 2 KV heads of 32 channels in two groups: channels of keys and values in some order, and shares.
_RANDOM = random.Random(5)
CHANNELS = {
    "orders": [[[_RANDOM.sample(range(32), 32) for _ in range(2)] for _ in range(2)] for _ in range(8)],
    "clips": [[[[_RANDOM.uniform(0.6, 1.0) for _ in range(2)] for _ in range(2)] for _ in range(2)] for _ in range(8)],
}
# Name -> method and configuration of entries stored by a codec.
ENCODED = {
    "snapkv-int8": ("snapkv", SMALL | {"codec": "int8"}),
    "snapkv-int4": ("snapkv", SMALL | {"codec": "int4", "retention_ratio": 0.5, "residual_window": 40}),
    "fastkv-fp8": ("fastkv", TSP | {"codec": "fp8"}),
    "adakv-int2": ("adakv", SMALL | {"codec": "int2"}),
    "h2o-kivi2": ("h2o", SMALL | {"codec": "kivi2"}),
    "fastkv-pyramid-adaptive-kivi4": (
        "fastkv",
        TSP | {"layer_budgets": "pyramid", "head_budgets": "adaptive", "codec": "kivi4"},
    ),
    "dbudgetkv-int4": ("dbudgetkv", HALTING | {"codec": "int4"}),
    "think": ("think", SMALL),
    "think-values": ("think", SMALL | {"value_channel_ratio": 0.6}),
    "h2o-kivi4-channels": ("h2o", SMALL | {"codec": "kivi4", "channel_ratio": 0.5}),
    "fastkv-adaptive-exact": (
        "fastkv",
        TSP | {"head_budgets": "adaptive", "codec": "exact", "value_channel_ratio": 0.4},
    ),
    "fastkv-adaptive-skvq": (
        "fastkv",
        TSP | {"head_budgets": "adaptive", "codec": "skvq", "num_sink": 5, "channel_groups": CHANNELS},
    ),
    "streamingllm-whole-kivi4": ("streamingllm", {"min_tokens": 128, "retention_ratio": 1.0, "codec": "kivi4"}),
}
# Those whose generated tokens are encoded, too.
KIVI = {"min_tokens": 128, "codec": "kivi2", "residual_window": 40}
ENCODING = {
    "kivi": ("kivi", KIVI),
    "skvq": ("skvq", {"min_tokens": 128, "residual_window": 40, "channel_groups": CHANNELS}),
    "fastkv-int8": (
        "fastkv",
        TSP
        | {
            "codec": "int8",
            "channel_ratio": 0.7,
            "value_channel_ratio": 0.5,
            "residual_window": 100,
            "encode_generated": True,
        },
    ),
}
# A window of one token: a prompt of which all but the last comes from the prefix cache has one left to compute.
DRAFTING = {"min_tokens": 128, "residual_window": 40, "window_size": 1, "draft_tokens": 4}
# Layers 3, 5 and 7 of 8 read the entries of others, on their own side of the TSP layer.
OWNERS = [0, 1, 2, 0, 4, 4, 6, 4]
SHARING = {
    "kvsharer": ("kvsharer", {"min_tokens": 128, "layer_owners": OWNERS}),
    "fastkv-sharing": ("fastkv", TSP | {"layer_owners": OWNERS}),
    "adakv-sharing": ("adakv", SMALL | {"layer_owners": [0, 0, 2, 2, 2, 5, 6, 6]}),
}
WHOLE = {"min_tokens": 128, "retention_ratio": 1.0}
MERGED = {
    "minicache": ("minicache", {"min_tokens": 128, "layer_owners": [0, 0, 2, 2, 4, 5, 5, 7]}),
    "minicache-keys": ("minicache", {"min_tokens": 128, "merge_layers": "keys_and_values"}),
    "merged-dropping": (
        "streamingllm",
        WHOLE | {"retention_ratio": 0.6, "merge_layers": "keys_and_values", "merge_gamma": 0.3, "merge_t": 0.3},
    ),
    "minicache-int4": ("minicache", {"min_tokens": 128, "codec": "int4", "merge_gamma": 0.3}),
    "minicache-keys-int8": (
        "minicache",
        {"min_tokens": 128, "merge_layers": "keys_and_values", "codec": "int8", "residual_window": 40},
    ),
}
# Of a server with room for all of REQUESTS: the rows of three cuts of the longest prompt.
SERVER = TSP | {"max_tsp_tokens": 3 * 2048, "channel_groups": "none"}
# Attention is nearly even with random weights: 0.6 of it takes some four tenths of the entries.
GUARDED = {
    "snapkv-guarded": ("snapkv", SMALL | {"min_attention_recall": 0.6}),
    # The ceiling, half of the rows, is not enough.
    "fastkv-guarded": ("fastkv", TSP | {"tsp_ratio": 0.5, "min_attention_recall": 0.9}),
    "h2o-guarded": ("h2o", SMALL | {"min_attention_recall": 0.45, "max_retention_ratio": 0.7}),
    "streamingllm-guarded": ("streamingllm", SMALL | {"min_attention_recall": 0.1, "max_retention_ratio": 0.7}),
}
# Name -> method and configuration of requests that are served together.
REQUESTS = {
    "fastkv": ("fastkv", TSP),
    "fastkv-cuts": ("fastkv", CUTS),
    "asl": ("asl", ASL),
    "gemfilter": ("gemfilter", SMALL | {"tsp_layer": 4}),
    "snapkv": ("snapkv", SMALL | {"retention_ratio": 0.3}),
    "none": ("none", {}),
    "tova": ("tova", SMALL | {"retention_ratio": 0.15}),
    "vatp": ("vatp", SMALL | {"budget": 100, "retention_ratio": None}),
    "h2o": ("h2o", SMALL | {"value_norms": True, "num_sink": 20}),
    "adakv": ("adakv", SMALL | {"retention_ratio": 0.25}),
    "adakv-evicting": ("adakv", SMALL | EVICTING),
    "fastkv-evicting": ("fastkv", TSP | EVICTING),
    "headkv": ("headkv", SMALL | {"head_weights": WEIGHTS}),
    "streamingllm": ("streamingllm", SMALL | {"retention_ratio": 0.1}),
    "dbudgetkv": ("dbudgetkv", HALTING),
    "pyramidinfer": ("pyramidinfer", {"min_tokens": 128}),
    "lazyllm": ("lazyllm", {"min_tokens": 128, "retention_ratio": 0.4, "value_norms": True}),
    "duoattention": ("duoattention", DUO | {"retention_ratio": 0.6, "head_weights": WEIGHTS}),
    "vl_cache": ("vl_cache", SMALL | {"num_sink": 2}),
    "adakv-int8": ("adakv", SMALL | {"retention_ratio": 0.3, "codec": "int8"}),
    "kivi": ("kivi", KIVI | {"codec": "kivi4"}),
    "skvq": ("skvq", {"min_tokens": 128, "residual_window": 40}),
    "kvsharer": SHARING["kvsharer"],
    "fastkv-sharing": SHARING["fastkv-sharing"],
    "think": ("think", SMALL),
    "minicache": MERGED["minicache"],
    "minicache-keys": MERGED["minicache-keys"],
    "minicache-int4": MERGED["minicache-int4"],
    **GUARDED,
    "think-values": ENCODED["think-values"],
    "quantspec": ("quantspec", {"min_tokens": 128, "residual_window": 40}),
    "snapkv-int4-all": ("snapkv", SMALL | {"codec": "int4", "residual_window": 40, "encode_generated": True}),
}
MIXED = make_prompts([1111, 700, 90, 1300, 96, 832])  # 90 and 96 are below min_tokens
