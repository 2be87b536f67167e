"""A transformer of a named shape with random weights, in torch: what `calibrate --device` runs.

Dense decoders: RMS norm, rotary positions left out (they cost next to nothing), grouped-query attention by torch's own
`scaled_dot_product_attention`, a plain or gated feed-forward layer, and the output head on the last token of each row.
Keys and values lie in one tensor a layer, not in pages.
"""

from __future__ import annotations

from typing import Any

from kvtrace_replay.timing.architecture import Architecture
from kvtrace_traces.errors import KvtraceError


class Transformer:
    """Weights of `layers` of a model's layers, and forward passes through them. `dtype` is torch's."""

    def __init__(self, torch: Any, model: Architecture, layers: int, device: str, dtype: Any) -> None:
        self.torch, self.model, self.layers = torch, model, layers
        self.at: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = (model.heads + 2 * model.kv_heads) * model.head_dim
        self.blocks = [
            {
                "norms": torch.ones((2, model.hidden), **self.at),
                "qkv": self._weights(wide, model.hidden),
                "out": self._weights(model.hidden, model.heads * model.head_dim),
                "up": self._weights((model.feed_matrices - 1) * model.intermediate, model.hidden),
                "down": self._weights(model.hidden, model.intermediate),
            }
            for _ in range(layers)
        ]
        self.head = self._weights(model.vocabulary, model.hidden)
        self.caches: list[tuple[Any, Any]] = []

    def _weights(self, rows: int, columns: int) -> Any:
        return self.torch.empty((rows, columns), **self.at).normal_(0, 0.02)

    def fill(self, rows: int, tokens: int) -> None:
        """Keys and values of `tokens` tokens for each of `rows` rows, in every layer."""
        shape = (rows, self.model.kv_heads, tokens, self.model.head_dim)
        self.caches = []
        self.caches = [
            (self.torch.empty(shape, **self.at).normal_(), self.torch.empty(shape, **self.at).normal_())
            for _ in range(self.layers)
        ]

    def prefill(self, tokens: int, context: int, layers: int) -> None:
        """One row computes `tokens` tokens after `context` others, which `fill(1, context + tokens)` made."""
        bias = self.torch.nn.attention.bias.causal_lower_right(tokens, context + tokens)
        self.run(self.torch.ones((1, tokens, self.model.hidden), **self.at), context, layers, bias)

    def decode(self, rows: int, context: int, layers: int) -> None:
        """Each row computes one token after `context` others, which `fill(rows, context + 1)` made."""
        self.run(self.torch.ones((rows, 1, self.model.hidden), **self.at), context, layers, None)

    def run(self, x: Any, context: int, layers: int, bias: Any) -> Any:
        """The last layer's output, [rows, tokens, hidden], of `x`, likewise, after `context` tokens whose keys and
        values are in the caches, as those of `x` are afterwards; `bias`: the causal mask, None where a row has one
        token."""
        torch, model = self.torch, self.model
        rows, tokens, _ = x.shape
        functional = torch.nn.functional
        heads, kv, size = model.heads, model.kv_heads, model.head_dim
        for block, (keys, values) in zip(self.blocks[:layers], self.caches, strict=False):
            y = functional.linear(self._norm(x, block["norms"][0]), block["qkv"])
            q, k, v = y.view(rows, tokens, heads + 2 * kv, size).transpose(1, 2).split([heads, kv, kv], dim=1)
            keys, values = keys[:, :, : context + tokens], values[:, :, : context + tokens]
            keys[:, :, context:].copy_(k)
            values[:, :, context:].copy_(v)
            if bias is None:
                # The queries of a group stand as rows beside each other: keys and values are read once for all.
                q = q.reshape(rows, kv, heads // kv, size)
                y = functional.scaled_dot_product_attention(q, keys, values).reshape(rows, heads, 1, size)
            else:
                y = functional.scaled_dot_product_attention(
                    q, keys.repeat_interleave(heads // kv, 1), values.repeat_interleave(heads // kv, 1), attn_mask=bias
                )
            x = x + functional.linear(y.transpose(1, 2).reshape(rows, tokens, heads * size), block["out"])
            y = functional.linear(self._norm(x, block["norms"][1]), block["up"])
            if model.feed_matrices == 3:
                gate, y = y.chunk(2, dim=-1)
                y = functional.silu(gate) * y
            else:
                y = functional.relu(y)
            x = x + functional.linear(y, block["down"])
        functional.linear(x[:, -1], self.head).argmax(-1)
        return x

    def _norm(self, x: Any, weight: Any) -> Any:
        return self.torch.nn.functional.layer_norm(x, (x.shape[-1],), weight)


def check(model: Architecture) -> None:
    """Raises KvtraceError for a model whose layers are not among those that can be run here."""
    what = "a mixture of experts" if model.experts else "latent attention (MLA)" if model.kv_tensors == 1 else None
    if what:
        raise KvtraceError(
            f"{model.name} has {what}, which --device does not run: --gpu NAME --model computes its profile"
        )
