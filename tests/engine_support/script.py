"""A logits processor that makes vLLM generate given tokens: `LLM(logits_processors=[script.NAME])`.

A request says which in `SamplingParams(extra_args={"output": [...]})`, so its tokens depend on nothing but their
position, whatever else is in the batch; a request that does not is left alone. Imports vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from .workloads import STOP

NAME = "engine_support.script:Scripted"


class Scripted(AdapterLogitsProcessor):
    """Leaves only the next token of the request's script possible, STOP after its end."""

    def is_argmax_invariant(self) -> bool:
        """Whether greedy sampling may skip this: no."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """Return the processor of one request, or None."""
        script = (params.extra_args or {}).get("output")
        if script is None:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            chosen = script[len(output)] if len(output) < len(script) else STOP
            return torch.full_like(logits, float("-inf")).index_fill_(0, torch.tensor([chosen]), 0.0)

        return force
