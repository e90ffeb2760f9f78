"""What `--kv-compression` and `--kv-compression-config` say, as one checked object."""

from fastkv_vllm.config.rules import UNMEASURED
from fastkv_vllm.config.tree import CompressionConfig

__all__ = ["UNMEASURED", "CompressionConfig"]
