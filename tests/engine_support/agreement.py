"""Compares a simulated run with the real one, row by row: requests, steps, lookups, preemptions, block events.

Not for workers: it compiles, and after that vLLM starts no engine in a process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.settings import own_settings
from kvtrace_replay.schedulers.sweep import Cell, simulate
from kvtrace_replay.schedulers.vllm_v1 import layout
from kvtrace_traces import open_trace

#: Differ by nature: clocks, and names with a random part. `chain_granules` follows the tokens that were made.
NOT_COMPARED = {"time_ns", "start_ns", "end_ns", "arrival_ns", "finish_ns", "arrival_s", "request_id", "chain_granules"}
TABLES = ("requests", "steps", "step_spans", "lookups", "preemptions")
SHOWN = 3


@dataclass
class Verdict:
    """What a prediction got wrong, each a line (none: it is exact), why it is not bound to be exact (`sweep.WHY`), and
    what happened in the real run."""

    wrong: list[str]
    why: tuple[str, ...] = ()
    happened: Counter[str] = field(default_factory=Counter)


def predict(base: Path, real: Path, changes: Mapping[str, Any], place: Path, same_hashes: bool = True) -> Verdict:
    """Predict from the trace `base` what happened in the trace `real`, recorded at other settings, and compare.

    `changes` are names and values of `simulate`; the simulated trace is written to `place`. `same_hashes`: equal
    content has an equal hash in both traces; otherwise hashes must still correspond one to one.
    """
    recorded_at_base, truth = open_trace(base), open_trace(real)
    cell = simulate(recorded_at_base, changes)[0]
    wrong = settings_differ(cell, truth)
    wrong += run_differs(cell, truth)
    logged = write_run(place, cell.recorded, cell.settings)
    assert cell.run is not None
    for name in ("requests", "preempted", "tokens"):
        if not np.array_equal(getattr(logged, name), getattr(cell.run, name)):
            wrong.append(f"the run that is written differs from the one that is not: {name}")
    simulated = open_trace(place)
    invented = set(simulated.chains().hashes.tolist()) - set(cell.recorded.hashes.tolist())
    wrong += differences(simulated, truth, same_hashes, invented)
    return Verdict(wrong, cell.why, happened(truth))


def settings_differ(cell: Cell, truth: Any) -> list[str]:
    """Whether what vLLM made of the other settings is what the prediction was asked for."""
    real = own_settings(truth.engines[0])
    pairs = [
        (field.name, getattr(cell.settings, field.name), getattr(real, field.name)) for field in fields(cell.settings)
    ]
    return [
        f"settings: {name} {mine} simulated, {theirs} real"
        for name, mine, theirs in pairs
        if (round(mine, 9) != round(theirs, 9) if name == "watermark" else mine != theirs)
    ]


def run_differs(cell: Cell, truth: Any) -> list[str]:
    """Compare the counts that `simulate` gives without a log."""
    run = cell.run
    assert run is not None
    events, lookups = truth.block_events, truth.lookups
    again = lookups.filter(pl.col("after_preemption"))
    mine = {
        "steps": run.steps,
        "preemptions": run.preemptions,
        "evictions": run.evictions,
        "allocations": run.allocations,
        "fills": run.fills,
        "hit tokens": run.hit_tokens,
        "lookup tokens": run.lookup_tokens,
        "hit tokens after preemptions": run.hit_tokens_after,
        "finished": run.finished,
        "cached tokens": run.requests[:, layout.O_CACHED - layout.O_FIRST].tolist(),
        "first steps": run.requests[:, layout.O_FIRST - layout.O_FIRST].tolist(),
        "last steps": run.requests[:, layout.O_LAST - layout.O_FIRST].tolist(),
    }
    requests = truth.requests
    real = {
        "steps": truth.steps.height,
        "preemptions": truth.preemptions.height,
        "evictions": events.filter(pl.col("kind") == "evict").height,
        "allocations": events.filter(pl.col("kind") == "allocate").height,
        "fills": events.filter(pl.col("kind") == "fill").height,
        "hit tokens": int(lookups["tokens_hit"].sum()),
        "lookup tokens": int(lookups["tokens_asked"].sum()),
        "hit tokens after preemptions": int(again["tokens_hit"].sum()),
        "finished": requests["finish_reason"].count(),
        "cached tokens": requests["cached_tokens"].fill_null(-1).to_list(),
        "first steps": requests["first_step"].fill_null(-1).to_list(),
        "last steps": requests["last_step"].fill_null(-1).to_list(),
    }
    return [f"{name}: {mine[name]} simulated, {real[name]} real" for name in mine if mine[name] != real[name]]


def differences(
    simulated: Any, truth: Any, same_hashes: bool = True, invented: Collection[int] = frozenset()
) -> list[str]:
    """Every way in which two traces of one engine differ, in words: the first rows that do.

    `invented` are hashes of the simulated one that stand for tokens unknown to it.
    """
    wrong = []
    idle = _after_idling(truth)
    for name in TABLES:
        mine, real = getattr(simulated, name), getattr(truth, name)
        if name == "steps":
            mine, real = (table.with_columns(_unless(idle, "empty_calls")) for table in (mine, real))
        wrong += rows_differ(name, mine, real)
    hashes, wrong_hashes = correspondence(simulated, truth, same_hashes, invented)
    wrong += wrong_hashes
    return wrong + rows_differ("block_events", named(simulated, hashes), named(truth))


def _after_idling(trace: Any) -> list[int]:
    """The steps before which all that had come was done.

    Whether an idle engine's last, empty call came before the next request or after has no effect, and a trace says of
    arrivals only before which step they were.
    """
    rows = trace.requests.select("arrival_step", "finish_step").rows()
    return [
        step
        for step in range(trace.steps.height)
        if all(ended is not None and ended < step for came, ended in rows if came < step)
    ]


def _unless(steps: list[int], column: str) -> pl.Expr:
    return pl.when(~pl.col("step").is_in(steps)).then(column).alias(column)


def rows_differ(name: str, mine: pl.DataFrame, real: pl.DataFrame) -> list[str]:
    """Compare two tables row by row; the first row that differs, in words, and how many do."""
    columns = [column for column in real.columns if column not in NOT_COMPARED]
    mine, real = mine.select(columns), real.select(columns)
    if mine.equals(real):
        return []
    common = min(mine.height, real.height)
    left, right = mine.head(common), real.head(common)
    bad = pl.DataFrame({c: left[c].ne_missing(right[c]) for c in columns}).select(pl.any_horizontal(pl.all()))
    places = bad.to_series().arg_true().to_list()
    lines = [f"{name}: {mine.height} rows simulated, {real.height} real"] if mine.height != real.height else []
    if places:
        lines.append(f"{name}: {len(places)} of {common} rows differ")
    for at in [*places, *([common] if mine.height != real.height else [])][:SHOWN]:
        ours = mine.row(at, named=True) if at < mine.height else "nothing"
        theirs = real.row(at, named=True) if at < real.height else "nothing"
        lines.append(f"{name}[{at}]: simulated {ours}, real {theirs}")
    return lines


def named(trace: Any, renamed: Mapping[int, int] | None = None) -> pl.DataFrame:
    """The block events with the hash of what is cached in place of its number in the trace."""
    hashes = trace.chains().hashes
    names = [int(h) for h in hashes]
    if renamed is not None:
        names = [renamed.get(name, name) for name in names]
    events = trace.block_events
    if not names:
        return events.with_columns(identity=pl.lit(None, pl.UInt64))
    series = pl.Series(names, dtype=pl.UInt64)
    return events.with_columns(identity=series.gather(events["identity"].cast(pl.UInt32)))


def correspondence(
    simulated: Any, truth: Any, same_hashes: bool, invented: Collection[int]
) -> tuple[dict[int, int], list[str]]:
    """Which hash of the simulated trace stands for which of the real one, from the requests' tokens; and what is wrong.

    They must be the same, or at least correspond one to one; but for those invented, which stand for any.
    """
    mine, real = simulated.chains(), truth.chains()
    forth: dict[int, int] = {}
    back: dict[int, int] = {}
    wrong = []
    for request in range(min(len(mine.indptr), len(real.indptr)) - 1):
        ours = mine.hashes[mine.identities[mine.indptr[request] : mine.indptr[request + 1]]]
        theirs = real.hashes[real.identities[real.indptr[request] : real.indptr[request + 1]]]
        for one, other in zip(ours.tolist(), theirs.tolist(), strict=False):
            unequal = forth.setdefault(one, other) != other
            if one not in invented:
                unequal |= back.setdefault(other, one) != one or (same_hashes and one != other)
            if unequal:
                wrong.append(
                    f"request {request}: its tokens have other hashes, or equal others in only one of the traces"
                )
                break
    return forth, wrong[:SHOWN]


def happened(trace: Any) -> Counter[str]:
    """What a run was made of, to see that a workload has teeth."""
    requests, events = trace.requests, trace.block_events
    found = Counter({str(k): int(n) for k, n in events["kind"].cast(pl.String).value_counts().iter_rows()})
    found["preemptions"] = trace.preemptions.height
    found["aborted"] = requests.filter(pl.col("finish_reason") == "abort").height
    found["stopped"] = requests.filter(pl.col("finish_reason") == "stop").height
    found["hit again"] = trace.lookups.filter(pl.col("after_preemption") & (pl.col("tokens_hit") > 0)).height
    found["cut hits"] = trace.lookups.filter(pl.col("tokens_asked") - pl.col("tokens_hit") == 1).height
    # More than one step in which a request computes several tokens.
    parts = trace.step_spans.filter(pl.col("tokens") > 1).group_by("request").agg(pl.col("steps").sum())
    found["chunks"] = parts.filter(pl.col("steps") > 1).height
    found["late"] = requests.filter(pl.col("arrival_step") > 0).height
    # Requests that start before one that came earlier.
    first = requests["first_step"].drop_nulls().to_numpy()
    found["overtaken"] = int((np.minimum.accumulate(first[::-1])[::-1] < first).sum())
    found["twins"] = _twins(events)
    return found


def _twins(events: pl.DataFrame) -> int:
    """Blocks that were cached while another held the same."""
    held: Counter[int] = Counter()
    twins = 0
    changes = events.filter(pl.col("kind").is_in(["fill", "evict"]))
    for kind, identity in zip(changes["kind"].to_list(), changes["identity"].to_list(), strict=True):
        if kind == "evict":
            held[identity] -= 1
        else:
            twins += held[identity] > 0
            held[identity] += 1
    return twins


def drifted(base: list[list[int]], other: list[list[int]]) -> list[int]:
    """The requests whose tokens are not the same in two runs, as far as both made them."""
    return [
        number
        for number, (mine, theirs) in enumerate(zip(base, other, strict=True))
        if mine[: len(theirs)] != theirs[: len(mine)]
    ]
