"""One file per patched upstream symbol; `Patch` checks the target before it touches it."""

from fastkv_vllm.adapter.patches.base import Patch

__all__ = ["Patch"]
