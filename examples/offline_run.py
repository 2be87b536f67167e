"""A small offline vLLM run to try the tracer on: a made-up model, 60 requests with shared beginnings, a small cache.

    kvtrace record -o my-trace -- python examples/offline_run.py
    kvtrace info my-trace

Needs vLLM: on a machine without a GPU, `make engine` installs its CPU build into .venv.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    rng = random.Random(0)
    beginnings = [[rng.randrange(3, 500) for _ in range(128)] for _ in range(4)]
    prompts = [rng.choice(beginnings) + [rng.randrange(3, 500) for _ in range(60)] for _ in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(
            model=folder, served_model_name="tiny-llama", load_format="dummy", skip_tokenizer_init=True,
            enforce_eager=True, num_gpu_blocks_override=60, max_model_len=1024, block_size=32, max_num_seqs=16,
        )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    cached = sum(output.num_cached_tokens for output in outputs)
    print(f"{len(outputs)} requests done; {cached:,} of {sum(map(len, prompts)):,} prompt tokens came out of the cache")


if __name__ == "__main__":
    main()
