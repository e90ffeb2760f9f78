"""Tests that start `vllm serve` as a subprocess."""
