"""Records `thrash.kvt`: a tiny model on a cache far too small, so that hits, evictions and preemptions all happen.

    python traces/samples/record_thrash.py OUT.kvt

Runs vLLM's CPU build on a made-up Llama (2 layers, weights of no meaning, lengths fixed) under `kvtrace record`: 64
conversations with one of six system prompts, three turns each, where a turn's prompt is all that was said before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def converse(model: str) -> None:
    """The run that is recorded."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, served_model_name="tiny-llama", load_format="dummy", skip_tokenizer_init=True,
        enforce_eager=True, seed=0, block_size=32,
        num_gpu_blocks_override=200, max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=1024,
    )  # fmt: skip
    rng = random.Random(11)
    words = [[rng.randrange(3, 500) for _ in range(n)] for n in (96, 128, 160, 224, 288, 320)]
    chats = [list(rng.choice(words)) for _ in range(64)]
    for _ in range(3):
        # Some say what others said before, as people do.
        said = [[rng.randrange(3, 500) for _ in range(rng.randrange(20, 120))] for _ in range(24)]
        for chat in chats:
            chat += rng.choice(said)
        order = rng.sample(range(64), 64)
        params = [
            SamplingParams(temperature=0, max_tokens=rng.randrange(16, 160), ignore_eos=True, detokenize=False)
            for _ in order
        ]
        answers = llm.generate([{"prompt_token_ids": chats[i]} for i in order], params, use_tqdm=False)
        for i, answer in zip(order, answers, strict=True):
            chats[i] += answer.outputs[0].token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model:
        converse(arguments.model)
        return
    with tempfile.TemporaryDirectory() as place:
        model, folder = Path(place) / "tiny-llama", Path(place) / "trace"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        command = [str(Path(sys.executable).parent / "kvtrace"), "record", "-o", str(folder), "--"]
        command += [sys.executable, __file__, str(arguments.out), "--model", str(model)]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
        (recorded,) = folder.glob("*.kvt")
        arguments.out.write_bytes(recorded.read_bytes())


if __name__ == "__main__":
    main()
