"""What a transformer's `config.json` says of its size: parameters, KV bytes of a token, work of a token.

Keys are those of Hugging Face's `transformers`. Known: decoders with full attention (multi-head, grouped-query, or
DeepSeek's latent attention, MLA), with plain, gated or mixture-of-experts layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtrace_traces.errors import KvtraceError

_MOST = 10**9
_MOST_BYTES = 16 << 20
#: Their feed-forward layers are two matrices; everybody else's are three, one of them a gate.
_PLAIN = frozenset({"opt", "gpt_neox", "phi", "starcoder2"})
_QKV_BIAS = frozenset({"qwen2", "qwen2_moe", "opt", "gpt_neox", "phi", "starcoder2"})
_ALL_BIASES = frozenset({"opt", "gpt_neox", "phi", "starcoder2"})
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "half": 2}


@dataclass(frozen=True)
class Architecture:
    """A model's sizes. Parameters are counts; `token_matmul`: weights that one token is multiplied with in all layers,
    the output head not among them (`head_matmul`); `tied`: the head is the table of embeddings; `pair_flops`: of one
    query and one key in all layers; `context_flops`: the same of a decode row (more with MLA, which then works in the
    latent space); `intermediate`: width of a dense feed-forward layer of `feed_matrices` matrices; `experts`: 0 where
    every layer is dense."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    active_parameters: int
    token_matmul: int
    head_matmul: int
    tied: bool
    pair_flops: int
    context_flops: int
    kv_tensors: int
    kv_elements_per_token: int
    element_bytes: int
    weight_bytes: float
    intermediate: int
    feed_matrices: int
    experts: int
    vocabulary: int

    def kv_bytes_per_token(self, kv_element_bytes: int | None = None) -> int:
        """Bytes of keys and values of a token over all layers; elements as wide as the model's unless given."""
        return self.kv_elements_per_token * (kv_element_bytes or self.element_bytes)


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Name and content of a `config.json`, or of the one in a folder.

    Raises KvtraceError where it cannot be read or is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise KvtraceError(f"{file} is larger than {_MOST_BYTES >> 20} MiB: that is no config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise KvtraceError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise KvtraceError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise KvtraceError(f"{file} is no config.json: a JSON object is expected")
    name = config.get("_name_or_path")
    return (str(name) if isinstance(name, str) and name else file.resolve().parent.name), config


def architecture(name: str, config: dict[str, Any]) -> Architecture:
    """The sizes of a model from the keys of its `config.json`.

    Raises KvtraceError, naming the key, where one is missing or wrong, and for layers that are no attention.
    """
    for inner in ("text_config", "llm_config", "language_config"):  # models that also see or hear
        if isinstance(config.get(inner), dict):
            config = {**config, **config[inner]}
    keys = _Keys(name, config)
    kinds = {str(kind) for kind in config.get("layer_types") or []}
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"} or "mamba_d_state" in config:
        raise KvtraceError(f"{name} has layers that are no attention (state space, linear): no roofline is known")
    kind = str(config.get("model_type", ""))
    layers, hidden = keys.whole("num_hidden_layers"), keys.whole("hidden_size")
    heads, vocabulary = keys.whole("num_attention_heads"), keys.whole("vocab_size")
    kv_heads = keys.whole("num_key_value_heads", heads)
    head_dim = keys.whole("head_dim", hidden // heads or 1)
    if "kv_lora_rank" in config:
        attention = _latent_attention(keys, hidden, heads)
    else:
        attention = _attention(keys, kind, hidden, heads, kv_heads, head_dim)
    feed = _feed_forward(keys, kind, layers, hidden)
    norms = 2 * hidden * (2 if kind in _ALL_BIASES else 1)
    embedding = vocabulary * hidden
    tied = bool(config.get("tie_word_embeddings", kind in ("opt", "gemma", "gemma2", "gemma3_text")))
    positions = (keys.whole("max_position_embeddings") + 2) * hidden if kind == "opt" else 0
    outside = embedding * (1 if tied else 2) + positions + norms // 2
    inside = layers * (attention.parameters + norms)
    return Architecture(
        name,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        outside + inside + feed.parameters,
        outside + inside + feed.active,
        layers * attention.matmul + feed.matmul,
        embedding,
        tied,
        layers * attention.pair_flops,
        layers * attention.context_flops,
        attention.kv_tensors,
        layers * attention.kv_elements,
        _element_bytes(keys, config),
        _weight_bytes(keys, config),
        feed.intermediate,
        feed.matrices,
        feed.experts,
        vocabulary,
    )


@dataclass(frozen=True)
class _Attention:
    """One layer's."""

    parameters: int
    matmul: int
    pair_flops: int
    context_flops: int
    kv_tensors: int
    kv_elements: int


def _attention(keys: _Keys, kind: str, hidden: int, heads: int, kv_heads: int, head_dim: int) -> _Attention:
    if heads % kv_heads:
        raise KvtraceError(f"{keys.name}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    projected, cached = heads * head_dim, 2 * kv_heads * head_dim
    matmul = 2 * hidden * projected + hidden * cached
    bias = bool(keys.config.get("attention_bias", False))
    biases = (projected + cached) * (bias or kind in _QKV_BIAS) + hidden * (bias or kind in _ALL_BIASES)
    norms = 2 * head_dim if kind.startswith("qwen3") else 0
    flops = 4 * projected  # a multiplication and an addition, for the score and for the value
    return _Attention(matmul + biases + norms, matmul, flops, flops, 2, cached)


def _latent_attention(keys: _Keys, hidden: int, heads: int) -> _Attention:
    """Multi-head latent attention (DeepSeek-V2, 2024): one latent vector and one rotary key are cached for all heads. A
    prefill expands it to keys and values; a decode row works on the latent vectors, as vLLM's MLA backends do."""
    rank, rope = keys.whole("kv_lora_rank"), keys.whole("qk_rope_head_dim")
    plain, value = keys.whole("qk_nope_head_dim"), keys.whole("v_head_dim")
    queries = heads * (plain + rope)
    if keys.config.get("q_lora_rank") is None:
        query, norm = hidden * queries, 0
    else:
        low = keys.whole("q_lora_rank")
        query, norm = hidden * low + low * queries, low
    matmul = query + hidden * (rank + rope) + rank * heads * (plain + value) + heads * value * hidden
    pair, context = 2 * heads * (plain + rope + value), 2 * heads * (2 * rank + rope)
    return _Attention(matmul + norm + rank, matmul, pair, context, 1, rank + rope)


@dataclass(frozen=True)
class _FeedForward:
    """All layers'."""

    parameters: int
    active: int
    matmul: int
    intermediate: int
    matrices: int
    experts: int


def _feed_forward(keys: _Keys, kind: str, layers: int, hidden: int) -> _FeedForward:
    config = keys.config
    matrices = 2 if kind in _PLAIN else 3
    size = keys.whole("ffn_dim" if kind == "opt" else "intermediate_size")
    dense = matrices * hidden * size
    bias = hidden + size if kind in _ALL_BIASES else 0
    counts = ("num_local_experts", "n_routed_experts", "num_experts")
    experts = next((keys.whole(key) for key in counts if config.get(key)), 0)
    if not experts:
        return _FeedForward(layers * (dense + bias), layers * (dense + bias), layers * dense, size, matrices, 0)
    chosen = keys.whole("num_experts_per_tok")
    if chosen > experts:
        raise KvtraceError(f"{keys.name}: num_experts_per_tok {chosen} is above the number of experts, {experts}")
    each = matrices * hidden * keys.whole("moe_intermediate_size", size)
    shared = keys.whole("shared_expert_intermediate_size", 0, least=0) * matrices * hidden
    gate = hidden if shared else 0  # Qwen's shared expert has a gate of its own
    shared += keys.whole("n_shared_experts", 0, least=0) * each
    router = hidden * experts
    scores = experts if config.get("topk_method") == "noaux_tc" or kind == "deepseek_v3" else 0
    first, every = keys.whole("first_k_dense_replace", 0, least=0), keys.whole("decoder_sparse_step", 1)
    every = max(every, keys.whole("moe_layer_freq", 1) if not isinstance(config.get("moe_layer_freq"), list) else 1)
    only = set(config.get("mlp_only_layers") or [])
    sparse = sum(n >= first and (n + 1 if "decoder_sparse_step" in config else n) % every == 0 and n not in only
                 for n in range(layers))  # fmt: skip
    rest = (layers - sparse) * (dense + bias)
    fixed = router + shared + gate
    return _FeedForward(
        rest + sparse * (fixed + scores + experts * each),
        rest + sparse * (fixed + scores + chosen * each),
        (layers - sparse) * dense + sparse * (fixed + chosen * each),
        size,
        matrices,
        experts,
    )


class _Keys:
    """Whole numbers from a config; every complaint names the key."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name, self.config = name, config

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise KvtraceError(f"the config of {self.name} has no {key}: no roofline is known for it")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MOST:
            raise KvtraceError(
                f"the config of {self.name}: {key} must be a whole number from {least} on, not {value!r:.40}"
            )
        return value


def _element_bytes(keys: _Keys, config: dict[str, Any]) -> int:
    named = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    if named not in _DTYPES:
        raise KvtraceError(f"the config of {keys.name}: dtype {named!r} is none of {', '.join(_DTYPES)}")
    return min(_DTYPES[named], 2)  # engines serve float32 checkpoints in 16 bits


def _weight_bytes(keys: _Keys, config: dict[str, Any]) -> float:
    """Bytes of a weight: 1 or less where the checkpoint is quantised."""
    quantised = config.get("quantization_config")
    if not isinstance(quantised, dict):
        return float(_element_bytes(keys, config))
    bits = quantised.get("bits", 8 if str(quantised.get("quant_method", "")).startswith("fp8") else 16)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 32:
        raise KvtraceError(f"the config of {keys.name}: quantization_config.bits must be from 1 to 32, not {bits!r}")
    return min(bits, 16) / 8
