"""fastkv-vllm: KV-cache compression and token-selective prefill for vLLM."""

__version__ = "0.1.0"
