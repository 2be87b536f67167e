"""A timeline in the JSON of the Trace Event Format ("Trace Event Format", Google, public), which Perfetto's UI
(ui.perfetto.dev) and chrome://tracing open; gzipped where the file's name ends in ``.gz``.

A process per engine. Its threads: *steps*; *preemptions* and *cache* (evictions, resets, copies to and from slower
tiers), with an instant for all of a kind at one time; then *lanes*, each of which draws one request after the other,
the phases under the request. A request takes the lowest lane that is free when it arrives, so there are as many
as requests in the engine at a time. Above MOST_LANES (a long queue, all of it there at the start) lanes are taken at
the first step instead, and the queue is drawn apart, as asynchronous slices. Counters: blocks, requests, tokens a step.

Times are whole microseconds, each time rounded down once: so what ends where another begins still does, and nesting
stays nesting. Events go out in small batches; memory is that of the trace.
"""

# mypy: disable-error-code="no-untyped-call, call-arg"
from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.exporters import exporter
from kvtrace_traces.exporters.idle import idle_blocks, prefill_tokens
from kvtrace_traces.exporters.phases import QUEUE, Clock, Spells, batches, clock, lanes, phases, spells
from kvtrace_traces.exporters.references import written
from kvtrace_traces.schema import BLOCK_EVENT_KINDS

MOST_LANES = 1000
_BATCH = 4096  # rows at a time
_STEPS, _PREEMPTIONS, _CACHE, _LANES = 101, 102, 103, 1001  # numbers of threads
_TOLD = ("evict", "reset", "store", "load")  # kinds of block events that are drawn
_text = json.dumps
I64 = NDArray[np.int64]


class _Engine(NamedTuple):
    """One engine's tables. ``pid``: its process; ``offset_ns``: what to add to its times."""

    header: dict[str, Any]
    pid: int
    offset_ns: int
    clock: Clock
    steps: pl.DataFrame
    spans: pl.DataFrame
    requests: pl.DataFrame
    preemptions: pl.DataFrame
    told: Spells

    def us(self, time_ns: int) -> int:
        return (time_ns + self.offset_ns) // 1000


@exporter("perfetto", "a timeline for Perfetto's UI (Trace Event Format); OUT.json or OUT.json.gz")
def write(trace: Any, out: Path, force: bool) -> dict[str, Any]:
    """Write the timeline of ``trace``; see the module. Raises :class:`KvtraceError` for a trace without steps."""
    if not trace.steps.height:
        source = trace.header.get("source")
        fix = " (an import has none): `kvtrace simulate TRACE -o OUT.kvt` makes some" if source == "import" else ""
        raise KvtraceError(f"{trace.path} has no steps, which a timeline is made of{fix}")
    base = min(int(header.get("clock_wall_ns", 0)) for header in trace.engines)
    count = 0
    with written(out, force) as file:
        packed = gzip.GzipFile("", "wb", 6, file, 0) if out.suffix == ".gz" else None
        sink: Any = packed or file
        other = {"trace": trace.path.name, "clock_wall_ns": base}
        sink.write(f'{{"displayTimeUnit":"ms","otherData":{_text(other)},"traceEvents":[\n'.encode())
        for header in trace.engines:
            if (engine := _engine(trace, header, base)) is not None:
                count = _write(_events(trace, engine), sink, count)
        sink.write(b"\n]}\n")
        if packed is not None:
            packed.close()
    return {
        "path": str(out), "events": count, "requests": trace.requests.height, "steps": trace.steps.height,
        "bytes": out.stat().st_size,
    }  # fmt: skip


def _write(events: Iterator[str], sink: BinaryIO, count: int) -> int:
    """Write one event a line, some thousands at a time, after ``count`` that are written. Returns how many are then."""
    held: list[str] = []
    for event in events:
        held.append(event)
        if len(held) == _BATCH:
            sink.write(((",\n" if count else "") + ",\n".join(held)).encode())
            count += len(held)
            held.clear()
    if held:
        sink.write(((",\n" if count else "") + ",\n".join(held)).encode())
    return count + len(held)


def _engine(trace: Any, header: dict[str, Any], base: int) -> _Engine | None:
    mine = pl.col("engine_index") == header["engine_index"]
    steps, requests = trace.steps.filter(mine), trace.requests.filter(mine).sort("request")
    if not steps.height:
        return None
    spans, preemptions = trace.step_spans.filter(mine), trace.preemptions.filter(mine)
    if header.get("clock") == "logical":
        # Its steps have no durations; its requests' arrivals are those of the recorded run, on another clock.
        known = steps.select(arrival_step="step", arrival_ns="start_ns")
        requests = requests.drop("arrival_ns").join(known, on="arrival_step", how="left", maintain_order="left")
        requests = requests.with_columns(pl.col("arrival_ns").fill_null(-1))
    told = spells(requests["request"].to_numpy().astype(np.int64), spans, preemptions)
    return _Engine(
        header, 1 + int(header["engine_index"]), int(header.get("clock_wall_ns", 0)) - base, clock(steps), steps, spans,
        requests, preemptions, told,
    )  # fmt: skip


def _events(trace: Any, engine: _Engine) -> Iterator[str]:
    begins, ends = _intervals(engine)
    chosen, many = lanes(begins, ends)
    queue_apart = many > MOST_LANES
    if queue_apart:
        firsts = _first_begins(engine, begins)
        ran = firsts >= 0
        chosen = np.full(len(begins), -1, np.int32)
        chosen[ran], many = lanes(np.maximum(firsts, begins)[ran], ends[ran])
    yield from _names(engine, many)
    yield from _steps(trace, engine)
    yield from _instants(trace, engine)
    yield from _requests(engine, chosen, queue_apart)


# ---------------------------------------------------------------- names of processes and threads


def _names(engine: _Engine, many: int) -> Iterator[str]:
    header = engine.header
    about = " ".join(str(header[key]) for key in ("engine", "engine_version") if header.get(key))
    name = f"engine {header['engine_index']}" + (f": {header['model']}" if header.get("model") else "")
    logical = header.get("clock") == "logical"
    yield _meta(engine.pid, 0, "process_name", {"name": name})
    yield _meta(
        engine.pid, 0, "process_labels", {"labels": f"{about}, no clock: times only order" if logical else about}
    )
    yield _meta(engine.pid, 0, "process_sort_index", {"sort_index": engine.pid})
    threads = [(_STEPS, "steps"), (_PREEMPTIONS, "preemptions"), (_CACHE, "cache")]
    width = len(str(max(many - 1, 0)))
    threads += [(_LANES + lane, f"requests, lane {lane:0{width}}") for lane in range(many)]
    for tid, text in threads:
        yield _meta(engine.pid, tid, "thread_name", {"name": text})
        yield _meta(engine.pid, tid, "thread_sort_index", {"sort_index": tid})


def _meta(pid: int, tid: int, name: str, args: dict[str, Any]) -> str:
    return f'{{"ph":"M","pid":{pid},"tid":{tid},"ts":0,"name":"{name}","args":{_text(args)}}}'


# ---------------------------------------------------------------- steps and counters


def _steps(trace: Any, engine: _Engine) -> Iterator[str]:
    """A slice for each step, from the output before, or its begin, to its output; then counters that changed."""
    pid, at = engine.pid, engine.clock
    past = np.append(np.int64(0), np.maximum.accumulate(at.ends)[:-1])
    begins = np.maximum(at.starts, past)
    prefill = _prefill(engine)
    capacity, idle = _idle(trace, engine)
    frame = engine.steps.sort("step")
    before: dict[str, str] = {}

    def counter(name: str, ts: int, args: str) -> Iterator[str]:
        if before.get(name) != args:
            before[name] = args
            yield f'{{"ph":"C","pid":{pid},"ts":{ts},"name":"{name}","args":{{{args}}}}}'

    for first, rows in batches(frame, _BATCH):
        for i, row in enumerate(rows, first):
            ts, decode = engine.us(int(begins[i])), max(0, row["tokens"] - int(prefill[i]))
            args = (
                f'"step":{row["step"]},"requests":{row["requests"]},"prefill_tokens":{prefill[i]},'
                f'"decode_tokens":{decode},"running":{row["running"]},"waiting":{row["waiting"]},'
                f'"free_blocks":{row["free_blocks"]}'
            )
            name = "mixed" if prefill[i] and decode else "prefill" if prefill[i] else "decode"
            head = f'"pid":{pid},"tid":{_STEPS},"ts":{ts},"cat":"step"'
            if at.ends[i] < 0:
                yield f'{{"ph":"i","s":"t",{head},"name":"{name}, no output","args":{{{args}}}}}'
            else:
                dur = max(0, engine.us(int(at.ends[i])) - ts)
                yield f'{{"ph":"X",{head},"dur":{dur},"name":"{name}","args":{{{args}}}}}'
            begun = engine.us(int(at.starts[i]))
            if capacity is not None:
                cached, free = min(int(idle[i]), row["free_blocks"]), row["free_blocks"]
                counts = f'"used":{capacity - free},"cached idle":{cached},"free":{free - cached}'
                yield from counter("blocks", begun, counts)
            yield from counter("requests", begun, f'"running":{row["running"]},"waiting":{row["waiting"]}')
            yield from counter("tokens a step", begun, f'"prefill":{prefill[i]},"decode":{decode}')


def _prefill(engine: _Engine) -> I64:
    """Tokens of prompts in each step."""
    prompts = engine.requests.select("request", pl.col("prompt_tokens").cast(pl.Int64))
    spans = engine.spans.join(prompts, on="request").filter(pl.col("computed_before") < pl.col("prompt_tokens"))
    columns = ("first_step", "steps", "tokens", "computed_before", "prompt_tokens")
    first, *others = spans.select(pl.col(columns).cast(pl.Int64)).to_numpy().T.copy()
    found: I64 = prefill_tokens(np.searchsorted(engine.clock.steps, first), *others, len(engine.clock.steps))
    return found


def _idle(trace: Any, engine: _Engine) -> tuple[int | None, I64]:
    """Usable blocks, None where they are not known, and how many are cached and idle at each step."""
    blocks = engine.header.get("num_blocks")
    if not blocks:
        return None, np.zeros(0, np.int64)
    mine = pl.col("engine_index") == engine.header["engine_index"]
    events = trace.block_events if len(trace.engines) == 1 else trace.block_events.filter(mine)
    idle: I64 = idle_blocks(
        events["time_ns"].to_numpy(), events["kind"].to_physical().cast(pl.UInt8).to_numpy(),
        events["block"].fill_null(-1).to_numpy(), events["identity"].fill_null(-1).to_numpy(),
        engine.clock.starts, int(blocks),
    )  # fmt: skip
    return int(blocks) - 1, idle


# ---------------------------------------------------------------- instants


def _instants(trace: Any, engine: _Engine) -> Iterator[str]:
    names = engine.requests.select("request", "request_id")
    lost = engine.preemptions.join(names, on="request", how="left", maintain_order="left")
    head = f'"ph":"i","s":"t","pid":{engine.pid}'
    for _, rows in batches(lost, _BATCH):
        for row in rows:
            args = {"request": row["request"], "request_id": row["request_id"], "step": row["step"],
                    "blocks_lost": row["blocks_lost"], "tokens_lost": row["tokens_lost"]}  # fmt: skip
            ts = engine.us(row["time_ns"])
            what = f'"tid":{_PREEMPTIONS},"ts":{ts},"cat":"preemption","name":"preempted"'
            yield f'{{{head},{what},"args":{_text(args)}}}'
    kinds = pl.col("kind").cast(pl.String)
    told = (
        trace.block_events.lazy()
        .filter(pl.col("engine_index") == engine.header["engine_index"])
        .filter(pl.col("kind").to_physical().is_in([BLOCK_EVENT_KINDS.index(kind) for kind in _TOLD]))
        .group_by("time_ns", kinds, "step", maintain_order=True)
        .agg(pl.len().alias("blocks"))
        .collect()
    )
    for _, rows in batches(told, _BATCH):
        for row in rows:
            what = f'"step":{row["step"]}' + (f',"blocks":{row["blocks"]}' if row["kind"] != "reset" else "")
            ts = engine.us(row["time_ns"])
            yield f'{{{head},"tid":{_CACHE},"ts":{ts},"cat":"cache","name":"{row["kind"]}","args":{{{what}}}}}'


# ---------------------------------------------------------------- requests


def _intervals(engine: _Engine) -> tuple[I64, I64]:
    """When each request came and went, in µs; what is not known is its first step, and the end of the trace."""
    firsts = _first_begins(engine, None)
    arrived = engine.requests["arrival_ns"].fill_null(-1).to_numpy()
    finished = engine.requests["finish_ns"].fill_null(-1).to_numpy()
    ends = np.where(finished >= 0, finished, engine.clock.last_ns)
    begins = np.where(arrived >= 0, arrived, np.where(firsts >= 0, firsts, ends))
    begins, ends = (begins + engine.offset_ns) // 1000, (ends + engine.offset_ns) // 1000
    return begins, np.maximum(begins, ends)


def _first_begins(engine: _Engine, begins: I64 | None) -> I64:
    """When each request's first step began, -1 without one: ns on the engine's clock; in µs with ``begins``."""
    steps = engine.requests["first_step"].cast(pl.Int64).fill_null(-1).to_numpy()
    at = np.minimum(np.searchsorted(engine.clock.steps, steps), len(engine.clock.steps) - 1)
    times = np.where(engine.clock.steps[at] == steps, engine.clock.starts[at], -1)
    return times if begins is None else np.where(times >= 0, (times + engine.offset_ns) // 1000, -1)


def _requests(engine: _Engine, chosen: NDArray[np.int32], queue_apart: bool) -> Iterator[str]:
    pid = engine.pid
    for first, rows in batches(engine.requests, _BATCH):
        for i, row in enumerate(rows, first):
            arrival = -1 if row["arrival_ns"] is None else row["arrival_ns"]
            finish = -1 if row["finish_ns"] is None else row["finish_ns"]
            found = phases(engine.told, i, engine.clock, row["prompt_tokens"], arrival, finish)
            name = _text(row["request_id"] or f"request {row['request']}")
            if queue_apart and found[0].name == QUEUE:
                queue = found.pop(0)
                head = f'"pid":{pid},"tid":{_LANES},"cat":"queue","id":"{pid}.{row["request"]}","name":"queue"'
                args = f'"request":{row["request"]},"request_id":{name}'
                yield f'{{"ph":"b",{head},"ts":{engine.us(queue.begin_ns)},"args":{{{args}}}}}'
                yield f'{{"ph":"e",{head},"ts":{engine.us(queue.end_ns)}}}'
            if not found or chosen[i] < 0:
                continue
            head = f'"ph":"X","pid":{pid},"tid":{_LANES + chosen[i]}'
            begin, end = engine.us(found[0].begin_ns), engine.us(found[-1].end_ns)
            args = _text({key: row[key] for key in _ABOUT} | {"finish_reason": row["finish_reason"] or "unfinished"})
            yield f'{{{head},"ts":{begin},"dur":{end - begin},"cat":"request","name":{name},"args":{args}}}'
            for phase in found:
                ts = engine.us(phase.begin_ns)
                work = f',"args":{{"tokens":{phase.tokens},"steps":{phase.steps}}}' if phase.steps else ""
                dur = engine.us(phase.end_ns) - ts
                yield f'{{{head},"ts":{ts},"dur":{dur},"cat":"phase","name":"{phase.name}"{work}}}'


_ABOUT = (
    "request", "request_id", "arrival_step", "prompt_tokens", "cached_tokens", "output_tokens", "preemptions",
    "priority",
)  # fmt: skip
