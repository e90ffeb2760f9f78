"""Small random checkpoints of real architectures, saved as transformers would save a trained one."""

from pathlib import Path

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# family -> (config class, model class, settings that only this family has)
_RECIPES: dict[str, tuple[type, type, dict[str, object]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": False, "mlp_bias": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False, "sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"use_sliding_window": False, "sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None, "original_max_position_embeddings": 8192}),
    "gemma": (
        GemmaConfig,
        GemmaForCausalLM,
        {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
}
FAMILIES = tuple(_RECIPES)
_IMPLIED_HEAD_DIM = (
    "qwen2",
    "phi3",
)  # vLLM or transformers computes hidden_size / num_heads and ignores head_dim


def make_checkpoint(
    directory: Path,
    family: str,
    *,
    num_layers: int = 8,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    vocab_size: int = 512,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write a random checkpoint (config.json and safetensors, no tokenizer) and return its directory.

    The same arguments give the same weights. None is neutral: norm weights differ from 1 and biases from 0.

    Args:
        directory: created if missing.
        family: one of FAMILIES.
        head_dim: vLLM's CPU attention lists 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512.
        dtype: the name of a torch dtype, in which the weights are stored.

    Raises: ValueError for an unknown family, or a head_dim that the family cannot have.
    """
    if family not in _RECIPES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if family in _IMPLIED_HEAD_DIM and num_heads * head_dim != hidden_size:
        raise ValueError(
            f"{family} needs num_heads * head_dim == hidden_size; got {num_heads} * {head_dim} != {hidden_size}"
        )
    config_class, model_class, own_settings = _RECIPES[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"tie_word_embeddings": False} | own_settings),
    )
    model = model_class(config)
    randomise(model, seed)
    if family == "gemma":
        _adapt_to_gemma(model)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return Path(directory)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: large matrices make attention peaky and logits spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # a tied lm_head is listed once, as the embedding
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(1.4 + 0.2 * noise)  # at 1.0 a normed query and key give flat attention
        elif "norm" in name:
            parameter.copy_(1.0 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(0.12 * noise)


@torch.no_grad()
def _adapt_to_gemma(model: torch.nn.Module) -> None:
    """Subtract the 1 that Gemma adds to norm weights; keep the tied embedding from repeating the input.

    A smaller embedding leaves the residual stream to the layers; the larger final norm gives the logits their
    size back.
    """
    model.model.embed_tokens.weight /= 4.0
    model.model.norm.weight *= 4.0
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter -= 1.0
