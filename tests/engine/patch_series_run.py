"""Run by test_patch_series.py in a process whose vLLM has the series in patches/: what comes out, as JSON."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastkv_vllm.adapter.cpu_worker import CPUCompressionWorker
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


def accounts_in_streams() -> list[list]:
    """Of each event of a stream of completions, chat completions and messages: what was done, where it says so."""
    completions, chats = object.__new__(OpenAIServingCompletion), object.__new__(AnthropicServingMessages)
    off = "enable_force_include_usage enable_prompt_tokens_details enable_per_request_metrics enable_log_outputs"
    for server in (completions, chats):
        vars(server).update(dict.fromkeys(off.split(), False), _include_reasoning_tokens_details=False)
        vars(server).update(parser_cls=None, system_fingerprint=None, request_logger=None, response_role="assistant")
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}
    rest: Any = {"tokenizer": None, "request_metadata": RequestResponseMetadata(request_id="0")}

    def of_chats() -> AsyncIterator[str]:
        request = ChatCompletionRequest(messages=[{"role": "user", "content": "p"}], **options)
        return chats.chat_completion_stream_generator(request, outputs("p"), "0", "m", [], **rest)

    async def of_prompts() -> AsyncIterator[tuple[int, RequestOutput]]:
        for number, prompt in enumerate("pq"):
            async for output in outputs(prompt):
                yield number, output

    request = CompletionRequest(prompt=["p", "q"], **options)
    streams = [
        completions.completion_stream_generator(request, [{}, {}], of_prompts(), "0", 0, "m", 2, **rest),
        of_chats(),
        chats.message_stream_converter(of_chats()),
    ]
    return [asyncio.run(accounts(stream)) for stream in streams]


async def outputs(prompt: str) -> AsyncIterator[RequestOutput]:
    """A text, and its end, which looks like the end of a stream."""
    for text, done in ((".", None), ('"choices":[] "type":"message_delta"', {"fastkv": {"method": f"of {prompt}"}})):
        output = CompletionOutput(0, text, [7], None, None, finish_reason=done and "length")
        yield RequestOutput("0", prompt, [1, 2], None, [output], done is not None, kv_transfer_params=done)


async def accounts(stream: AsyncIterator[str]) -> list:
    events = [event[event.index("{") :] async for event in stream if "{" in event]
    return [json.loads(event).get("kv_transfer_params") for event in events]


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
            "accounts_in_streams": accounts_in_streams(),
            "typo": typo(),
            "flags": flags(checkpoint),
            "positional": EngineArgs(str(checkpoint)).model == str(checkpoint),
        }
    )
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
