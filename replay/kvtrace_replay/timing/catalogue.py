"""Devices and models that have names: what their makers publish of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtrace_replay.timing.architecture import Architecture, architecture, read_config
from kvtrace_traces.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """A device. `flops`: dense bf16 operations a second; `memory_bytes_per_s`, `memory_bytes`; `link_bytes_per_s`: of
    its link to the host, one way, as reached in practice with pinned memory; `source`."""

    name: str
    flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    source: str


# What is reached of PCIe with large pinned copies: 25 of 32 GB/s (4.0 x16), 52 of 63 GB/s (5.0 x16).
_PCIE4, _PCIE5 = 25e9, 52e9


def _gpu(name: str, tflops: float, gb_per_s: float, gb: float, link: float, source: str) -> Gpu:
    return Gpu(name, tflops * 1e12, gb_per_s * 1e9, gb * 1e9, link, source)


# bf16 rates are the dense ones; data sheets often print the doubled figure for sparse matrices.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10g", 70, 600, 24, _PCIE4, "NVIDIA A10G data sheet"),
        _gpu("a100-40gb", 312, 1555, 40, _PCIE4, "NVIDIA A100 data sheet, 40 GB"),
        _gpu("a100-80gb", 312, 2039, 80, _PCIE4, "NVIDIA A100 data sheet, 80 GB SXM"),
        _gpu("b200", 2250, 8000, 180, _PCIE5, "NVIDIA DGX B200 data sheet, one of eight"),
        _gpu("h100", 989, 3350, 80, _PCIE5, "NVIDIA H100 data sheet, SXM"),
        _gpu("h100-pcie", 756, 2000, 80, _PCIE5, "NVIDIA H100 PCIe product brief"),
        _gpu("h200", 989, 4800, 141, _PCIE5, "NVIDIA H200 data sheet, SXM"),
        _gpu("l4", 121, 300, 24, _PCIE4, "NVIDIA L4 data sheet"),
        _gpu("l40s", 362, 864, 48, _PCIE4, "NVIDIA L40S data sheet"),
        _gpu("mi300x", 1307, 5300, 192, _PCIE5, "AMD Instinct MI300X data sheet"),
        _gpu("rtx-4090", 165, 1008, 24, _PCIE4, "NVIDIA Ada GPU architecture white paper, RTX 4090"),
    )
}  # fmt: skip


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, feed: int, words: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": feed, "vocab_size": words, "tie_word_embeddings": False,
        **more,
    }  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden, "vocab_size": 50272, "max_position_embeddings": 2048, "torch_dtype": "float16",
    }  # fmt: skip


_LLAMA_2_7B = _llama(4096, 32, 32, 32, 11008, 32000, torch_dtype="float16")
_LLAMA_3_8B = _llama(4096, 32, 32, 8, 14336, 128256)
_LLAMA_3_70B = _llama(8192, 80, 64, 8, 28672, 128256)
#: Keys of each model's config.json, and whose it is (a repository on huggingface.co, file config.json).
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek-v3": ({
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "intermediate_size": 18432, "vocab_size": 129280, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "tie_word_embeddings": False, "quantization_config": {"quant_method": "fp8"},
    }, "deepseek-ai/DeepSeek-V3"),
    "llama-2-7b": (_LLAMA_2_7B, "meta-llama/Llama-2-7b-hf"),
    "llama-2-13b": (_llama(5120, 40, 40, 40, 13824, 32000, torch_dtype="float16"), "meta-llama/Llama-2-13b-hf"),
    "llama-2-70b": (_llama(8192, 80, 64, 8, 28672, 32000, torch_dtype="float16"), "meta-llama/Llama-2-70b-hf"),
    "llama-3-8b": (_LLAMA_3_8B, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": (_LLAMA_3_70B, "meta-llama/Meta-Llama-3-70B"),
    "llama-3.1-8b": (_LLAMA_3_8B, "meta-llama/Llama-3.1-8B"),
    "llama-3.1-70b": (_LLAMA_3_70B, "meta-llama/Llama-3.1-70B"),
    "llama-3.3-70b": (_LLAMA_3_70B, "meta-llama/Llama-3.3-70B-Instruct"),
    "mistral-7b": (_llama(4096, 32, 32, 8, 14336, 32000), "mistralai/Mistral-7B-v0.1"),
    "mixtral-8x7b": (
        _llama(4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
        "mistralai/Mixtral-8x7B-v0.1",
    ),
    "opt-6.7b": (_opt(4096, 32, 32), "facebook/opt-6.7b"),
    "opt-30b": (_opt(7168, 48, 56), "facebook/opt-30b"),
    "qwen2.5-7b": (_llama(3584, 28, 28, 4, 18944, 152064, model_type="qwen2"), "Qwen/Qwen2.5-7B"),
    "qwen2.5-72b": (_llama(8192, 80, 64, 8, 29568, 152064, model_type="qwen2"), "Qwen/Qwen2.5-72B"),
    "smollm2-135m": (
        _llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True), "HuggingFaceTB/SmolLM2-135M",
    ),
    "yarn-llama-2-7b-64k": (_LLAMA_2_7B, "NousResearch/Yarn-Llama-2-7b-64k"),
}  # fmt: skip


def find_gpu(named: str) -> Gpu:
    """The device of that name. Raises UsageError where there is none."""
    key = named.lower().replace("_", "-")
    if key not in GPUS:
        raise UsageError(f"there is no GPU {named!r}{_hint(key, list(GPUS))}")
    return GPUS[key]


def find_model(named: str) -> Architecture:
    """The model of that name, or the one whose `config.json` (the file, or a folder with it) is named.

    Raises UsageError where there is none, KvtraceError where the file cannot be used.
    """
    key = named.lower().replace("_", "-").rsplit("/", 1)[-1].removesuffix("-hf")
    if key in MODELS and not Path(named).exists():
        return architecture(key, MODELS[key][0])
    if Path(named).exists():
        return architecture(*read_config(Path(named)))
    raise UsageError(f"there is no model {named!r}, and no config.json of that path{_hint(key, list(MODELS))}")


def _hint(key: str, known: list[str]) -> str:
    near = [name for name in known if name.startswith(key)] or difflib.get_close_matches(key, known, n=1)
    return f": did you mean {' or '.join(near[:3])}?" if near and key else f"; known: {', '.join(known)}"
