"""Re-simulations of the schedulers of LLM engines: which requests run in each step, and which blocks they get."""
