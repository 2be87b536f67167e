"""Opens traces: a ``.kvt`` file or a folder of them, as Polars frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_traces import rows, tables
from kvtrace_traces.engine_log import Chains, Decoded, EngineLog
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.files import logs_of
from kvtrace_traces.play import Events
from kvtrace_traces.schema import FINISH_REASONS, LOSS_REASONS, REQUEST_NO_READ
from kvtrace_traces.segments import Segment, never_begun, open_segment
from kvtrace_traces.snapshot import Snapshot

RECOVERY = ("strict", "tail", "skip")
MOST_ROWS = 1 << 31  # what memory takes; spans grow with the file, the steps in them do not
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
    if not path.exists():
        raise KvtraceError(f"{path} does not exist")
    files = logs_of(path)
    if not files:
        raise KvtraceError(f"{path} holds no .kvt file: record one with `kvtrace record -o {path} -- COMMAND`")
    runs: dict[str, list[Segment]] = defaultdict(list)
    begun = [file for file in files if not never_begun(file)] or files
    others: list[Path] = []
    for file in begun:
        segment = open_segment(file)
        run = str(segment.header.get("run_id", file))
        if runs and run not in runs and not path.is_dir():
            others.append(file)
        else:
            runs[run].append(segment)
    trace = Trace(path, [EngineLog(segments, recover) for segments in runs.values()], recover)
    trace.warnings += [f"{file.name} was made ready and never written to" for file in files if file not in begun]
    trace.warnings += [f"{file.name} beside it is of another run, and left out" for file in others]
    return trace


class Trace:
    """A trace. Frames are decoded when first asked for and kept; their columns are ``schema.TABLES``.

    ``path``; ``recover``: how it was read; ``engines``: the headers, by engine; ``complete``: every log has its end
    record and nothing is missing; ``warnings``: what the user should know; ``damaged_frames``: stretches of the log
    that did not check out.
    """

    def __init__(self, path: Path, logs: list[EngineLog], recover: str = "tail") -> None:
        self.path = path
        self.recover = recover
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
        self.damaged_frames = sum(log.damaged for log in self._logs)

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, {len(self._logs)} engine(s))"

    def pieces(self, engine_index: int) -> Iterator[Events]:
        """The block events of an engine as arrays, some ten thousand at a time, for compiled loops that go through all
        of them once. A piece holds until the next is taken."""
        return self._log(engine_index).pieces()

    @property
    def header(self) -> dict[str, Any]:
        """The first engine's header."""
        return self.engines[0]

    @property
    def complete(self) -> bool:
        """Whether every log has its end record and nothing is known to be missing."""
        return all(log.complete for log in self._logs)

    @property
    def dropped(self) -> int:
        """Block events that are known to be missing."""
        return sum(log.dropped for log in self._logs)

    @property
    def lossy(self) -> bool:
        """Whether anything is missing but a clean end. A log that was cut short by a kill is not lossy."""
        return any(log.losses or log.damaged for log in self._logs)

    @property
    def files(self) -> list[Path]:
        """The files that were read, in order."""
        return [segment.path for log in self._logs for segment in log.segments]

    def chains(self, engine_index: int | None = None) -> Chains:
        """The identities of an engine's requests (default: the first engine's)."""
        return self._log(engine_index).decode().chains

    def snapshot(self, engine_index: int | None = None) -> Snapshot | None:
        """The state that an engine of a cut begins with; None where the log begins with an idle engine."""
        return self._log(engine_index).snapshot()

    def raw_ids(self, engine_index: int | None = None) -> Any:
        """int32, parallel to ``chains().identities``: dense ids of an import whose ids name content; else None."""
        log = self._log(engine_index)
        log.decode()
        return log.raw

    def raw_hashes(self, engine_index: int | None = None) -> Any:
        """uint64, by the dense ids of :meth:`raw_ids`: the ids as the import's file has them; None where those are."""
        log = self._log(engine_index)
        log.decode()
        return log.raw_hashes

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
            "reuse_known": head.get("reuse_known", True),
            "scheduler": head.get("scheduler"),
            "engines": len(self._logs),
            "requests": sum(int(d.known.sum()) for d in decoded),
            "steps": sum(d.rows.steps32.shape[1] for d in decoded),
            "events": sum(d.events for d in decoded),
            "preemptions": sum(d.rows.preemptions.shape[1] for d in decoded),
            "identities": sum(len(d.chains.hashes) for d in decoded),
            "duration_s": max((_duration_s(d) for d in decoded), default=0.0),
            "bytes": used,
            "files": [file.name for file in self.files],
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
        """One row per step and request scheduled in it. Large: prefer ``step_spans`` where it will do.

        Raises :class:`KvtraceError` beyond 2^31 rows.
        """
        spans = self.step_spans
        if (rows := int(spans["steps"].cast(pl.Int64).sum())) > MOST_ROWS:
            raise KvtraceError(f"step_requests would have {rows:,} rows, which is too many: use step_spans")
        return (
            spans.with_columns(nth=pl.int_ranges(0, pl.col("steps")))
            .explode("nth")
            .with_columns(
                step=(pl.col("first_step") + pl.col("nth")).cast(pl.Int32),
                # No engine counts beyond 2^31; a log that does is none's.
                computed_before=(pl.col("computed_before") + pl.col("nth") * pl.col("tokens")).cast(
                    pl.Int32, strict=False
                ),
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
        parts = [piece for _, piece in self.block_event_pieces(0, keep=True)]
        if not parts:
            return pl.DataFrame(schema=tables.schema("block_events"))
        return parts[0] if len(parts) == 1 else pl.concat(parts)

    def block_event_pieces(self, most: int = 1 << 20, keep: bool = False) -> Iterator[tuple[int, pl.DataFrame]]:
        """The frame ``block_events`` in pieces of about ``most`` rows (0: one for each engine), in order, with their
        engine_index: for what goes through all of them once, and need not hold them. A piece holds until the next is
        taken, unless ``keep``."""
        for log, index in zip(self._logs, self._indices, strict=True):
            for piece in log.pieces(most, keep):
                yield index, tables.frame("block_events", _block_events(index, piece))

    @cached_property
    def offloads(self) -> pl.DataFrame:
        """One row per transfer of blocks to a slower tier or back."""
        return self._frames("offloads", _offloads)

    @cached_property
    def losses(self) -> pl.DataFrame:
        """One row per stretch of the log that is missing."""
        found = []
        for log, index in zip(self._logs, self._indices, strict=True):
            log.decode()  # may find more
            for loss in log.losses:
                reason = loss.reason if loss.reason in LOSS_REASONS else "damage"
                found.append((index, reason, loss.time_ns, loss.commits, loss.events, loss.detail))
        return pl.DataFrame(found, schema=tables.schema("losses"), orient="row")

    def _frames(self, table: str, make: Any) -> pl.DataFrame:
        parts = []
        for log, index in zip(self._logs, self._indices, strict=True):
            columns = make(log.decode())
            length = len(next(iter(columns.values())))
            parts.append(tables.frame(table, {"engine_index": np.full(length, index, np.int16), **columns}))
        return parts[0] if len(parts) == 1 else pl.concat(parts, how="diagonal")


def _duration_s(decoded: Decoded) -> float:
    ends = decoded.rows.steps64[rows.S_END]
    if not len(ends):
        return 0.0
    return max(0, int(ends.max()) - int(decoded.rows.steps64[rows.S_START, 0])) / 1e9


def _requests(decoded: Decoded) -> dict[str, Any]:
    chosen = np.flatnonzero(decoded.known)
    small, large = decoded.rows.requests32[:, chosen], decoded.rows.requests64[:, chosen]
    reason = small[rows.R_REASON]
    other = FINISH_REASONS.index("other")
    return {
        "request": chosen.astype(np.int32),
        "request_id": tables.strings(
            "request_id", np.maximum(large[rows.R_ID_AT], 0), small[rows.R_ID_BYTES], decoded.rows.id_bytes
        ),
        "arrival_ns": large[rows.R_ARRIVAL_NS],
        "arrival_s": large[rows.R_ARRIVAL_S].view(np.float64),
        "arrival_step": small[rows.R_ARRIVAL_STEP],
        "prompt_tokens": small[rows.R_PROMPT],
        "output_tokens": small[rows.R_OUTPUT],
        "max_tokens": small[rows.R_MAX],
        "priority": small[rows.R_PRIORITY],
        "tenant": large[rows.R_TENANT].view(np.uint64),
        "no_cache_read": (np.maximum(small[rows.R_FLAGS], 0) & REQUEST_NO_READ) != 0,
        "cached_tokens": small[rows.R_CACHED],
        "preemptions": small[rows.R_PREEMPTIONS],
        "first_step": small[rows.R_FIRST],
        "last_step": small[rows.R_LAST],
        "finish_step": small[rows.R_FINISH_STEP],
        "finish_empty_calls": small[rows.R_FINISH_EMPTY],
        "finish_ns": large[rows.R_FINISH_NS],
        "finish_reason": np.where((reason >= len(FINISH_REASONS)) | (reason < -1), other, reason).astype(np.int8),
        "chain_granules": np.diff(decoded.chains.indptr)[chosen].astype(np.int32),
        **_conversations(decoded, small),
    }


def _conversations(decoded: Decoded, small: Any) -> dict[str, Any]:
    """The columns that imports may know: type, turn and parent; none where the log tells of none."""
    columns = small[[rows.R_TYPE, rows.R_TURN, rows.R_PARENT]]
    if not columns.size or int(columns.max()) < 0:
        return {}
    numbers, starts, sizes = decoded.rows.types
    text = decoded.rows.type_bytes.tobytes()
    names = {
        int(number): text[at : at + size].decode("utf-8", "replace")
        for number, at, size in zip(numbers, starts, sizes, strict=True)
    }
    found, inverse = np.unique(columns[0], return_inverse=True)
    labels = pl.Series("type", [names.get(int(number)) for number in found], dtype=pl.String)
    return {"type": labels.gather(inverse), "turn": columns[1], "parent": columns[2]}


def _steps(decoded: Decoded) -> dict[str, Any]:
    small = decoded.rows.steps32
    return {
        "step": small[rows.S_STEP],
        "start_ns": decoded.rows.steps64[rows.S_START],
        "end_ns": decoded.rows.steps64[rows.S_END],
        "requests": small[rows.S_REQUESTS],
        "tokens": small[rows.S_TOKENS],
        "running": small[rows.S_RUNNING],
        "waiting": small[rows.S_WAITING],
        "free_blocks": small[rows.S_FREE],
        "preempted": small[rows.S_PREEMPTED],
        "empty_calls": small[rows.S_EMPTY],
    }


def _spans(decoded: Decoded) -> dict[str, Any]:
    spans = decoded.rows.spans
    order = np.lexsort((spans[rows.P_REQUEST], spans[rows.P_FIRST]))
    return {
        "request": spans[rows.P_REQUEST][order],
        "first_step": spans[rows.P_FIRST][order],
        "steps": spans[rows.P_STEPS][order],
        "tokens": spans[rows.P_TOKENS][order],
        "computed_before": spans[rows.P_COMPUTED][order],
    }


def _lookups(decoded: Decoded) -> dict[str, Any]:
    table = decoded.rows.lookups
    return {
        "step": table[rows.L_STEP],
        "request": table[rows.L_REQUEST],
        "tokens_asked": table[rows.L_ASKED],
        "tokens_hit": table[rows.L_HIT],
        "after_preemption": table[rows.L_AFTER] != 0,
    }


def _preemptions(decoded: Decoded) -> dict[str, Any]:
    table = decoded.rows.preemptions
    return {
        "step": table[rows.V_STEP],
        "time_ns": decoded.rows.preempted_at,
        "request": table[rows.V_REQUEST],
        "blocks_lost": table[rows.V_BLOCKS],
        "tokens_lost": table[rows.V_TOKENS],
    }


def _offloads(decoded: Decoded) -> dict[str, Any]:
    small, large = decoded.rows.moves32, decoded.rows.moves64
    return {
        "step": small[rows.M_STEP],
        "time_ns": large[rows.M_TIME],
        "request": small[rows.M_REQUEST],
        "kind": small[rows.M_KIND].astype(np.uint8),
        "tier": small[rows.M_TIER],
        "blocks": small[rows.M_BLOCKS],
        "bytes": large[rows.M_BYTES],
        "tokens": small[rows.M_TOKENS],
        "done_step": small[rows.M_DONE_STEP],
        "done_ns": large[rows.M_DONE],
        "copy_ns": large[rows.M_COPY],
    }


def _block_events(index: int, piece: Events) -> dict[str, Any]:
    return {
        "engine_index": np.full(len(piece.times), index, np.int16),
        "step": piece.narrow[rows.E_STEP],
        "time_ns": piece.times,
        "request": piece.narrow[rows.E_REQUEST],
        "kind": piece.kinds,
        "block": piece.narrow[rows.E_BLOCK],
        "identity": piece.narrow[rows.E_IDENTITY],
        "group": piece.groups,
    }
