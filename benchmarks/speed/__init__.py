"""What compression costs and saves in time and memory, against plain vLLM and vLLM's own quantised caches."""

from benchmarks.child import CHILD_ENVIRONMENT, run_in_child

__all__ = ["CHILD_ENVIRONMENT", "run_in_child"]
