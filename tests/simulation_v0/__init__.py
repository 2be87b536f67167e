"""The simulation of vLLM 0.4.2 against a slow twin of it, and both against vLLM 0.4.2's own scheduler."""
