"""Models made on the spot, for measurements in which the weights' values do not matter."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class LlamaShape:
    """Size of a Llama. Defaults: 16 layers, d 512, groups of 4 query heads, 8 KiB of bfloat16 cache a token."""

    num_hidden_layers: int = 16
    hidden_size: int = 512
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1536
    vocab_size: int = 512
    max_position_embeddings: int = 16384


def make_random_llama(
    directory: Path, shape: LlamaShape | None = None, *, seed: int = 0, dtype: str = "bfloat16"
) -> Path:
    """Write a random checkpoint (config.json and safetensors, no tokenizer) and return its directory.

    Args:
        directory: created if missing; a checkpoint in it is overwritten.
        shape: None for `LlamaShape()`.
        seed: the same arguments give the same weights.
        dtype: name of the torch dtype of the stored weights.
    """
    config = LlamaConfig(
        **asdict(shape or LlamaShape()), bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype=dtype
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
