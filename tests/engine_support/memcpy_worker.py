"""A CPU worker for vLLM's OffloadingConnector: it copies real bytes between the engine's cache and a plain tensor.

vLLM's own worker wants an accelerator. This one comes in by the connector's official way for foreign ones:

    kv_connector_extra_config={"spec_name": "MemcpySpec", "spec_module_path": "engine_support.memcpy_worker", ...}

The manager, and everything else on the scheduler's side, stays vLLM's (0.32.0). Further keys of the same config:
`polls`: how often a transfer answers "not yet" before it is done (0: done at the first question); `copy_loads`: False
makes a load a lie, for the control that shows whether loaded bytes matter. Imports vLLM.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class MemcpyWorker(OffloadingWorker):
    """Copies at submission, in the calling thread; the answer may come `polls` questions later.

    A chunk of `blocks_per_chunk` blocks has one row of bytes in each of `chunks`, which are as many as the cache has
    tensors. `moved` counts bytes, by direction.
    """

    def __init__(self, caches: Any, blocks_per_chunk: int, num_chunks: int, polls: int, copy_loads: bool) -> None:
        self.device = [one.tensor for one in caches.tensors]
        self.per_chunk, self.polls, self.copy_loads = blocks_per_chunk, polls, copy_loads
        self.chunks = [
            torch.zeros((num_chunks, blocks_per_chunk, one.shape[1]), dtype=torch.int8) for one in self.device
        ]
        self.moved = {"store": 0, "load": 0}
        self._under_way: list[tuple[int, int, float]] = []  # job, bytes, seconds
        self._asked: dict[int, int] = {}

    def _pairs(self, device: Any, chunks: Any) -> list[tuple[int, int, int]]:
        """(block, chunk, place in the chunk) of each block that moves: the first may stand inside its chunk."""
        assert len(device.group_sizes) == 1
        first = device.block_indices[0]
        at = first % self.per_chunk
        return [
            (int(block), int(chunks.block_ids[(at + i) // self.per_chunk]), (at + i) % self.per_chunk)
            for i, block in enumerate(device.block_ids)
        ]

    def _submit(self, job_id: int, kind: str, pairs: list[tuple[int, int, int]]) -> bool:
        begin = time.perf_counter()
        size = 0
        for tensor, rows in zip(self.device, self.chunks, strict=True):
            for block, chunk, place in pairs:
                if kind == "store":
                    rows[chunk, place].copy_(tensor[block])
                elif self.copy_loads:
                    tensor[block].copy_(rows[chunk, place])
                size += tensor.shape[1]
        self.moved[kind] += size
        self._under_way.append((job_id, size, time.perf_counter() - begin))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Device to host."""
        return self._submit(job_id, "store", self._pairs(src_spec, dst_spec))

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Host to device."""
        return self._submit(job_id, "load", self._pairs(dst_spec, src_spec))

    def get_finished(self) -> list[TransferResult]:
        """The transfers that have been asked for often enough, oldest first."""
        done, left = [], []
        for job, size, seconds in self._under_way:
            asked = self._asked.get(job, 0)
            if asked < self.polls:
                self._asked[job] = asked + 1
                left.append((job, size, seconds))
            else:
                done.append(TransferResult(job, True, transfer_size=size, transfer_time=seconds))
        self._under_way = left
        return done

    def wait(self, job_ids: set[int]) -> None:
        """What is to be waited for is done at the next question."""
        for job in job_ids:
            self._asked[job] = self.polls


class MemcpySpec(CPUOffloadingSpec):
    """vLLM's CPU tier with the worker above; its manager is vLLM's own."""

    workers: ClassVar[list[MemcpyWorker]] = []

    def get_worker(self, kv_caches: Any) -> MemcpyWorker:
        """Return the worker of this process."""
        if self._worker is None:
            more = self.extra_config
            worker = MemcpyWorker(
                kv_caches,
                self.blocks_per_chunk,
                self.num_chunks,
                int(more.get("polls", 0)),
                bool(more.get("copy_loads", True)),
            )
            self._worker = worker  # type: ignore[assignment]
            MemcpySpec.workers.append(worker)
        return self._worker  # type: ignore[return-value]
