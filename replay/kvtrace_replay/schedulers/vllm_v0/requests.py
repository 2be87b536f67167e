"""`RequestsV0`: what a simulated vLLM 0.4.2 is to serve; given as lengths, or from a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.recorded import LENGTH, Recorded
from kvtrace_traces.errors import UsageError

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
LARGEST = 2**31 - 1
FAR = 1 << 62  # later than anything


@dataclass(frozen=True, eq=False)
class RequestsV0:
    """What the engine is to serve. Arrays have one entry per request.

    Attributes:
        prompt, output: int64, tokens; the output is sampled to the end unless the model's length is reached.
        arrival: int64; the call of the engine before which it arrives (0 is the first), or, where calls have costs, ns.
        arrival_time: float64, by which the engine orders running and swapped requests; the front end's. Not to be
            confused with the order of arrivals, which orders those that wait. None: in order of arrival.
        abort: int64, when it is aborted, in the unit of `arrival`; -1 for never. None: nobody is.
    """

    prompt: I64
    output: I64
    arrival: I64 | None = None
    arrival_time: F64 | None = None
    abort: I64 | None = None

    def checked(self) -> Served:
        """The same with nothing left out. Raises UsageError, naming the request, for what the engine does not take."""
        prompt, output = _whole(self.prompt, "prompt"), _whole(self.output, "output")
        n = prompt.size
        arrival = np.zeros(n, np.int64) if self.arrival is None else _whole(self.arrival, "arrival")
        abort = np.full(n, -1, np.int64) if self.abort is None else _whole(self.abort, "abort")
        if self.arrival_time is None:
            times = np.empty(n, np.float64)
            times[np.argsort(arrival, kind="stable")] = np.arange(n)
        else:
            times = np.asarray(self.arrival_time, np.float64)
        for name, values in (("output", output), ("arrival", arrival), ("arrival_time", times), ("abort", abort)):
            if values.shape != prompt.shape:
                raise UsageError(f"{name} has {values.size} entries for {n} requests: one for each is needed")
        for name, values, least in (("prompt", prompt, 1), ("output", output, 1), ("arrival", arrival, 0)):
            if (values < least).any():
                at = int(np.argmax(values < least))
                raise UsageError(
                    f"request {at} has {name} {values[at]}, vLLM 0.4.2 takes {least} or more: leave it out or mend it"
                )
        for name, values in (("arrival", arrival), ("abort", abort)):
            if (values >= FAR).any():
                raise UsageError(f"request {int(np.argmax(values >= FAR))} has an {name} beyond {FAR}")
        if np.isnan(times).any():
            raise UsageError(f"request {int(np.argmax(np.isnan(times)))} has no arrival_time: give one for each")
        if (prompt > LARGEST).any() or (output > LARGEST).any() or (prompt + output > LARGEST).any():
            raise UsageError(f"a request has more than {LARGEST} tokens: prompt and output together must have fewer")
        return Served(prompt, output, arrival, times, abort)


@dataclass(frozen=True, eq=False)
class Served:
    """`RequestsV0` with nothing left out, as the kernel takes them."""

    prompt: I64
    output: I64
    arrival: I64
    arrival_time: F64
    abort: I64


def _whole(values: Any, name: str) -> I64:
    given = np.asarray(values)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise UsageError(f"{name} must be a one-dimensional array of whole numbers")
    return np.ascontiguousarray(given, np.int64)


def requests_of(recorded: Recorded, arrivals: str = "all") -> RequestsV0:
    """The requests of a trace. `arrivals`: a name of `recorded.ARRIVALS`, or "time": at the front end's times, for
    calls with costs.

    A request that the model's length ended while more was asked for is asked for as much again: 0.4.2 takes one token
    more. One without output (it was aborted before) is asked for its maximum.
    """
    n = recorded.n_requests
    limit = int(recorded.header.get("max_model_len") or LARGEST)
    cut = (recorded.reason == LENGTH) & (recorded.stop >= limit) & (recorded.most > recorded.stop)
    total = np.where(cut, recorded.most, recorded.stop).astype(np.int64)
    due, aborts = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    come, gone = recorded.arrivals(arrivals), recorded.aborts(arrivals)
    due[come[:, 1]] = come[:, 0]
    aborts[gone[:, 2]] = gone[:, 0]
    return RequestsV0(
        prompt=recorded.prompt.astype(np.int64),
        output=np.maximum(total - recorded.prompt, 1),
        arrival=due,
        arrival_time=recorded.arrival_s,
        abort=aborts,
    )
