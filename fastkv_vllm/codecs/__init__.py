"""How kept entries are stored in fewer bytes, one file each; importing this package fills the list."""

from fastkv_vllm.codecs.affine import AffineCodec
from fastkv_vllm.codecs.base import Codec, EntryShape, VectorCodec
from fastkv_vllm.codecs.channels import best_channels, best_value_channels
from fastkv_vllm.codecs.exact import ExactCodec
from fastkv_vllm.codecs.fp8 import Float8Codec
from fastkv_vllm.codecs.hierarchical import HierarchicalCodec
from fastkv_vllm.codecs.kivi import KiviCodec
from fastkv_vllm.codecs.merged import MERGES, VALUES, PairCodec, neighbours
from fastkv_vllm.codecs.skvq import LEVELS, ChannelGroups, SkvqCodec, num_groups, quantise_clipped

CODECS: dict[str, Codec] = {
    "fp8": Float8Codec(),
    "int8": AffineCodec(8),
    "int4": AffineCodec(4),
    "int2": AffineCodec(2),
    "kivi4": KiviCodec(4),
    "kivi2": KiviCodec(2),
    "int4x2": HierarchicalCodec(),
    "skvq": SkvqCodec(),
    "exact": ExactCodec(),
}
NO_CODEC = "none"  # entries are stored as they are
VECTOR_CODECS = {name: codec for name, codec in CODECS.items() if isinstance(codec, VectorCodec)}

__all__ = [
    "CODECS",
    "LEVELS",
    "MERGES",
    "NO_CODEC",
    "VALUES",
    "VECTOR_CODECS",
    "AffineCodec",
    "ChannelGroups",
    "Codec",
    "EntryShape",
    "ExactCodec",
    "Float8Codec",
    "HierarchicalCodec",
    "KiviCodec",
    "PairCodec",
    "SkvqCodec",
    "VectorCodec",
    "best_channels",
    "best_value_channels",
    "neighbours",
    "num_groups",
    "quantise_clipped",
]
