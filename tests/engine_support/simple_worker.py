"""A CPU worker for vLLM's SimpleCPUOffloadConnector: it copies real bytes between the engine's cache and plain tensors.

vLLM's own worker wants CUDA for its streams, its events and its copies, and for nothing else: `on_the_cpu` replaces
these three in its module, and all that is left is vLLM's (0.32.0): which bytes of the cache are a block, when a copy is
submitted, and how its end is told. Imports vLLM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.simple_kv_offload import worker as vllm_worker


class MemcpyBackend:
    """Copies when it is told to, in the calling thread. `moved` counts bytes, by direction; `polls`: for how many steps
    after the one that began it a copy is not over yet; `copy_loads`: False makes a load a lie. `steps`: steps so far.
    """

    def __init__(self, polls: int, copy_loads: bool) -> None:
        self.polls, self.copy_loads = polls, copy_loads
        self.moved = {"store": 0, "load": 0}
        self.steps = 0

    def init(self, device_caches: dict[str, Any], host_caches: dict[str, Any], *_: Any) -> None:
        """Learn where blocks are: (block, byte) tensors, by name."""
        self.pairs = [(device_caches[name], host_caches[name]) for name in device_caches]

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[tuple[int, Any]],
        wait_event: Any = None,
    ) -> None:
        """Copy blocks, and put the event of its end onto `events_list`."""
        for device, host in self.pairs:
            source, target = (device, host) if is_store else (host, device)
            for one, other in zip(src_blocks, dst_blocks, strict=True):
                if is_store or self.copy_loads:
                    target[other].copy_(source[one])
                self.moved["store" if is_store else "load"] += source.shape[1]
        events_list.append((event_idx, _End(self)))


class _End:
    """The event of a copy's end. Who waits for it need not ask again."""

    def __init__(self, backend: MemcpyBackend) -> None:
        self.backend, self.due = backend, backend.steps + backend.polls

    def query(self) -> bool:
        return self.backend.steps >= self.due

    def synchronize(self) -> None:
        self.due = 0


class _Computed:
    """The event of a computation's end: a CPU has done it when it comes here."""

    def record(self, stream: Any) -> None: ...


class _Stream:
    """A stream that nothing waits for."""

    def __init__(self, priority: int = 0) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Torch:
    """torch, but with streams and events that do without CUDA."""

    Event = _Computed
    cuda = SimpleNamespace(Stream=_Stream, current_stream=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def on_the_cpu(polls: int = 0, copy_loads: bool = True) -> Iterator[list[MemcpyBackend]]:
    """While it lasts, vLLM's worker works on the CPU. Yields the backends that it made."""
    made: list[MemcpyBackend] = []
    bind = vllm_worker.SimpleCPUOffloadWorker.bind_connector_metadata

    def backend() -> MemcpyBackend:
        made.append(MemcpyBackend(polls, copy_loads))
        return made[-1]

    def counting(self: Any, metadata: Any) -> None:
        self._backend.steps += 1
        bind(self, metadata)

    replaced = [
        (vllm_worker, "torch", _Torch()),
        (vllm_worker, "DmaCopyBackend", backend),
        (vllm_worker, "PIN_MEMORY", False),
        (vllm_worker.SimpleCPUOffloadWorker, "bind_connector_metadata", counting),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield made
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
