"""The ways to cut: by steps, by time, by requests. The new log is written while the old one is read.

What is kept in memory is bounded by what is alive at the place of the cut: the block pool, the requests under way and
their chains, and a window over the requests since the oldest of them. The old log is mapped, not read at once.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import secrets
import time
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvtrace_traces import survey, wire
from kvtrace_traces.cut import blocks
from kvtrace_traces.cut import follow as f
from kvtrace_traces.cut import translate as t
from kvtrace_traces.cut.follower import NOBODY, Follower, Log
from kvtrace_traces.cut.identities import fresh_key
from kvtrace_traces.cut.operations import extended, words_of
from kvtrace_traces.cut.output import Output
from kvtrace_traces.engine_log import EngineLog
from kvtrace_traces.errors import UsageError
from kvtrace_traces.played import C_DUE, C_REQUESTS, C_TIME
from kvtrace_traces.schema import INEXACT, OPS
from kvtrace_traces.trace import Trace

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
NO_KEY: U64 = np.zeros(2, np.uint64)
NO_NAMES = np.empty(0, np.int32)
COMMITS_AT_ONCE = 4096
CARRIED, CHOSEN = "carried-state", "chosen-requests"
PRIVATE = ("host", "pid", "run_id", "python", "tracer", "simulated", "path")
"""Keys of a header that a rekeyed cut leaves out."""


class Cut(NamedTuple):
    """What was written. ``steps``: first and the one behind the last, as the old trace numbers them, None for a cut by
    requests; ``requests`` in it, of which ``carried`` were under way at its begin."""

    steps: tuple[int, int] | None
    requests: int
    carried: int
    complete: bool


def cut_steps(
    trace: Trace,
    file: BinaryIO,
    first: int,
    stop: int | None,
    *,
    engine_index: int | None = None,
    rekey: bool = False,
    uncached_first: bool | None = None,
) -> Cut:
    """Write the steps from ``first`` up to, not with, ``stop`` (None: all that follow) of one engine to ``file``.

    What happens between the scheduler calls of two steps belongs to the earlier one, as in the tables. ``rekey``
    replaces identities, tenants and names of requests by others that only this cut has. ``uncached_first``: whether
    this engine version puts freed blocks without an identity to the front of its free queue; None if not known.

    Raises :class:`UsageError` for steps that are not there or a trace without any, :class:`KvtraceError` for one that
    is damaged before the steps that are asked for.
    """
    source = _Source(trace, engine_index)
    source.need_steps()
    if stop is not None and stop <= first:
        raise UsageError(f"steps {first}:{stop} are none: the second number must be the greater one")
    return _stretch(source, file, first, stop, rekey, bool(uncached_first))


def cut_times(
    trace: Trace,
    file: BinaryIO,
    begin_ns: int | None,
    stop_ns: int | None,
    *,
    engine_index: int | None = None,
    rekey: bool = False,
    uncached_first: bool | None = None,
) -> Cut:
    """As :func:`cut_steps`, with the steps that began at ``begin_ns`` or later and before ``stop_ns``, on the clock of
    the trace. Of an import, which has no steps: with the requests that arrived then."""
    source = _Source(trace, engine_index)
    if source.log.header.get("source") == "import":
        return cut_requests(trace, file, _arrived(trace, source.index, begin_ns, stop_ns), engine_index=engine_index,
                            rekey=rekey)  # fmt: skip
    source.need_steps()
    scout = Follower(source.words, False)
    if scout.run(time_ns=-int(f.NO_LIMIT) if begin_ns is None else begin_ns) != f.AT_TIME:
        raise UsageError(f"no step of {trace.path} begins at or after {_seconds(begin_ns)}: its last one begins before")
    first = scout.step - 1
    if stop_ns is not None and scout.begun >= stop_ns:
        raise UsageError(f"no step of {trace.path} begins from {_seconds(begin_ns)} up to {_seconds(stop_ns)}")
    stop = None
    if stop_ns is not None and scout.run(time_ns=stop_ns) == f.AT_TIME:
        stop = scout.step - 1
    return _stretch(source, file, first, stop, rekey, bool(uncached_first))


def cut_requests(
    trace: Trace, file: BinaryIO, numbers: I64, *, engine_index: int | None = None, rekey: bool = False
) -> Cut:
    """Write what is told of some requests of one engine (their numbers, ascending and distinct) to ``file``.

    Arrivals, chains, lookups, preemptions, ends, and the steps in which one of them ran stay as they were. What
    happened to blocks is left out, for the other requests took part in it; a recorded trace is marked so.
    """
    source = _Source(trace, engine_index)
    total = source.requests
    if not len(numbers):
        raise UsageError("no requests to cut out: name some")
    if int(numbers[-1]) >= total or int(numbers[0]) < 0:
        wrong = int(numbers[0]) if numbers[0] < 0 else int(numbers[-1])
        raise UsageError(f"there is no request {wrong}: {trace.path} has requests 0 to {total - 1}")
    return _chosen(source, file, numbers, rekey)


class _Source:
    """The log of the engine that is cut."""

    def __init__(self, trace: Trace, engine_index: int | None) -> None:
        if trace.recover == "skip":
            raise UsageError(
                "a trace read with recover='skip' has holes: open it without, and what is whole can be cut"
            )
        indices = [int(header["engine_index"]) for header in trace.engines]
        if engine_index is None and len(indices) > 1:
            known = ", ".join(map(str, indices))
            raise UsageError(f"{trace.path} has several engines ({known}): choose one with --engine")
        self.trace, self.index = trace, indices[0] if engine_index is None else engine_index
        self.log: EngineLog = trace._log(self.index)
        log = self.log
        per_block = max(1, int(log.header["block_size"]) // int(log.header["granule"]))
        self.words = Log(
            log._words,
            log._starts,
            log._stops,
            log._keys,
            int(log._counts[survey.N_OWNERS]),
            log._num_blocks,
            per_block,
        )

    @property
    def requests(self) -> int:
        return int(self.log._counts[survey.N_REQUESTS])

    def need_steps(self) -> None:
        if self.log.header.get("source") == "import" or not len(self.words.starts):
            raise UsageError(
                f"{self.trace.path} has no scheduler steps: cut it by --requests, or an import by arrival time"
            )

    def header(self, rekey: bool, inexact: list[str], about: dict[str, Any]) -> dict[str, Any]:
        old = {key: value for key, value in self.log.header.items() if key not in ("log_format", "segment")}
        if rekey:
            old = {key: value for key, value in old.items() if key not in PRIVATE}
            about = {key: value for key, value in about.items() if key != "of"} | {"rekeyed": True}
        elif "cut" in old:
            about = {**about, "source": old["cut"]}
        return {
            **old,
            "run_id": secrets.token_hex(8),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "inexact": inexact,
            "cut": about,
        }

    def names(self, numbers: I64, first: int, rekey: bool) -> NDArray[np.int32]:
        """For a rekeyed cut: what each request is called, in the order of its old name.

        A queue by priority breaks ties of priority and time by name, and so must find the new ones in the old order.
        Elsewhere requests are called by their numbers, and nothing has to be read ahead.
        """
        if not rekey or (self.log.header.get("scheduler") or {}).get("policy") != "priority":
            return NO_NAMES
        requests = self.trace.requests.filter(pl.col("engine_index") == self.index)
        kept = requests.filter((pl.col("request") >= first) | pl.col("request").is_in(numbers.tolist()))
        return (kept.sort("request")["request_id"].rank("ordinal").to_numpy() - 1).astype(np.int32)

    def inexact(self, seen: int = 0) -> list[str]:
        """What the header tells, and what the log told up to here (bits of ``seen``)."""
        told = [str(name) for name in self.log.header.get("inexact", [])]
        return told + [name for bit, name in enumerate(INEXACT) if seen >> bit & 1 and name not in told]


def _stretch(source: _Source, file: BinaryIO, first: int, stop: int | None, rekey: bool, front: bool) -> Cut:
    words = source.words
    begin = Follower(words, front)
    start = begin.first_step
    if begin.run(step=max(first, start)) != f.AT_STEP and first > start:
        raise UsageError(f"step {first} is not there: {source.trace.path} has steps {start} to {begin.step - 1}")
    key = fresh_key() if rekey else None
    carried = first > start
    live, state, place = NOBODY, [], (0, 0)
    if carried:
        live, place = begin.live(), begin.place
        numbers, base = live, int(begin.state[C_REQUESTS])
    else:
        numbers, base = NOBODY, 0
    names = source.names(numbers, base, rekey)
    translated = _Stretch(source, numbers, base, max(first, start), key, names)
    if carried:
        state = _carried(begin, live, key, translated)
    inexact = source.inexact(int(begin.state[blocks.F_INEXACT]) if carried else 0)
    if carried and CARRIED not in inexact:
        inexact.append(CARRIED)
    end = begin  # which goes on from here
    if not carried:
        end = Follower(words, front)
    reached = end.run(step=stop) == f.AT_STEP
    if end.step <= max(first, start):
        raise UsageError(f"step {first} is not there: {source.trace.path} has steps {start} to {end.step - 1}")
    whole = reached or source.log.complete
    about = {
        "of": source.log.header.get("run_id"),
        "steps": [max(first, start), end.step],
        "carried": live.tolist(),
        "first_request": base,
    }
    out = Output(file, source.header(rekey, inexact, about))
    out.together(state, wire.KEY)
    translated.write(out, place, end.place if reached else (len(words.starts), 0))
    due = int(end.state[C_DUE])
    if reached and due:
        out.commit(_late(source, end, due))
    if whole:
        out.end(int(end.state[C_TIME]), translated.events)
    requests = len(numbers) + int(end.state[C_REQUESTS]) - base
    return Cut((max(first, start), end.step), requests, len(live), whole)


def _carried(begin: Follower, live: I64, key: U64 | None, translated: _Stretch) -> list[U32]:
    """The operations of the state at a cut: KEY, the arrivals and chains of live requests, and the snapshot."""
    at = begin.arrivals(live)
    unknown = int((at < 0).sum())
    chains, snapshot = begin.snapshot(live, key)
    operations = [begin.key(unknown)]
    for request, position in zip(live.tolist(), at.tolist(), strict=True):
        if position >= 0:
            operations.append(translated.arrival(request, position))
            if request in chains:
                operations.append(chains[request])
    return operations + snapshot


def _late(source: _Source, end: Follower, due: int) -> U32:
    """The outputs of the last steps that arrive when later steps, which are not in the cut, have begun."""
    words, times = source.words, np.empty(due, np.int64)
    commit, at = end.place
    told = t.late_outputs(words.words, words.starts, words.stops, commit, at, int(end.state[C_TIME]), due, times)
    parts = [NOTHING]
    for at_ns in times[:told].tolist():
        if at_ns < 0:
            parts.append(extended("SKIP", words_of(1)))
        else:
            parts += [extended("TIME", words_of(at_ns, at_ns >> 32)), words_of(OPS["OUTPUT"].code)]
    return np.concatenate(parts)


NOTHING: U32 = np.empty(0, np.uint32)


class _Stretch:
    """Translates the operations of a stretch, commit by commit."""

    def __init__(
        self, source: _Source, numbers: I64, first: int, step: int, key: U64 | None, names: NDArray[np.int32]
    ) -> None:
        self._log = source.words
        self._numbers, self._first, self._names = numbers, first, names
        self._key = NO_KEY if key is None else key
        self._scalars = np.zeros(t.T_SCALARS, np.int64)
        self._scalars[t.T_STEP] = step
        self._scalars[t.T_REQUESTS] = first
        self._scalars[t.T_REKEY] = key is not None
        self._out = np.empty(0, np.uint32)

    @property
    def events(self) -> int:
        """Block events in what was translated."""
        return int(self._scalars[t.T_EVENTS])

    def _translate(self, begin: int, end: int) -> U32:
        if len(self._out) < 4 * (end - begin) + 64:
            self._out = np.empty(4 * (end - begin) + 64, np.uint32)
        n = t.stretch(
            self._log.words, begin, end, self._out, self._scalars, self._numbers, self._first, self._key, self._names
        )
        return self._out[:n]

    def arrival(self, request: int, position: int) -> U32:
        """REQ of a live request, which stands at ``position``."""
        self._scalars[t.T_REQUESTS] = request
        n = survey.op_words(self._log.words, position, len(self._log.words))
        found = self._translate(position, position + int(n)).copy()
        self._scalars[t.T_REQUESTS] = self._first
        return found

    def write(self, out: Output, begin: tuple[int, int], end: tuple[int, int]) -> None:
        """Write what lies between two places: each a commit and the word in it, 0 for its first."""
        log = self._log
        for commit in range(begin[0], min(end[0] + 1, len(log.starts))):
            start, stop = int(log.starts[commit]), int(log.stops[commit])
            first = begin[1] if commit == begin[0] and begin[1] else start
            last = stop if commit < end[0] else end[1]
            if last > first:
                flags = wire.KEY if log.keys[commit] and first == start else 0
                out.commit(self._translate(first, last), flags)


def _chosen(source: _Source, file: BinaryIO, numbers: I64, rekey: bool) -> Cut:
    log, key = source.words, fresh_key() if rekey else None
    follower = Follower(log, False, numbers)
    imported = source.log.header.get("source") == "import"
    inexact = source.inexact() + (
        [CHOSEN] if not imported and CHOSEN not in source.log.header.get("inexact", []) else []
    )
    about = {"of": source.log.header.get("run_id"), "requests": ranges(numbers)}
    out = Output(file, source.header(rekey, inexact, about))
    scalars = np.zeros(t.T_SCALARS, np.int64)
    scalars[t.T_REKEY] = rekey
    names = source.names(numbers, source.requests, rekey)
    due = np.zeros(0, np.uint8)
    first = log.words[int(log.starts[0]) :]
    claimed, pending = int(first[4]), int(first[9])
    scalars[t.T_TIME] = scalars[t.T_LATE] = int(first[1]) | int(first[2]) << 32
    scalars[t.T_REQUESTS], scalars[t.T_DUE_N] = claimed, pending
    due = np.zeros(pending + 1, np.uint8)
    out.commit(words_of(OPS["KEY"].code, first[1], first[2], 0, 0, 0, 0, first[7], first[8], 0, 0), wire.KEY)
    for commit in range(0, len(log.starts), COMMITS_AT_ONCE):
        last = min(commit + COMMITS_AT_ONCE, len(log.starts))
        made = np.zeros(int((log.stops[commit:last] - log.starts[commit:last]).sum()), np.uint8)
        follower.run(commits=last, made=made)
        due = _unrolled(due, scalars, int(follower.state[blocks.F_SCHEDS]))
        scalars[t.T_SCHEDS] = 0
        for c in range(commit, last):
            begin, stop = int(log.starts[c]), int(log.stops[c])
            words = np.empty(4 * (stop - begin) + 64, np.uint32)
            n = t.choose(
                log.words, begin, stop, words, scalars, numbers, NO_KEY if key is None else key, names, made, due
            )
            out.commit(words[:n])
    if source.log.complete:
        out.end(int(scalars[t.T_TIME]), 0)
    return Cut(None, len(numbers), 0, source.log.complete)


def _unrolled(due: NDArray[np.uint8], scalars: I64, more: int) -> NDArray[np.uint8]:
    """The ring of steps without output from its begin, with room for ``more``."""
    at, n = int(scalars[t.T_DUE_AT]), int(scalars[t.T_DUE_N])
    ring = np.zeros(n + more + 1, np.uint8)
    ring[:n] = due[(at + np.arange(n)) % len(due)]
    scalars[t.T_DUE_AT] = 0
    return ring


def _arrived(trace: Trace, index: int, begin_ns: int | None, stop_ns: int | None) -> I64:
    """Numbers of the requests of an import that arrived in time."""
    requests = trace.requests.filter(pl.col("engine_index") == index)
    when = pl.col("arrival_ns")
    if requests.filter(when < 0).height or (requests.height > 1 and requests["arrival_ns"].max() == 0):
        raise UsageError(f"{trace.path} does not tell when its requests arrived: cut it by --requests")
    if begin_ns is not None:
        requests = requests.filter(when >= begin_ns)
    if stop_ns is not None:
        requests = requests.filter(when < stop_ns)
    if not requests.height:
        raise UsageError(f"no request of {trace.path} arrives from {_seconds(begin_ns)} up to {_seconds(stop_ns)}")
    return requests["request"].sort().cast(pl.Int64).to_numpy()


def _seconds(time_ns: int | None) -> str:
    return "its end" if time_ns is None else f"{time_ns / 1e9:g} s"


def ranges(numbers: I64) -> str:
    """Ascending numbers as people write them: ``0-3,7``."""
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    first, last = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True))
