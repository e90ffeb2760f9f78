"""Tests of fastkv_vllm."""
