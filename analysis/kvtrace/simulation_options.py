"""What simulations of either engine take: times of arrival, what steps cost, and which traces they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError

if TYPE_CHECKING:
    from kvtrace.api import Trace


def refuse_lossy(trace: Trace, allow_lossy: bool) -> None:
    """Raises KvtraceError for a lossy trace unless `allow_lossy`."""
    if trace.lossy and not allow_lossy:
        raise KvtraceError(
            f"{trace.path} is lossy (see `kvtrace info`), requests may be missing: --allow-lossy takes what is left"
        )


def rates(given: str | float | Sequence[str | float] | None) -> list[str | float | None]:
    """One or several as a list; none is the recorded one."""
    if given is None or isinstance(given, str | float | int):
        return [given]
    return list(given) or [None]


def default_arrivals(trace: Trace) -> str:
    """As recorded; an import has no steps to arrive at."""
    return "all" if any(header.get("source") == "import" for header in trace.engines) else "step"


def profile_for(trace: Trace, timing: str | Profile | None, arrivals: str) -> Profile | None:
    """What steps cost: `timing` as `simulate` takes it.

    Raises KvtraceError where nothing was named, the trace's own steps do not tell, and `arrivals` need it.
    """
    from kvtrace_replay.timing.models import timing_for

    if isinstance(timing, Profile):
        return timing
    if timing is not None and timing.strip().lower() == "none":
        return None
    try:
        return timing_for(trace.reader, timing)
    except KvtraceError:
        if timing is not None or arrivals == "time":
            raise
        return None  # nobody asked for times
