"""Sizes of a dense decoder with grouped-query attention and a gated MLP, from its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs of a model.

    Fields:
        num_layers: decoder layers, L.
        hidden_size: width of a row, h.
        num_heads: query heads, Hq.
        num_kv_heads: KV heads, H.
        head_dim: D.
        intermediate_size: width of the gated MLP, I.
        vocab_size: V.
        tied: the output matrix is the embedding.
        weight_bytes: bytes per weight.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    weight_bytes: int = 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Shape of the model that a Hugging Face config.json describes.

        Raises:
            ValueError: a size is missing.
            NotImplementedError: experts, latent attention, attention that is not full, weights neither float nor fp8.
        """
        missing = [name for name in _SIZES if name not in config]
        if missing:
            raise ValueError(f"config.json must have {', '.join(_SIZES)}; {', '.join(missing)} missing")
        _refuse_other_designs(config)
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            weight_bytes=_weight_bytes(config),
        )

    @property
    def num_parameters(self) -> int:
        """L (2 h Hq D + 2 h H D + 3 h I + 2 h) + h + V h (twice unless tied): biases and head norms are left out."""
        layer = self.layer_weights(1) + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + self.hidden_size + embeddings

    def heads_of_rank(self, tensor_parallel: int) -> tuple[int, int]:
        """Query and KV heads of one of `tensor_parallel` ranks; KV heads are copied where there are more ranks.

        Raises:
            ValueError: the heads cannot be shared out evenly.
        """
        even = self.num_kv_heads % tensor_parallel == 0 or tensor_parallel % self.num_kv_heads == 0
        if self.num_heads % tensor_parallel != 0 or not even:
            raise ValueError(
                f"tensor_parallel must share out {self.num_heads} query heads and {self.num_kv_heads} KV heads evenly; "
                f"got {tensor_parallel}"
            )
        return self.num_heads // tensor_parallel, max(self.num_kv_heads // tensor_parallel, 1)

    def layer_weights(self, tensor_parallel: int) -> int:
        """Weights of one layer's matrices on one rank: h D (2 Hq + 2 H) + 3 h I, heads and I being the rank's."""
        heads, kv_heads = self.heads_of_rank(tensor_parallel)
        attention = self.hidden_size * self.head_dim * (2 * heads + 2 * kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size // tensor_parallel


_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


def _refuse_other_designs(config: Mapping[str, Any]) -> None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank"):
        if config.get(name):
            raise NotImplementedError(f"only dense decoders with grouped-query attention; config.json has {name}")
    kinds = set(config.get("layer_types") or ["full_attention"])
    slides = config.get("sliding_window") and config.get("use_sliding_window", True)
    if kinds != {"full_attention"} or slides:
        raise NotImplementedError("only full attention in all layers; config.json has a sliding window or other kinds")


def _weight_bytes(config: Mapping[str, Any]) -> int:
    quantization = config.get("quantization_config")
    if quantization is not None:
        if quantization.get("quant_method") != "fp8":
            raise NotImplementedError(f"only fp8 among quantized weights; got {quantization.get('quant_method')!r}")
        return 1
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if name not in WEIGHT_BYTES:
        raise NotImplementedError(f"dtype of weights must be one of {', '.join(WEIGHT_BYTES)}; got {name!r}")
    return WEIGHT_BYTES[name]


# The sizes in the models' public config.json; weights are bf16 and embeddings untied.
_EIGHT_KV_HEADS = {"num_kv_heads": 8, "head_dim": 128}
MODELS = {
    "llama-3.1-8b": ModelShape(
        num_layers=32, hidden_size=4096, num_heads=32, intermediate_size=14336, vocab_size=128256, **_EIGHT_KV_HEADS
    ),
    "llama-3.1-70b": ModelShape(
        num_layers=80, hidden_size=8192, num_heads=64, intermediate_size=28672, vocab_size=128256, **_EIGHT_KV_HEADS
    ),
    "qwen3-8b": ModelShape(
        num_layers=36, hidden_size=4096, num_heads=32, intermediate_size=12288, vocab_size=151936, **_EIGHT_KV_HEADS
    ),
    "qwen3-32b": ModelShape(
        num_layers=64, hidden_size=5120, num_heads=64, intermediate_size=25600, vocab_size=151936, **_EIGHT_KV_HEADS
    ),
}
