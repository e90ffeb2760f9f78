"""Benchmarks of fastkv_vllm: kernels, serving, and answer quality on a small real model."""
