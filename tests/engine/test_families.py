"""Every architecture on the list is exact under token-selective propagation; others are refused by name."""

import pytest
from transformers import Gemma2Config, OPTConfig
from vllm.engine.arg_utils import EngineArgs

from fastkv_vllm.adapter.conflicts import ARCHITECTURES
from tests.engine.oracle import make_prompts
from tests.engine.settings import GEMFILTER, TSP
from tests.reference import FAMILIES
from tests.reference.images import IMAGE_FAMILY


@pytest.mark.parametrize("family", [*FAMILIES, IMAGE_FAMILY])
def test_family(start, checkpoints, family):
    arguments = {"max_model_len": 1024, "skip_tokenizer_init": family != IMAGE_FAMILY}
    engine = start("fastkv", TSP, checkpoint=checkpoints(family), **arguments)
    assert engine.core.vllm_config.model_config.architecture in ARCHITECTURES
    with engine.step_tokens(100):
        engine.check(make_prompts([500, 90, 333]))


@pytest.mark.parametrize("family", ["gemma", "phi3"])
def test_tokens_read_again_are_embedded_as_the_model_does(start, checkpoints, family):
    engine = start("gemfilter", GEMFILTER, checkpoint=checkpoints(family), max_model_len=1024)
    with engine.step_tokens(100):
        engine.check(make_prompts([500, 90, 333]))


def test_all_architectures_are_covered():
    assert len(FAMILIES) + 1 == len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("Gemma2ForCausalLM", Gemma2Config), ("OPTForCausalLM", OPTConfig)],
)
def test_other_architectures_are_refused(tmp_path, architecture, config):
    config(num_hidden_layers=2, architectures=[architecture]).save_pretrained(tmp_path)
    args = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, kv_compression="snapkv")
    with pytest.raises(ValueError, match=f"snapkv cannot run.*\n- it needs one of Llama.*and got {architecture}"):
        args.create_engine_config()
