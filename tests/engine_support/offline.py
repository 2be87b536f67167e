"""A user's offline script: `python offline.py MODEL --requests N [--status S]` runs `LLM.generate`, prints the tokens.

Run as a program by the tests, with and without `kvtrace record` in front. `--announce FILE` touches FILE when the first
requests are under way, so that a test can send its signal then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--output", type=int, default=40)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--announce", type=Path)
    arguments = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=arguments.model, skip_tokenizer_init=True, enforce_eager=True, seed=0, num_gpu_blocks_override=40,
        max_model_len=1024, block_size=32, max_num_seqs=8, max_num_batched_tokens=256,
    )  # fmt: skip
    rng = random.Random(3)
    shared = [[rng.randrange(3, 500) for _ in range(80)] for _ in range(3)]
    prompts = [rng.choice(shared) + [rng.randrange(3, 500) for _ in range(40)] for _ in range(arguments.requests)]
    if arguments.announce:

        def announce() -> None:
            time.sleep(1.0)
            arguments.announce.touch()

        threading.Thread(target=announce, daemon=True).start()
    params = SamplingParams(temperature=0, max_tokens=arguments.output, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    said = [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs]
    print("RESULT " + json.dumps(said), flush=True)
    print(f"plugins {os.environ.get('VLLM_PLUGINS')}", file=sys.stderr)
    sys.exit(arguments.status)


if __name__ == "__main__":
    main()
