"""Outside judges of what we keep and of what it costs: NVIDIA's kvpress on the same checkpoint and prompts."""
