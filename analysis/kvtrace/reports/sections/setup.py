"""What ran: the engine, its configuration, how much of it the trace holds, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvtrace import people
from kvtrace.people import Style
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run
from kvtrace_traces.schema import INEXACT


@section("setup", title="What ran", order=10)
def setup(run: Run) -> Iterator[Panel]:
    """Facts of the header, and the table of losses."""
    yield Panel("setup", facts=[(label, value) for label, value in facts(run) if value])
    losses = run.sql("SELECT reason, detail, events FROM losses WHERE engine_index = {engine}")
    if losses.height:
        yield Panel("losses", title="What is missing", prose="Everything on this page rests on what is left.",
                    table=losses.select("reason", "events", "detail"), style=Style(cells={"detail": str}))  # fmt: skip


def facts(run: Run) -> list[tuple[str, str]]:
    """Labels and values; an empty value is not known."""
    header, info = run.header, run.trace.info
    scheduler: dict[str, Any] = header.get("scheduler") or {}
    engine = " ".join(str(part) for part in (header.get("engine"), header.get("engine_version")) if part)
    origin = {"import": "imported: requests only, no engine", "simulated": "simulated by kvtrace"}
    cache = "not known"
    if run.capacity is not None:
        tokens = run.capacity * run.block_size
        cache = f"{run.capacity:,} usable blocks of {run.block_size} tokens: {tokens:,} tokens"
        if header.get("bytes_per_block"):
            cache += f", {people.size(header['bytes_per_block'] * run.capacity)}"
    limits = [
        f"{scheduler[name]:,} {words}"
        for name, words in (("max_num_seqs", "requests running"), ("max_num_batched_tokens", "tokens a step"))
        if scheduler.get(name)
    ]
    ways = [
        words if scheduler.get(name) else f"no {words}"
        for name, words in (("chunked_prefill", "chunked prefill"), ("async_scheduling", "asynchronous scheduling"))
        if scheduler.get(name) is not None
    ]
    caching = header.get("prefix_caching")
    inexact = [INEXACT.get(name, name) for name in header.get("inexact") or ()]
    return [
        ("trace", f"{run.trace.path}, {people.size(info['bytes'])}"),
        ("engine", engine),
        ("model", ", ".join(str(part) for part in (header.get("model"), header.get("dtype")) if part)),
        ("device", str(header.get("device") or "")),
        (
            {"simulated": "simulated", "import": "imported"}.get(str(header.get("source")), "recorded"),
            str(header.get("created") or "")[:19].replace("T", " "),
        ),
        ("origin", origin.get(str(header.get("source")), "recorded from a running engine")),
        ("cache", cache if not run.imported else f"not known; blocks of {run.block_size} tokens"),
        ("prefix caching", "" if run.imported or caching is None else "on" if caching else "off"),
        ("limits", " · ".join(limits)),
        ("scheduling", " · ".join([str(scheduler.get("policy") or ""), *ways]).strip(" ·")),
        ("requests", f"{run.requests:,}"),
        ("steps", f"{run.steps:,}" if run.steps else "none: the trace tells of requests only"),
        ("clock", "none: steps are counted, not timed" if not run.timed else ""),
        ("followed exactly", "no: " + "; ".join(inexact) if inexact else "" if run.imported else "yes"),
        ("whole", whole(run)),
    ]


def whole(run: Run) -> str:
    """Whether anything is missing from the trace."""
    info = run.trace.info
    if info["complete"]:
        return "yes"
    parts = [
        f"{info['dropped']:,} block events dropped" if info["dropped"] else "",
        f"{info['damaged_frames']:,} damaged stretches" if info["damaged_frames"] else "",
    ]
    missing = ", ".join(part for part in parts if part)
    return f"no: {missing}" if missing else "no end record: the engine was killed, or was still running"
