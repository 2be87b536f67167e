"""vLLM V1's scheduler and block pool, compiled: what `docs/vllm-semantics.md` says, rule by rule."""
