"""Other times of arrival: the recorded ones faster or slower, or a Poisson process."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_traces.errors import UsageError

I64 = npt.NDArray[np.int64]
_FORM = re.compile(r"(x)?(\d+(?:\.\d*)?|\.\d+)(/s)?", re.IGNORECASE)
LONGEST_NS = 2**62


def at_rate(source: Recorded, rate: str | float, seed: int = 0) -> Recorded:
    """`source` with other times of arrival, in the recorded order; aborts keep their distance from them.

    Args:
        rate: "x2": twice as fast as recorded. "8" or "8/s": a Poisson process of 8 requests a second.
        seed: of that process.

    Raises UsageError for another form, and for times beyond what an int64 of ns holds.
    """
    match = _FORM.fullmatch(str(rate).strip())
    number = float(match[2]) if match else 0.0
    begun = 0 if source.start is None else source.start.n_requests  # they are there already
    if match is None or number <= 0 or (match[1] and match[3]):
        raise UsageError(f"--rate {rate}: write x2 (twice as fast as recorded), or 8 (requests a second, Poisson)")
    if match[1]:
        if not source.due_ns.any():
            raise UsageError(f"--rate {rate}: the requests have no times, or all one; give a rate such as 8/s")
        due = source.due_ns / number
    else:
        coming = source.n_requests - begun
        due = np.concatenate(
            [[0.0], np.cumsum(np.random.default_rng(seed).exponential(1e9 / number, max(coming - 1, 0)))]
        )[:coming]
        due = np.concatenate([np.zeros(begun), _in_order(source.due_ns[begun:], due)])
    if due.max(initial=0) >= LONGEST_NS:
        raise UsageError(
            f"--rate {rate}: the last request would come after {due.max() / 1e9:.3g} s; give a higher rate"
        )
    whole = np.round(due).astype(np.int64)
    # Priorities break ties by the front end's time.
    arrival_s = float(source.arrival_s[begun:].min(initial=np.inf)) + whole / 1e9
    arrival_s[:begun] = source.arrival_s[:begun]
    return replace(source, due_ns=whole, arrival_s=arrival_s)


def _in_order(due_ns: I64, due: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The nth of the sorted times to the nth request that came."""
    out = np.empty_like(due)
    out[np.argsort(due_ns, kind="stable")] = due
    return out
