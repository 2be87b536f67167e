"""Opens traces: a ``.kvt`` file or a folder of them, as Polars frames."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_traces import events as play
from kvtrace_traces import tables
from kvtrace_traces.engine_log import Chains, Decoded, EngineLog, Segment, open_segment
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import FINISH_REASONS, LOSS_REASONS, REQUEST_NO_READ

RECOVERY = ("strict", "tail", "skip")
__all__ = ["Chains", "Trace", "open_trace"]


def open_trace(path: str | Path, recover: str = "tail") -> Trace:
    """Open a trace: a ``.kvt`` file, or a folder whose ``*.kvt`` files are taken and all else ignored.

    ``recover``: what to do about damage. ``strict``: raise; ``tail``: read up to it; ``skip``: also read the
    frames after it. What was left out is in ``losses`` and the counts of ``info``; damaged content is never
    returned as data. Raises :class:`KvtraceError` where there is nothing to read, :class:`UsageError` for an unknown
    ``recover``.
    """
    if recover not in RECOVERY:
        raise UsageError(f"recover={recover!r} is none of {', '.join(RECOVERY)}")
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.glob("*.kvt") if p.is_file())
        if not files:
            raise KvtraceError(f"{path} holds no .kvt file: record one with `kvtrace record -o {path} -- COMMAND`")
    elif path.exists():
        files = _with_segments(path)
    else:
        raise KvtraceError(f"{path} does not exist")
    runs: dict[str, list[Segment]] = defaultdict(list)
    for file in files:
        segment = open_segment(file)
        runs[str(segment.header.get("run_id", file))].append(segment)
    return Trace(path, [EngineLog(segments, recover) for segments in runs.values()])


def _with_segments(path: Path) -> list[Path]:
    """A file and, where it is the first of a rotated log, the segments beside it."""
    files = [path]
    stem = path.name.removesuffix(".kvt")
    while (following := path.with_name(f"{stem}.{len(files)}.kvt")).is_file():
        files.append(following)
    return files


class Trace:
    """A trace. Frames are decoded when first asked for and kept; their columns are ``schema.TABLES``.

    ``path``; ``engines``: the headers, by engine; ``complete``: every log has its end record and nothing is missing;
    ``warnings``: what the user should know; ``damaged_frames``: stretches of the log that did not check out.
    """

    def __init__(self, path: Path, logs: list[EngineLog]) -> None:
        self.path = path
        logs.sort(key=lambda log: (int(log.header.get("clock_wall_ns", 0)), log.segments[0].path.name))
        indices = [int(log.header.get("engine_index", 0)) for log in logs]
        self.warnings: list[str] = [note for log in logs for note in log.notes]
        if len(set(indices)) != len(indices):
            indices = list(range(len(logs)))
        order = np.argsort(indices, kind="stable")
        self._logs = [logs[i] for i in order]
        self._indices = [indices[i] for i in order]
        self.engines: list[dict[str, Any]] = [
            {**log.header, "engine_index": index, "inexact": log.inexact}
            for log, index in zip(self._logs, self._indices, strict=True)
        ]
        self.complete = all(log.complete for log in self._logs)
        self.damaged_frames = sum(log.damaged for log in self._logs)

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, {len(self._logs)} engine(s))"

    @property
    def header(self) -> dict[str, Any]:
        """The first engine's header."""
        return self.engines[0]

    @property
    def dropped(self) -> int:
        """Block events that are known to be missing."""
        return sum(log.dropped for log in self._logs)

    @property
    def lossy(self) -> bool:
        """Whether anything is missing but a clean end. A log that was cut short by a kill is not lossy."""
        return any(log.losses or log.damaged for log in self._logs)

    def chains(self, engine_index: int | None = None) -> Chains:
        """The identities of an engine's requests (default: the first engine's)."""
        return self._log(engine_index).decode().chains

    def raw_ids(self, engine_index: int | None = None) -> Any:
        """int32, parallel to ``chains().identities``: dense ids of an import whose ids name content alone; else None."""
        log = self._log(engine_index)
        log.decode()
        return log.raw

    def _log(self, engine_index: int | None) -> EngineLog:
        if engine_index is None:
            return self._logs[0]
        if engine_index not in self._indices:
            raise UsageError(f"engine {engine_index} is not in this trace: it has {self._indices}")
        return self._logs[self._indices.index(engine_index)]

    @cached_property
    def info(self) -> dict[str, Any]:
        """What ``kvtrace info --json`` prints."""
        decoded = [log.decode() for log in self._logs]
        head = self.header
        used, logged = sum(log.used for log in self._logs), sum(log.logged for log in self._logs)
        return {
            "path": str(self.path),
            "source": head.get("source"),
            "format": head.get("format"),
            "engine": head.get("engine"),
            "engine_version": head.get("engine_version"),
            "model": head.get("model"),
            "dtype": head.get("dtype"),
            "device": head.get("device"),
            "created": head.get("created"),
            "block_size": head.get("block_size"),
            "num_blocks": head.get("num_blocks"),
            "granule": head.get("granule"),
            "bytes_per_token": head.get("bytes_per_token"),
            "bytes_per_block": head.get("bytes_per_block"),
            "prefix_caching": head.get("prefix_caching"),
            "scheduler": head.get("scheduler"),
            "engines": len(self._logs),
            "requests": sum(int(d.known.sum()) for d in decoded),
            "steps": sum(d.steps32.shape[1] for d in decoded),
            "events": sum(len(d.times) for d in decoded),
            "preemptions": sum(d.preemptions.shape[1] for d in decoded),
            "identities": sum(len(d.chains.hashes) for d in decoded),
            "duration_s": max((_duration_s(d) for d in decoded), default=0.0),
            "bytes": used,
            "files": [segment.path.name for log in self._logs for segment in log.segments],
            "logged_events": logged,
            "bytes_per_block_event": used / logged if logged else None,
            "dropped": self.dropped,
            "damaged_frames": self.damaged_frames,
            "complete": self.complete,
            "lossy": self.lossy,
            "inexact": sorted({reason for log in self._logs for reason in log.inexact}),
        }

    # ---------------------------------------------------------------- frames

    @cached_property
    def requests(self) -> pl.DataFrame:
        """One row per request; see ``schema.TABLES``."""
        return self._frames("requests", _requests)

    @cached_property
    def steps(self) -> pl.DataFrame:
        """One row per scheduler step."""
        return self._frames("steps", _steps)

    @cached_property
    def step_spans(self) -> pl.DataFrame:
        """The run-length form of ``step_requests``."""
        return self._frames("step_spans", _spans)

    @cached_property
    def step_requests(self) -> pl.DataFrame:
        """One row per step and request scheduled in it. Large: prefer ``step_spans`` where it will do."""
        spans = self.step_spans
        return (
            spans.with_columns(nth=pl.int_ranges(0, pl.col("steps")))
            .explode("nth")
            .with_columns(
                step=(pl.col("first_step") + pl.col("nth")).cast(pl.Int32),
                computed_before=(pl.col("computed_before") + pl.col("nth") * pl.col("tokens")).cast(pl.Int32),
            )
            .select("engine_index", "step", "request", "tokens", "computed_before")
            .sort("engine_index", "step", "request")
        )

    @cached_property
    def lookups(self) -> pl.DataFrame:
        """One row per prefix-cache lookup of an admitted request."""
        return self._frames("lookups", _lookups)

    @cached_property
    def preemptions(self) -> pl.DataFrame:
        """One row per preemption."""
        return self._frames("preemptions", _preemptions)

    @cached_property
    def block_events(self) -> pl.DataFrame:
        """One row per block event, in the order they happened."""
        return self._frames("block_events", _block_events)

    @cached_property
    def losses(self) -> pl.DataFrame:
        """One row per stretch of the log that is missing."""
        rows = []
        for log, index in zip(self._logs, self._indices, strict=True):
            log.decode()  # may find more
            for loss in log.losses:
                reason = loss.reason if loss.reason in LOSS_REASONS else "damage"
                rows.append((index, reason, loss.time_ns, loss.commits, loss.events, loss.detail))
        return pl.DataFrame(rows, schema=tables.schema("losses"), orient="row")

    def _frames(self, table: str, make: Any) -> pl.DataFrame:
        parts = []
        for log, index in zip(self._logs, self._indices, strict=True):
            columns = make(log.decode())
            length = len(next(iter(columns.values())))
            parts.append(tables.frame(table, {"engine_index": np.full(length, index, np.int16), **columns}))
        return parts[0] if len(parts) == 1 else pl.concat(parts)


def _duration_s(decoded: Decoded) -> float:
    ends = decoded.steps64[play.S_END]
    if not len(ends):
        return 0.0
    return max(0, int(ends.max()) - int(decoded.steps64[play.S_START, 0])) / 1e9


def _requests(decoded: Decoded) -> dict[str, Any]:
    rows = np.flatnonzero(decoded.known)
    small, large = decoded.requests32[:, rows], decoded.requests64[:, rows]
    reason = small[play.R_REASON]
    other = FINISH_REASONS.index("other")
    return {
        "request": rows.astype(np.int32),
        "request_id": tables.strings(
            "request_id", np.maximum(large[play.R_ID_AT], 0), small[play.R_ID_BYTES], decoded.id_bytes
        ),
        "arrival_ns": large[play.R_ARRIVAL_NS],
        "arrival_s": large[play.R_ARRIVAL_S].view(np.float64),
        "arrival_step": small[play.R_ARRIVAL_STEP],
        "prompt_tokens": small[play.R_PROMPT],
        "output_tokens": small[play.R_OUTPUT],
        "max_tokens": small[play.R_MAX],
        "priority": small[play.R_PRIORITY],
        "tenant": large[play.R_TENANT].view(np.uint64),
        "no_cache_read": (np.maximum(small[play.R_FLAGS], 0) & REQUEST_NO_READ) != 0,
        "cached_tokens": small[play.R_CACHED],
        "preemptions": small[play.R_PREEMPTIONS],
        "first_step": small[play.R_FIRST],
        "last_step": small[play.R_LAST],
        "finish_step": small[play.R_FINISH_STEP],
        "finish_ns": large[play.R_FINISH_NS],
        "finish_reason": np.where(reason >= len(FINISH_REASONS), other, reason).astype(np.int8),
        "chain_granules": np.diff(decoded.chains.indptr)[rows].astype(np.int32),
    }


def _steps(decoded: Decoded) -> dict[str, Any]:
    small = decoded.steps32
    return {
        "step": small[play.S_STEP],
        "start_ns": decoded.steps64[play.S_START],
        "end_ns": decoded.steps64[play.S_END],
        "requests": small[play.S_REQUESTS],
        "tokens": small[play.S_TOKENS],
        "running": small[play.S_RUNNING],
        "waiting": small[play.S_WAITING],
        "free_blocks": small[play.S_FREE],
        "preempted": small[play.S_PREEMPTED],
        "empty_calls": small[play.S_EMPTY],
    }


def _spans(decoded: Decoded) -> dict[str, Any]:
    spans = decoded.spans
    order = np.lexsort((spans[play.P_REQUEST], spans[play.P_FIRST]))
    return {
        "request": spans[play.P_REQUEST][order],
        "first_step": spans[play.P_FIRST][order],
        "steps": spans[play.P_STEPS][order],
        "tokens": spans[play.P_TOKENS][order],
        "computed_before": spans[play.P_COMPUTED][order],
    }


def _lookups(decoded: Decoded) -> dict[str, Any]:
    rows = decoded.lookups
    return {
        "step": rows[play.L_STEP],
        "request": rows[play.L_REQUEST],
        "tokens_asked": rows[play.L_ASKED],
        "tokens_hit": rows[play.L_HIT],
        "after_preemption": rows[play.L_AFTER] != 0,
    }


def _preemptions(decoded: Decoded) -> dict[str, Any]:
    rows = decoded.preemptions
    return {
        "step": rows[play.V_STEP],
        "time_ns": decoded.preempted_at,
        "request": rows[play.V_REQUEST],
        "blocks_lost": rows[play.V_BLOCKS],
        "tokens_lost": rows[play.V_TOKENS],
    }


def _block_events(decoded: Decoded) -> dict[str, Any]:
    rows = decoded.events
    return {
        "step": rows[play.E_STEP],
        "time_ns": decoded.times,
        "request": rows[play.E_REQUEST],
        "kind": decoded.kinds,
        "block": rows[play.E_BLOCK],
        "identity": rows[play.E_IDENTITY],
        "group": decoded.groups,
    }
