"""Run by test_patch_series.py in a process whose vLLM has the series in patches/: what comes out, as JSON."""

import sys
from pathlib import Path
from types import SimpleNamespace

import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastkv_vllm.adapter.worker import CPUCompressionWorker
from tests.engine.child import report
from tests.engine.harness import Engine
from tests.engine.settings import EXACT, MIXED
from tests.engine.test_identity import runs_of
from tests.test_patches import adapter_patches, patch_id


def refusal(engine: Engine) -> str:
    try:
        engine.generate(MIXED[:1], 1, prompt_logprobs=0)
    except VLLMValidationError as error:
        return str(error)
    return "none"


def refusal_of_a_response(engine: Engine) -> str:
    """Of one whose generator is made and not read."""
    server = SimpleNamespace(engine_client=engine.llm.llm_engine)
    prompt, params = {"prompt_token_ids": list(MIXED[0])}, SamplingParams(prompt_logprobs=0)
    try:
        OpenAIServingResponses._generate_with_builtin_tools(server, "0", prompt, params, context=None)
    except VLLMValidationError as error:
        return str(error)
    return "none"


def typo() -> str:
    try:
        EngineArgs(model=".", kv_compresion="fastkv")
    except TypeError as error:
        return str(error)
    return "none"


def flags(checkpoint: Path) -> list:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(
        ["--model", str(checkpoint), "--kv-compression", "snapkv", "--kv-compression-config", '{"budget": 64}']
    )
    built = EngineArgs.from_cli_args(args)
    return [built.kv_compression, built.kv_compression_config]


def main(checkpoint: Path, name: str) -> None:
    made, make = [], CPUCompressionWorker._make_model_runner
    CPUCompressionWorker._make_model_runner = lambda worker: made.append(make(worker)) or made[-1]
    engine = Engine(checkpoint, *EXACT[name])
    shadowed = []
    layers = engine.worker.model_runner._decoder_layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: shadowed.append("forward" in vars(layer)))
    runs = runs_of(engine)
    report(
        {
            "vllm": vllm.__file__,
            "runs": runs,
            "asked_for_its_runner": [runner is engine.worker.model_runner for runner in made],
            "calls_of_layers": len(shadowed),
            "shadowed": sum(shadowed),
            "patched": [
                patch_id(patch)
                for patch in adapter_patches()
                if hasattr(getattr(patch.owner, patch.name), "__fastkv_original__")
            ],
            "import_hooks": [type(f).__name__ for f in sys.meta_path if type(f).__module__.startswith("fastkv")],
            "refusal": refusal(engine),
            "refusal_of_a_response": refusal_of_a_response(engine),
            "typo": typo(),
            "flags": flags(checkpoint),
            "positional": EngineArgs(str(checkpoint)).model == str(checkpoint),
        }
    )
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
