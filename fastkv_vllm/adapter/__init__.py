"""Everything that touches vLLM. No other folder imports it; an upgrade of vLLM changes this one only."""
