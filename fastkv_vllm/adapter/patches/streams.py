"""What streams of completions, chat completions and messages are made by; they lack what whole answers say was done."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

from fastkv_vllm.adapter.patches.base import Patch

_FIELD = "kv_transfer_params"
# Of the chunks that end a stream; in a text the quotes would be escaped.
_USAGE, _STOP = '"choices":[]', '"type":"message_delta"'


class _Account:
    """What the last output of a request says was done, led around the code that makes chunks of outputs."""

    def __init__(self) -> None:
        self._done: dict[str, Any] | None = None

    async def of_outputs(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for output in outputs:
            self._done = output.kv_transfer_params
            yield output

    async def of_first_prompt(self, outputs: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[tuple[int, Any]]:
        """Of several prompts a whole answer says it of the first."""
        async for prompt, output in outputs:
            if prompt == 0:
                self._done = output.kv_transfer_params
            yield prompt, output

    async def of_chunks(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        async for chunk in chunks:
            if _USAGE in chunk:
                self._done = json.loads(chunk.removeprefix("data: ")).get(_FIELD)
            yield chunk

    async def added(self, chunks: AsyncIterator[str], last: str) -> AsyncIterator[str]:
        """The chunks, events with one JSON object each; that with the text `last` gets a field more."""
        async for chunk in chunks:
            if self._done is not None and last in chunk:
                end = chunk.rindex("}")
                chunk = f'{chunk[:end]},"{_FIELD}":{json.dumps(self._done)}{chunk[end:]}'
            yield chunk


def _wrap_completions(original: Callable[..., Any]) -> Callable[..., Any]:
    def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        account = _Account()
        outputs = account.of_first_prompt(result_generator)
        return account.added(original(self, request, engine_inputs, outputs, *args, **kwargs), _USAGE)

    return completion_stream_generator


def _wrap_chats(original: Callable[..., Any]) -> Callable[..., Any]:
    def chat_completion_stream_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        account = _Account()
        outputs = account.of_outputs(result_generator)
        return account.added(original(self, request, outputs, *args, **kwargs), _USAGE)

    return chat_completion_stream_generator


def _wrap_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    def message_stream_converter(self: Any, generator: Any) -> AsyncIterator[str]:
        account = _Account()
        return account.added(original(self, account.of_chunks(generator)), _STOP)

    return message_stream_converter


_REASON = (
    "Whole answers have vLLM's field for KV transfer, in which we say what was done for a request; streams have not. "
    "Adds it to the chunk that ends a stream. Goes when vLLM's streams have it."
)
PATCHES = (
    Patch(
        owner=OpenAIServingCompletion,
        name="completion_stream_generator",
        parameters=("self", "request", "engine_inputs", "result_generator"),
        wrap=_wrap_completions,
        reason=_REASON,
    ),
    Patch(
        owner=OpenAIServingChat,
        name="chat_completion_stream_generator",
        parameters=("self", "request", "result_generator"),
        wrap=_wrap_chats,
        reason=_REASON,
    ),
    Patch(
        owner=AnthropicServingMessages,
        name="message_stream_converter",
        parameters=("self", "generator"),
        wrap=_wrap_messages,
        reason=_REASON,
    ),
)
