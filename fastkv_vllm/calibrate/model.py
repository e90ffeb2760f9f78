"""A causal language model of transformers whose attention is a function of ours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from fastkv_vllm.calibrate.errors import CalibrationError

DTYPES = ("auto", "float32", "bfloat16")  # auto: as the weights are stored
# layer, roped and scaled queries [Hq, n, D], roped keys [H, N, D], values [H, N, D] -> output [Hq, n, D].
# The queries are the last n of the N tokens; n is N for a prompt and 1 for a token decoded after it.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_NAME = "fastkv_calibrate"
_NOT_UNDERSTOOD = ("sliding_window", "softcap", "s_aux")  # arguments of attention that would change its result


class CalibrationModel:
    """One sequence at a time through a model with grouped-query attention, frozen.

    Works for every architecture that takes its attention from transformers' attention interface (Llama, Mistral, Qwen2,
    Qwen3, Phi-3, Gemma and most others): the interface passes queries and keys after RoPE, whatever the projections.

    Fields:
        num_layers, num_query_heads, num_kv_heads: L, Hq and H.
    """

    def __init__(self, directory: Path, *, dtype: str = "auto", device: str = "cpu") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        self._model.to(device).eval().requires_grad_(False)
        self._device = device
        config = self._model.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.num_query_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        stops = self._model.generation_config.eos_token_id
        self._stops = set(stops if isinstance(stops, list) else [stops])

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], attend: Attend) -> None:
        """Run a prompt for what `attend` sees."""
        with self._attending(attend):
            self._model(self._ids(token_ids), use_cache=False, logits_to_keep=1)

    @torch.inference_mode()
    def decode(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        attend: Attend,
        on_token: Callable[[int], None] = lambda token: None,
    ) -> list[int]:
        """Tokens of greedy decoding, at most `max_new_tokens`, without the end mark that may have stopped it.

        Args:
            on_token: called with each token, the end mark included, after the layers whose last row gave it.
        """
        cache, inputs = DynamicCache(), self._ids(token_ids)
        generated: list[int] = []
        with self._attending(attend):
            while len(generated) < max_new_tokens:
                logits = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                token = int(logits[0, -1].argmax())
                on_token(token)
                if token in self._stops:
                    break
                generated.append(token)
                inputs = self._ids([token])
        return generated

    def final_hidden(self, token_ids: Sequence[int], rows: slice, attend: Attend) -> Tensor:
        """Rows of the last layer's output after the final norm, [n, hidden_size], float32."""
        with self._attending(attend):
            return self._base()(self._ids(token_ids), use_cache=False).last_hidden_state[0, rows].float()

    @torch.inference_mode()
    def next_tokens(self, token_ids: Sequence[int], count: int, attend: Attend) -> Tensor:
        """The most likely token after each of the last `count` tokens, [count] int64."""
        with self._attending(attend):
            return self._model(self._ids(token_ids), use_cache=False, logits_to_keep=count).logits[0].argmax(dim=-1)

    @contextmanager
    def recomputing(self, attend: Attend) -> Iterator[None]:
        """Inside, a backward pass computes each layer again instead of keeping its activations.

        It must run in here, with the `attend` of its forward pass.
        """
        self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model.train()  # transformers recomputes in training only; weights stay frozen
        try:
            with self._attending(attend):
                yield
        finally:
            self._model.eval()
            self._model.gradient_checkpointing_disable()

    @property
    def device(self) -> str:
        """Where tensors that meet the model's must be."""
        return self._device

    def _base(self) -> nn.Module:
        return self._model.base_model

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], device=self._device)

    @contextmanager
    def _attending(self, attend: Attend) -> Iterator[None]:
        before = self._model.config._attn_implementation
        AttentionInterface.register(_NAME, _Adapter(attend))
        self._model.set_attn_implementation(_NAME)
        if self._model.config._attn_implementation != _NAME:
            raise CalibrationError(
                "the model must take its attention from transformers' attention interface; "
                f"{type(self._model).__name__} does not: calibrate a model that does"
            )
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)


class _Adapter:
    """transformers' attention interface around an `Attend`."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
        scaling: float, **more: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [1, Hq, n, D], key and value [1, H, N, D]; the result is [1, n, Hq, D]."""
        strange = [name for name in _NOT_UNDERSTOOD if more.get(name) is not None]
        if strange:
            raise CalibrationError(
                f"every layer must have plain causal attention; layer {module.layer_idx} has {', '.join(strange)}: "
                "compression does not serve such models either"
            )
        out = self._attend(int(module.layer_idx), query[0] * scaling, key[0], value[0])
        return out.transpose(0, 1)[None], None


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Plain attention of the last n of N tokens, n = N or 1.

    Args:
        queries: roped and scaled, [Hq, n, D].
        keys, values: [H, N, D].

    Returns:
        Output [Hq, n, D].
    """
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    assert num_queries in (1, num_keys), f"{num_queries} queries to {num_keys} keys: neither a prompt nor one token"
    return grouped_attention(queries, keys, values, is_causal=num_queries == num_keys)


def attention_of_last(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention [Hq, n, D] of the last n of N tokens, each to those up to its own; arguments as `causal_attention`."""
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=keys.device).tril(num_keys - num_queries)
    return grouped_attention(queries, keys, values, mask=mask)


def grouped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Attention [Hq, n, D] of scaled queries [Hq, n, D] to keys and values [H, N, D]; mask [n, N], True = visible."""
    out = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask, is_causal=is_causal, scale=1.0, enable_gqa=True
    )
    return out[0]
