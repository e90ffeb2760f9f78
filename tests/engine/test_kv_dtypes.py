"""vLLM's own eight-bit caches: the tokens of a reference that cuts entries down before anyone reads or rates them."""

from itertools import count

import pytest
import torch

from tests import flash, flash_infer
from tests.engine import oracle
from tests.engine.oracle import is_clear, make_prompts
from tests.engine.requests import ask, filled
from tests.engine.settings import EVICTING, SMALL
from tests.reference import make_checkpoint

CONFIG = SMALL | {"retention_ratio": 0.3}
CUT = CONFIG | {"tsp_layer": 0, "tsp_ratio": 0.6}
ASKED = {
    "snapkv": ("snapkv", CONFIG),
    "fastkv": ("fastkv", CUT),
    "fastkv-adaptive": ("fastkv", CUT | {"head_budgets": "adaptive", "value_norms": True}),
    "h2o": ("h2o", CONFIG | EVICTING),
    "adakv-evicting": ("adakv", CONFIG | EVICTING),
    "none": ("none", {}),
}


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """With more of them float noise would decide in each prompt which of two numbers some entry becomes."""
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", num_layers=2)


ON_GPU = {"flash": flash, "flashinfer": flash_infer}
# Of the CPU's attention, and of a GPU's whose kernel is plain torch.
KINDS = {"fp8": ("fp8", 0.5, 0.25), "fp8_e5m2": ("fp8_e5m2", 1.0, 1.0)} | dict.fromkeys(ON_GPU, ("fp8", 0.5, 0.25))


@pytest.fixture(params=KINDS, scope="module")
def engine(request, start, two_layers):
    if request.param not in ON_GPU and not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM's CPU attention has eight-bit caches with AVX-512 or AMX only")
    kind, k_scale, v_scale = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "KV_CACHE", KINDS[request.param])
        if request.param in ON_GPU:
            ON_GPU[request.param].install(patch)
        settings = CUT | {"max_tsp_tokens": 1024}
        number = list(KINDS).index(request.param)  # an engine for each: those of the same arguments are one
        arguments = {"checkpoint": two_layers, "kv_cache_dtype": kind, "max_model_len": 512}
        engine = start("fastkv", settings, **arguments, max_num_seqs=16 + number)
        for layer in engine.core.vllm_config.compilation_config.static_forward_context.values():
            for name, scale in (("k", k_scale), ("v", v_scale)):  # as from a checkpoint that has them
                setattr(layer, f"_{name}_scale_float", scale)
                getattr(layer, f"_{name}_scale").fill_(scale)
        yield engine


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_entries_of_eight_bits(engine, step_tokens):
    """In chunks and in one, side by side; the block that fills up while decoding is chosen from, too."""
    asked = []
    for number, (method, settings) in enumerate(ASKED.values()):
        config, length = filled(method, settings), 154 + number
        prompts = (make_prompts([length], seed=seed)[0] for seed in count(100 * number))
        found = next(p for p in prompts if is_clear(engine.checkpoint, config, p, 10, length))
        asked.append((found, method, settings))
    with engine.step_tokens(step_tokens), engine.watch():
        ask(engine, asked, 10)
