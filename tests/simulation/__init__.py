"""The re-simulation of vLLM's scheduler against a slow twin of it, and both against vLLM's own schedulers."""
