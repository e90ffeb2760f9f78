"""Tests that start vLLM engines in this process."""
