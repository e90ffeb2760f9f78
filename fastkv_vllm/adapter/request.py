"""What a request may say about its own compression, through `vllm_xargs` or `SamplingParams.extra_args`."""

from typing import Any

from vllm.exceptions import VLLMValidationError

CONTEXT_TOKENS = "kv_context_tokens"


def context_tokens(params: Any, num_prompt_tokens: int) -> int:
    """Leading prompt tokens that are compressed; those after them are read against what stayed.

    A prompt is compressed whole unless its request says otherwise: `kv_context_tokens` makes the choice of entries
    blind to a question that follows the context, as it is when one compressed context serves many questions.

    Args:
        params: SamplingParams, or None for a request that does not sample.
        num_prompt_tokens: tokens of the prompt.

    Raises:
        VLLMValidationError: the value is not an integer in 1..num_prompt_tokens.
    """
    extra_args = getattr(params, "extra_args", None) or {}
    if CONTEXT_TOKENS not in extra_args:
        return num_prompt_tokens
    value = extra_args[CONTEXT_TOKENS]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= num_prompt_tokens:
        raise VLLMValidationError(
            f"{CONTEXT_TOKENS} must be an integer in 1..{num_prompt_tokens}, the tokens of this prompt; got {value!r}"
        )
    return value
