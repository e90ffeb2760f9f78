"""The files of a Hugging Face checkpoint of the tiny model, as transformers and vLLM load it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.tiny_model import model as tiny
from benchmarks.tiny_model.language import BOS, END, PAD, VOCAB_SIZE, build_tokenizer

MAX_POSITIONS = 8192

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": tiny.HIDDEN_SIZE,
    "intermediate_size": tiny.FFN_SIZE,
    "num_hidden_layers": tiny.NUM_LAYERS,
    "num_attention_heads": tiny.NUM_HEADS,
    "num_key_value_heads": tiny.NUM_KV_HEADS,
    "head_dim": tiny.HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": tiny.ROPE_THETA},
    "rms_norm_eps": tiny.RMS_EPS,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
GENERATION_CONFIG = {
    "do_sample": False, "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip


def save_checkpoint(model: tiny.Llama, directory: Path) -> None:
    """Write configuration, bfloat16 weights and tokenizer into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    weights_file = directory / "model.safetensors"
    save_file(weights, weights_file, metadata={"format": "pt"})
    weights_file.chmod(0o644)  # safetensors writes files that only their owner reads
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.save_pretrained(directory)
