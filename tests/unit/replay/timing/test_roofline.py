"""Sizes of models against published figures and hand arithmetic; profiles from data sheets against the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtrace_replay.timing.architecture import architecture
from kvtrace_replay.timing.catalogue import GPUS, MODELS, find_gpu, find_model
from kvtrace_replay.timing.roofline import Efficiency, roofline
from kvtrace_traces.errors import KvtraceError, UsageError

#: Parameters that are published with the weights (the count that huggingface.co shows, from the safetensors files).
PUBLISHED = {
    "deepseek-v3": 671_026_419_200, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "opt-6.7b": 6_658_473_984, "opt-30b": 29_974_540_288,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648, "smollm2-135m": 134_515_008,
    "yarn-llama-2-7b-64k": 6_738_415_616,
}  # fmt: skip
#: layers * 2 * KV heads * head size * bytes of an element; with MLA layers * (latent + rotary key) * bytes.
KV_BYTES = {
    "deepseek-v3": 61 * (512 + 64) * 2, "llama-2-7b": 32 * 2 * 32 * 128 * 2, "llama-2-13b": 40 * 2 * 40 * 128 * 2,
    "llama-2-70b": 80 * 2 * 8 * 128 * 2, "llama-3-8b": 32 * 2 * 8 * 128 * 2, "llama-3-70b": 80 * 2 * 8 * 128 * 2,
    "llama-3.1-8b": 131_072, "llama-3.1-70b": 327_680, "llama-3.3-70b": 327_680, "mistral-7b": 131_072,
    "mixtral-8x7b": 131_072, "opt-6.7b": 32 * 2 * 32 * 128 * 2, "opt-30b": 48 * 2 * 56 * 128 * 2,
    "qwen2.5-7b": 28 * 2 * 4 * 128 * 2, "qwen2.5-72b": 80 * 2 * 8 * 128 * 2, "smollm2-135m": 23_040,
    "yarn-llama-2-7b-64k": 512 * 1024,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_published(name: str) -> None:
    found = find_model(name)
    assert found.parameters == PUBLISHED[name]
    assert found.kv_bytes_per_token() == KV_BYTES[name]
    assert found.kv_tensors == (1 if name.startswith("deepseek") else 2)
    assert "/" in MODELS[name][1]


def test_active_parameters_of_experts() -> None:
    """Published as 12.9 and 37 billion (36.6 without the table of embeddings)."""
    assert find_model("mixtral-8x7b").active_parameters == 12_879_925_248
    deep = find_model("deepseek-v3")
    assert (deep.active_parameters - deep.head_matmul) / 1e9 == pytest.approx(36.6, abs=0.05)
    assert deep.kv_bytes_per_token(1) == 61 * 576
    assert find_model("llama-3.1-8b").active_parameters == find_model("llama-3.1-8b").parameters


def test_a_recorded_engine_agrees() -> None:
    """The header of the sample says what vLLM allocated for SmolLM2-135M."""
    import kvtrace_traces

    sample = Path(__file__).parents[4] / "traces" / "samples" / "chat.kvt"
    header = kvtrace_traces.open_trace(sample).header
    found = find_model("smollm2-135m")
    assert header["bytes_per_token"] == found.kv_bytes_per_token()
    assert header["layers"] == found.layers


SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
JUDGED = {
    "LlamaConfig": {"attention_bias": True, "tie_word_embeddings": True}, "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 64},
    "Qwen2MoeConfig": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                       "shared_expert_intermediate_size": 512},
    "Qwen3MoeConfig": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                       "mlp_only_layers": [1]},
    "GemmaConfig": {"head_dim": 32}, "Phi3Config": {"pad_token_id": 0}, "GraniteConfig": {}, "Starcoder2Config": {},
    "GPTNeoXConfig": {"num_key_value_heads": 8},
    "DeepseekV2Config": {"num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
                         "moe_intermediate_size": 128, "n_shared_experts": 2, "first_k_dense_replace": 1,
                         "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
                         "v_head_dim": 32},
}  # fmt: skip


@pytest.mark.engine
def test_parameters_are_those_that_transformers_makes() -> None:
    """Each family built by `transformers` itself, without memory for the weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name, changes in JUDGED.items():
        config = getattr(transformers, name)(**{**SMALL, **changes})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert architecture(name, config.to_dict()).parameters == counted, name


# ------------------------------------------------------------------ by hand


def test_yarn_on_an_a100_by_hand() -> None:
    """Every cost from the figures of the data sheet and of the model's config."""
    profile = roofline("a100-40gb", "yarn-llama-2-7b-64k")
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    flops, memory = 312e12 * 0.6, 1555e9 * 0.8
    weights = 2 * (6_738_415_616 - 32000 * 4096)
    assert profile.costs["call"] == pytest.approx(1e6 + weights / memory * 1e9)
    assert profile.costs["prefill_token"] == pytest.approx(2 * 32 * layer / flops * 1e9)
    assert profile.costs["prefill_pair"] == pytest.approx(4 * 32 * 32 * 128 / (312e12 * 0.4) * 1e9)
    assert profile.costs["decode_row"] == pytest.approx(2 * (32 * layer + 32000 * 4096) / flops * 1e9)
    assert profile.costs["decode_context"] == pytest.approx(524288 / memory * 1e9)
    assert profile.model.copies_per_block == 64
    assert profile.block_bytes(16) == 8 << 20
    assert profile.step_costs(16).block_in == pytest.approx(64 * 6000 + (8 << 20) / 25e9 * 1e9)
    gathered = 8 << 20
    assert profile.step_costs(16, copies="gathered").block_in == pytest.approx(
        gathered / 25e9 * 1e9 + 2 * gathered / memory * 1e9
    )
    assert profile.transfer_ns(gathered, 1, "d2h", pinned=False) == pytest.approx(6000 + gathered / 10e9 * 1e9)


def test_the_known_shape_of_swap_and_recompute() -> None:
    """A request of 1500 + 1024 tokens: recompute does not know of blocks; swap is cheaper the larger they are."""
    profile = roofline("a100-40gb", "yarn-llama-2-7b-64k")
    swaps = [profile.swap_ns(-(-2524 // size), size) for size in (8, 16, 32, 64, 128)]
    assert swaps == sorted(swaps, reverse=True)
    assert swaps[0] > 1.5 * profile.recompute_ns(2524) > 1.5 * swaps[-1]
    assert profile.swap_ns(158, 16) > profile.swap_ns(158, 16, copies="gathered")


def test_mla_works_on_its_latent_vectors() -> None:
    """Decode with 128 heads on 576 elements a token is bound by arithmetic, not by reading them."""
    deep = find_model("deepseek-v3")
    assert deep.pair_flops == 61 * 2 * 128 * (128 + 64 + 128)
    assert deep.context_flops == 61 * 2 * 128 * (2 * 512 + 64)
    profile = roofline("h200", "deepseek-v3", Efficiency(tensor_parallel=8))
    assert profile.costs["decode_context"] == pytest.approx(deep.context_flops / (8 * 989e12 * 0.4) * 1e9)
    assert profile.model.copies_per_block == 61
    assert profile.facts["weight_bytes"] == deep.parameters  # fp8


def test_assumptions_scale_costs() -> None:
    base = roofline("l4", "qwen2.5-7b")
    half = roofline("l4", "qwen2.5-7b", Efficiency(compute=0.3, attention=0.2, memory=0.4, overhead_us=0))
    assert half.costs["prefill_token"] == pytest.approx(2 * base.costs["prefill_token"])
    assert half.costs["prefill_pair"] == pytest.approx(2 * base.costs["prefill_pair"])
    assert half.costs["call"] == pytest.approx(2 * (base.costs["call"] - 1e6))
    two = roofline("l4", "qwen2.5-7b", Efficiency(tensor_parallel=2))
    assert two.costs["decode_row"] == pytest.approx(base.costs["decode_row"] / 2)
    narrow = roofline("l4", "qwen2.5-7b", Efficiency(kv_element_bytes=1))
    assert narrow.model.kv_bytes_per_token == 28 * 2 * 4 * 128
    assert base.facts["compute"] == 0.6
    for wrong in (
        Efficiency(compute=0), Efficiency(memory=1.1), Efficiency(overhead_us=-1), Efficiency(copy_us=1e12),
        Efficiency(tensor_parallel=0), Efficiency(kv_element_bytes=4), Efficiency(attention=float("nan")),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            roofline("l4", "qwen2.5-7b", wrong)


def test_data_sheets() -> None:
    assert {"a100-40gb", "a100-80gb", "h100", "h200", "l4", "l40s", "a10g", "mi300x"} <= set(GPUS)
    a100 = find_gpu("A100_40GB")
    assert (a100.flops, a100.memory_bytes_per_s, a100.memory_bytes, a100.link_bytes_per_s) == (
        312e12, 1555e9, 40e9, 25e9,
    )  # fmt: skip
    assert all(gpu.source and gpu.link_bytes_per_s < gpu.memory_bytes_per_s for gpu in GPUS.values())


# ------------------------------------------------------------------ config.json


def config(tmp_path: Path, content: object) -> Path:
    folder = tmp_path / "a-model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_config_as_file_and_folder(tmp_path: Path) -> None:
    folder = config(tmp_path, MODELS["llama-3.1-8b"][0])
    for path in (folder, folder / "config.json"):
        found = find_model(str(path))
        assert (found.name, found.parameters) == ("a-model", PUBLISHED["llama-3.1-8b"])
    assert find_model("meta-llama/Llama-2-7b-hf").parameters == PUBLISHED["llama-2-7b"]
    inner = config(tmp_path, {"model_type": "llava", "text_config": MODELS["mistral-7b"][0]})
    assert find_model(str(inner)).parameters == PUBLISHED["mistral-7b"]
    wide = config(tmp_path, {**MODELS["llama-3.1-8b"][0], "torch_dtype": "float32"})
    assert find_model(str(wide)).kv_bytes_per_token() == 131_072  # engines serve it in 16 bits
    quarter = config(tmp_path, {**MODELS["llama-3.1-8b"][0], "quantization_config": {"bits": 4, "quant_method": "awq"}})
    assert find_model(str(quarter)).weight_bytes == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": None}, "has no num_hidden_layers"), ({"hidden_size": "big"}, "hidden_size must be a"),
        ({"hidden_size": 0}, "hidden_size must be"), ({"hidden_size": 1e3}, "hidden_size must be"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads 5"), ({"vocab_size": 10**12}, "vocab_size"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "are no attention"),
        ({"mamba_d_state": 16}, "are no attention"),
        ({"torch_dtype": "int3"}, "dtype 'int3' is none of"), ({"num_local_experts": 4}, "has no num_experts_per_tok"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "above the number of experts"),
        ({"kv_lora_rank": 512}, "has no qk_rope_head_dim"),
        ({"quantization_config": {"bits": 99}}, "bits must be from 1 to 32"),
    ],
)  # fmt: skip
def test_wrong_configs(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = config(tmp_path, {**MODELS["llama-3.1-8b"][0], **change})
    with pytest.raises(KvtraceError, match=said) as caught:
        find_model(str(folder))
    assert "a-model" in str(caught.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    for content, said in (("{", "is no JSON"), ("[1]", "a JSON object is expected"), ("[" * 100_000, "is no JSON")):
        with pytest.raises(KvtraceError, match=said):
            find_model(str(config(tmp_path, content)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(KvtraceError, match="cannot read"):
        find_model(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="there is no model 'llama-2-8b', and no config"):
        find_model("llama-2-8b")
    with pytest.raises(UsageError, match="known: deepseek-v3"):
        find_model("zzz")
