"""`kvtrace cut`: a smaller trace out of a trace."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, refuse_to_overwrite, replacing
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_UNITS = {
    "": 10**9,
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "min": 60 * 10**9,
    "h": 3600 * 10**9,
}


@click.command(
    "cut",
    epilog=examples(
        "kvtrace cut traces/samples/thrash.kvt --steps 100:300 -o middle.kvt",
        "kvtrace cut traces/samples/thrash.kvt --from 1s --to 1.5s --rekey -o shared.kvt",
    ),
)
@click.argument("trace", type=TRACE)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="OUT",
              help="The .kvt file to write.")  # fmt: skip
@click.option("--steps", metavar="A:B", help="Scheduler steps A up to, not with, B; either may be left out.")
@click.option("--from", "begin", metavar="T", help="Steps that began at T or later: 1.5s, 2m, or 2026-01-31T12:00:00Z.")
@click.option("--to", "end", metavar="T", help="Steps that began before T.")
@click.option("--requests", "listed", metavar="LIST", help="Requests alone, without the cache: 3,7-9,100- or @FILE.")
@click.option("--engine", type=int, metavar="N", help="The engine to cut, of a trace with several.")
@click.option("--rekey", is_flag=True, help="Give identities, tenants and request ids names that only OUT has.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(
    trace: Path,
    out: Path,
    steps: str | None,
    begin: str | None,
    end: str | None,
    listed: str | None,
    engine: int | None,
    rekey: bool,
    force: bool,
) -> int:
    """Write a part of a trace as a trace of its own.

    It reads, verifies and replays. Cut by steps or time, OUT begins with the state of the run: who held which blocks,
    what was cached, the free queue, running and waiting requests. Cut by requests, it has all that is told of them but
    the blocks.
    """
    if sum([steps is not None, begin is not None or end is not None, listed is not None]) != 1:
        raise UsageError("choose one: --steps A:B, --from T and --to T, or --requests LIST")
    refuse_to_overwrite(out, force)
    from kvtrace_replay.pool import uncached_first
    from kvtrace_traces import cut

    (opened,) = open_traces([trace])
    reader = opened.reader
    about: dict[str, Any] = {"engine_index": engine, "rekey": rekey}
    if listed is None:
        about["uncached_first"] = uncached_first(_header(reader, engine))
    with replacing(out, force) as part, part.open("wb") as file:
        if steps is not None:
            made = cut.cut_steps(reader, file, *_steps(steps), **about)
        elif listed is not None:
            made = cut.cut_requests(reader, file, requests_of(listed, _count(reader, engine)), **about)
        else:
            clock = _header(reader, engine)
            begin_ns, end_ns = (None if text is None else time_ns(text, clock) for text in (begin, end))
            made = cut.cut_times(reader, file, begin_ns, end_ns, **about)
    what = f"{made.requests:,} requests" if made.requests != 1 else "1 request"
    if made.steps:
        carried = f", {made.carried:,} of them under way at its begin" if made.carried else ""
        note(f"wrote steps {made.steps[0]:,} to {made.steps[1] - 1:,} with {what}{carried} to {out}")
    else:
        note(f"wrote {what} to {out}")
        if opened.header.get("source") != "import":
            note("inexact: arrivals, chains, lookups, preemptions and ends are whole; block events are left out")
    if not made.complete:
        note(f"{out} has no end record, as {trace} has none: it ends where that could be read")
    return exit_code([opened])


def _header(reader: Any, engine: int | None) -> dict[str, Any]:
    for header in reader.engines:
        if engine is None or header["engine_index"] == engine:
            found: dict[str, Any] = header
            return found
    known = ", ".join(str(header["engine_index"]) for header in reader.engines)
    raise UsageError(f"--engine {engine}: the trace has engines {known}")


def _count(reader: Any, engine: int | None) -> int:
    return len(reader.chains(_header(reader, engine)["engine_index"]).indptr) - 1


def _steps(text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", text)
    if not found:
        raise UsageError(f"--steps {text} is no range: write A:B, such as 100:300, 100: or :300")
    return int(found[1] or 0), int(found[2]) if found[2] else None


def time_ns(text: str, header: dict[str, Any]) -> int:
    """A time of the command line on the trace's clock: so long after its begin, or a time of day (UTC if it says no
    zone). Raises UsageError for one that is neither, or where the trace does not know the time of day."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if found and found[2] in _UNITS:
        return round(float(found[1]) * _UNITS[found[2]])
    try:
        wall = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text} is no time: write 1.5s, 2m or 2026-01-31T12:00:00Z") from None
    if not header.get("clock_wall_ns") or header.get("clock") == "logical":
        raise UsageError(f"{text}: this trace does not know the time of day; count from its begin, such as 1.5s")
    since = (wall if wall.tzinfo else wall.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    whole = (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000
    return whole - int(header["clock_wall_ns"])


def requests_of(text: str, total: int) -> npt.NDArray[np.int64]:
    """The request numbers of a list, ascending and distinct. `100-` goes on to the last of `total` requests; `@FILE`
    has numbers or ranges, divided by commas or white space. Raises UsageError."""
    import numpy as np

    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--requests {text}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    parts = []
    for word in text.replace(",", " ").split():
        found = re.fullmatch(r"(\d+)(?:(-)(\d*))?", word)
        if not found:
            raise UsageError(f"--requests: {word} is no request number and no range such as 7-9 or 100-")
        first = int(found[1])
        last = first if not found[2] else int(found[3]) if found[3] else total - 1
        if first > last or last >= total:
            raise UsageError(f"--requests: {word} is not there: the trace has requests 0 to {total - 1}")
        parts.append(np.arange(first, last + 1, dtype=np.int64))
    if not parts:
        raise UsageError("--requests names none")
    return np.unique(np.concatenate(parts))
