"""What a request may say about its own compression, through `vllm_xargs` or `SamplingParams.extra_args`."""

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec

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


def tokens_after_image(features: Sequence[MultiModalFeatureSpec], num_tokens: int) -> int:
    """Tokens of the first `num_tokens` of a prompt that follow its last image; 0 where it has none or ends in one.

    Text that a processor puts around an image is text.

    Args:
        features: of the request, what stands in place of its images.
        num_tokens: tokens of the prompt that are compressed.
    """
    ends = [end + 1 for f in features for start, end in f.mm_position.extract_embeds_range() if start < num_tokens]
    return max(num_tokens - max(ends), 0) if ends else 0
