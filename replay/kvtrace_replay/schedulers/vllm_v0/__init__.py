"""vLLM 0.4.2's scheduler and block manager, compiled: what `docs/vllm-v0-semantics.md` says, rule by rule."""
