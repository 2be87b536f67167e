"""Writes a simulated run as a trace, a `.kvt` file that every command reads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.carried import Start
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1.run import Run, run_in_pieces
from kvtrace_traces import wire
from kvtrace_traces.cut.operations import extended, in_commits, kept_words, live_words, queue_words, words_of
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import EXT_OPS, OPS, REQUEST_NO_READ
from kvtrace_traces.snapshot import Live
from kvtrace_traces.writer import write_file

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
_FIXED = 12  # words of REQ between the operation and the id, as in schema.EXT_OPS


def arrival_words(recorded: Recorded) -> tuple[U32, I64]:
    """The words of every request's arrival, REQ and CHAIN, and int64[n + 1] where each request's begin.

    The time (words 1 and 2 of each) is left open.
    """
    n = recorded.n_requests
    names = [str(name).encode() for name in recorded.request_id.to_list()]
    id_words = np.array([(len(name) + 3) // 4 for name in names], np.int64)
    granules = np.diff(recorded.chain_at)
    head = 1 + _FIXED + id_words
    sizes = head + np.where(granules > 0, 2 + 2 * granules, 0)
    at = np.zeros(n + 1, np.int64)
    np.cumsum(sizes, out=at[1:])
    words = np.zeros(int(at[-1]), np.uint32)
    start = at[:-1]
    words[start] = OPS["EXT"].code | (EXT_OPS["REQ"].code | (head - 1) << 8) << 4
    arrival = recorded.arrival_s.view(np.uint64)
    tenant = recorded.tenant
    for offset, value in (
        (3, arrival & 0xFFFFFFFF), (4, arrival >> np.uint64(32)), (5, recorded.prompt),
        (6, recorded.most - recorded.prompt), (7, recorded.priority.view(np.uint32)),
        (8, np.where(recorded.no_read, REQUEST_NO_READ, 0)), (9, tenant & 0xFFFFFFFF), (10, tenant >> np.uint64(32)),
        (12, np.array([len(name) for name in names])),
    ):  # fmt: skip
        words[start + offset] = value.astype(np.uint32)
    raw = words.view(np.uint8)
    for first_byte, name in zip(((start + 1 + _FIXED) * 4).tolist(), names, strict=True):
        raw[first_byte : first_byte + len(name)] = np.frombuffer(name, np.uint8)
    some = granules > 0
    chain = (start + head)[some]
    words[chain] = np.flatnonzero(some).astype(np.uint32) << 4 | OPS["CHAIN"].code
    words[chain + 1] = granules[some]
    hashes = recorded.hashes[recorded.chain]
    nth = np.arange(recorded.chain.size, dtype=np.int64) - np.repeat(recorded.chain_at[:-1], granules)
    place = np.repeat(start + head + 2, granules) + 2 * nth
    words[place] = (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    words[place + 1] = (hashes >> np.uint64(32)).astype(np.uint32)
    return words, at


def begin_words(recorded: Recorded, settings: Settings, arriving: tuple[U32, I64]) -> list[U32]:
    """What a log begins with, in parts of a commit each: KEY, and what a run under way is taken up with.

    Raises UsageError where that cannot be at these settings.
    """
    key = np.zeros(11, np.uint32)
    key[0] = OPS["KEY"].code
    if recorded.start is None:
        return [key]
    start = recorded.start.at(settings)
    key[7], key[8], key[9] = start.running.size, start.waiting.size, start.due
    words, at = arriving
    parts = [key, *(words[at[request] : at[request + 1]] for request in range(start.n_requests))]
    parts.append(extended("START", words_of(start.preempted, start.empty)))
    parts += live_words(_live(start, request) for request in [*start.running.tolist(), *start.waiting.tolist()])
    known = np.append(recorded.hashes, np.uint64(0))  # the last for parents that are none
    parts += kept_words(start.blocks, known[start.identities], known[start.parents])
    parts += queue_words(start.queue)
    return list(in_commits(parts))


def _live(start: Start, request: int) -> Live:
    table = start.blocks_of(request).tolist()
    cached = int(start.cached[request])
    return Live(
        request, bool(table), bool(start.scheduled[request]), bool(start.begun[request]), int(start.computed[request]),
        None if cached < 0 else cached, int(start.preemptions[request]), int(start.filled[request]), table,
        int(start.tokens[request]), int(start.under_way[request]), bool(start.gives[request]), int(start.lost[request]),
    )  # fmt: skip


def simulated_header(
    recorded: Recorded, settings: Settings, arrivals: str, why: Sequence[str] = (), timed: bool = False
) -> dict[str, Any]:
    """The header of a simulated trace: the recorded one, at these settings, with where it comes from and `why` it need
    not be exact."""
    own = recorded.header
    scale = settings.block_size / int(own["block_size"])
    per_block = own.get("bytes_per_block")
    scheduler = {
        **own["scheduler"],
        "policy": settings.scheduling_policy,
        "async_scheduling": settings.async_scheduling,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_scheduled_tokens": settings.max_num_scheduled_tokens,
        "chunked_prefill": settings.chunked_prefill,
        "long_prefill_token_threshold": settings.long_prefill_token_threshold,
        "watermark": settings.watermark,
        "watermark_blocks": settings.watermark_blocks,
        "max_concurrent_batches": settings.depth,
        "eviction_policy": settings.policy,
        "victim": settings.victim,
    }
    kept = {key: value for key, value in own.items() if key not in ("log_format", "segment", "tracer", "inexact")}
    return {
        **kept,
        "source": "simulated",
        "clock": "simulated" if timed else "logical",
        "simulated": {"run_id": own.get("run_id"), "arrivals": arrivals, "why": list(why)},
        "run_id": f"{time.time_ns():016x}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "block_size": settings.block_size,
        "hash_block_size": settings.block_size,
        "granule": recorded.granule,
        "num_blocks": settings.num_blocks,
        "bytes_per_block": None if per_block is None else int(per_block * scale),
        "prefix_caching": settings.prefix_caching,
        "scheduler": scheduler,
        "inexact": list(own.get("inexact", ())),
    }


def write_run(
    path: str | Path,
    recorded: Recorded,
    settings: Settings,
    arrivals: str = "step",
    why: Sequence[str] = (),
    **options: Any,
) -> Run:
    """Simulate as `simulate_run` and write the run to `path`, which must not exist. Nothing is left if it fails.

    `why`: names of `sweep.WHY` that hold, for the header.
    """
    commits = 0
    runs: list[Run] = []
    arriving = arrival_words(recorded)
    begin = begin_words(recorded, settings, arriving)

    def bodies() -> Iterator[tuple[int, bytes]]:
        nonlocal commits
        for words in begin:
            commits += 1
            yield wire.KEY if commits == 1 else 0, words.tobytes()
        pieces = run_in_pieces(recorded, settings, arrivals=arrivals, arrival_words=arriving, **options)
        while True:
            try:
                words = next(pieces)
            except StopIteration as stop:
                runs.append(stop.value)
                return
            if words.size:
                commits += 1
                yield 0, words.tobytes()

    def end() -> dict[str, Any]:
        return {"time_ns": 0, "commits": commits + 1, "events": runs[0].events}

    try:
        write_file(
            str(path),
            simulated_header(recorded, settings, arrivals, why, options.get("costs") is not None),
            bodies,
            end,
        )
    except FileExistsError:
        raise UsageError(f"{path} exists: name another file, or remove it") from None
    except OSError as error:
        raise KvtraceError(f"cannot write {path}: {error.strerror or error}") from None
    return runs[0]
