"""Run the real vLLM in tests: models, in-process engines, servers, and the real scheduler without a model."""
