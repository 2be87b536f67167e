"""A profile by arithmetic: what a device's data sheet and a model's size say that steps take.

Each kind of work is put down to the resource that bounds it (Williams, Waterman, Patterson: Roofline, 2009): weights
are read from memory once a step, tokens are multiplied with them at the bf16 rate, pairs of query and key cost
operations in prefill, and in decode the larger of reading the cache and computing with it. `StepCosts` is a sum, so
reading weights and computing do not overlap here, as they partly do on a device: a step is estimated too long by at
most the shorter of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvtrace_replay.timing.architecture import Architecture
from kvtrace_replay.timing.catalogue import Gpu, find_gpu, find_model
from kvtrace_replay.timing.link import DIRECTIONS, LinkCost, way
from kvtrace_replay.timing.profile import Model, Profile
from kvtrace_traces.errors import UsageError


@dataclass(frozen=True)
class Efficiency:
    """What of the data sheets' figures is reached, and fixed times. Assumptions, not measurements.

    `compute`, `attention`: share of the bf16 rate in matrix products, in attention; `memory`: share of the memory's
    bandwidth; `overhead_us`: of a step, beside the device's work; `copy_us`: of one asynchronous copy (5 to 7 us
    measured by Wu et al., DualPath, arXiv 2602.21548, section 5.2); `pageable`: bandwidth with pageable host memory, of
    that with pinned; `tensor_parallel`: devices; `kv_element_bytes`: 0 for as the model's.
    """

    compute: float = 0.6
    attention: float = 0.4
    memory: float = 0.8
    overhead_us: float = 1000.0
    copy_us: float = 6.0
    pageable: float = 0.4
    tensor_parallel: int = 1
    kv_element_bytes: int = 0

    def check(self) -> None:
        """Raises UsageError for a share outside ]0, 1] or a negative time."""
        for name in ("compute", "attention", "memory", "pageable"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} {getattr(self, name)} must be a share above 0 and up to 1")
        for name in ("overhead_us", "copy_us"):
            if not 0 <= getattr(self, name) < 1e9:
                raise UsageError(f"{name} {getattr(self, name)} must be a time from 0 on")
        if not 1 <= self.tensor_parallel <= 1024 or self.kv_element_bytes not in (0, 1, 2):
            raise UsageError("tensor_parallel must be from 1 to 1024, and kv_element_bytes 1 or 2")


def roofline(gpu: str, model: str, efficiency: Efficiency | None = None) -> Profile:
    """The analytic profile of a device and a model; names or a config.json as `catalogue` takes them.

    Raises UsageError for unknown names and assumptions out of range.
    """
    return of(find_gpu(gpu), find_model(model), efficiency or Efficiency())


def of(gpu: Gpu, model: Architecture, efficiency: Efficiency) -> Profile:
    """The profile of a device with a model."""
    efficiency.check()
    devices = efficiency.tensor_parallel
    flops = gpu.flops * efficiency.compute * devices
    attention = gpu.flops * efficiency.attention * devices
    memory = gpu.memory_bytes_per_s * efficiency.memory * devices
    # The table of embeddings is looked up, not read; a tied one is read as the head.
    weights = (model.parameters - (0 if model.tied else model.head_matmul)) * model.weight_bytes
    kv_bytes = model.kv_bytes_per_token(efficiency.kv_element_bytes or None)
    costs = {
        "call": efficiency.overhead_us * 1e3 + weights / memory * 1e9,
        "prefill_token": 2 * model.token_matmul / flops * 1e9,
        "prefill_pair": model.pair_flops / attention * 1e9,
        "decode_row": 2 * (model.token_matmul + model.head_matmul) / flops * 1e9,
        "decode_context": max(kv_bytes / memory, model.context_flops / attention) * 1e9,
    }
    facts: dict[str, str | int | float] = {
        "gpu_source": gpu.source, "parameters": model.parameters, "active_parameters": model.active_parameters,
        "weight_bytes": int(model.parameters * model.weight_bytes), "gpu_memory_bytes": int(gpu.memory_bytes * devices),
        **{field.name: getattr(efficiency, field.name) for field in fields(efficiency)},
    }  # fmt: skip
    name = f"{gpu.name}-{model.name}" + (f"-tp{devices}" if devices > 1 else "")
    shape = Model(model.name, model.layers, model.kv_tensors, kv_bytes)
    return Profile(name, "roofline", gpu.name, shape, costs, link=link_of(gpu, efficiency), facts=facts)


def link_of(gpu: Gpu, efficiency: Efficiency | None = None) -> dict[str, LinkCost]:
    """Every way over a device's link. Scattered copies each pay `copy_us`; a gathered transfer pays it for the kernel
    that gathers and for the one copy, and reads and writes the device's memory once more. With several devices each has
    a link of its own and its share of every block."""
    given = efficiency or Efficiency()
    memory = gpu.memory_bytes_per_s * given.memory
    found = {}
    for direction in DIRECTIONS:
        for kind, share in (("pinned", 1.0), ("pageable", given.pageable)):
            rate = gpu.link_bytes_per_s * share
            gathered = 1 / (1 / rate + 2 / memory)
            copy_ns = given.copy_us * 1e3
            devices = given.tensor_parallel
            found[way(direction, kind, "scattered")] = LinkCost(0.0, copy_ns, rate * devices)
            found[way(direction, kind, "gathered")] = LinkCost(2 * copy_ns, 0.0, gathered * devices)
    return found
