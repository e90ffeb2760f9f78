"""What compression costs and saves in time and memory, against plain vLLM and vLLM's own quantised caches."""
