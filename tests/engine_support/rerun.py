"""One workload through vLLM at several settings, each run traced; for a worker process (worker.py), plain JSON.

The first run decides at which scheduler steps requests come and are aborted; the others see them at the same steps.
A step is a call of `schedule` that scheduled something, counted from 0, as in a trace.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .scenarios import traced
from .workloads import Arrival

ENDLESS = 60  # calls in a row without a token, after which nothing will ever happen
# vLLM's block hashes are only comparable between processes, and the tracer's identities between recordings, if both are
# keyed alike.
COMPARABLE = {"KVTRACE_KEY": "5e" * 16}


class Endless(Exception):
    """The engine calls its scheduler again and again, and no request can go on."""


@dataclass(frozen=True)
class Event:
    """Request `request` comes, or is aborted, once `due` steps have begun; one that is `late`, when their outputs have
    arrived too, if the engine has to wait for them."""

    due: int
    request: int
    abort: bool = False
    late: bool = False


def planned(arrivals: Sequence[Arrival]) -> list[Event]:
    """The events that a list of arrivals, sorted by step, asks for."""
    come = [Event(arrival.step, number) for number, arrival in enumerate(arrivals)]
    go = [Event(a.abort_step, n, True) for n, a in enumerate(arrivals) if a.abort_step is not None]
    return sorted(come + go, key=lambda event: event.due)


class Counted:
    """The steps that a scheduler has begun."""

    def __init__(self, scheduler: Any) -> None:
        self.begun = self.empty = 0
        inner = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self.begun, self.empty = self.begun + 1, 0
            else:
                self.empty += 1
            return output

        scheduler.schedule = schedule


def play(engine: Any, requests: Sequence[dict[str, Any]], events: Sequence[Event]) -> list[Event]:
    """Run `requests` (arguments of `engine.add`) to their end; return the events as they came about.

    An engine with nothing to do gets the requests of the next step at which some come; aborts wait for their step.
    Events are returned as a trace tells them, without aborts of what had already ended. Raises Endless.
    """
    steps = Counted(engine.scheduler)
    come = deque(event for event in events if not event.abort)
    go = deque(event for event in events if event.abort)
    taken = []
    while come or engine.busy:
        due = steps.begun if engine.busy or not come else max(steps.begun, come[0].due)
        while come and come[0].due <= due:
            if come[0].late and come[0].due == steps.begun and engine.runs_dry():
                break
            event = come.popleft()
            late = steps.begun > 0 and engine.ran_dry()
            number = engine.add(**requests[event.request])
            assert number == event.request
            taken.append(replace(event, due=steps.begun, late=late))
        while go and go[0].due <= steps.begun:
            event = go.popleft()
            if engine.alive(event.request):
                engine.abort(event.request)
                taken.append(replace(event, due=steps.begun))
        engine.step()
        if steps.empty > ENDLESS:
            raise Endless
    return taken


def as_orders(arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Return what `record_all` needs to know of arrivals, which must be sorted by step."""
    names = ("prompt", "max_tokens", "priority", "cache_salt", "output")
    return {
        "requests": [{name: getattr(arrival, name) for name in names} for arrival in arrivals],
        "events": [asdict(event) for event in planned(arrivals)],
    }


def record_all(
    folder: str,
    model: str,
    requests: list[dict[str, Any]],
    events: list[dict[str, Any]],
    runs: dict[str, dict[str, Any]],
    granule: int | None = None,
    stub: bool = False,
    scripted: bool = True,
) -> dict[str, Any]:
    """Record every run of `runs` (name to settings of EngineConfig or StubEngine) to `folder`/name, in this order.

    `requests` are arguments of `add`, in order of arrival; `events` those of Event, sorted. With `scripted` the real
    engine takes a model without weights. Returns, by name, the tokens generated for each request, None for a run that
    never ends; after a first run of that kind there is no other.
    """
    from .engine import EngineConfig, engine
    from .script import NAME
    from .stub import StubEngine

    due = [Event(**event) for event in events]
    told: dict[str, Any] = {}
    for name, settings in runs.items():
        with traced(f"{folder}/{name}", granule), contextlib.ExitStack() as stack:
            live: Any
            if stub:
                live = stack.enter_context(contextlib.closing(StubEngine(model, observe=False, **settings)))
            else:
                extra = {"logits_processors": [NAME]} if scripted else {}
                config = EngineConfig(model, dummy=scripted, extra=extra, **settings)
                live = stack.enter_context(engine(config, observe=False))
            known = live.requests if stub else _kept(live)
            try:
                taken = play(live, requests, due)
            except Endless:
                taken = None
            tokens = None if taken is None else [list(request.output_token_ids) for request in known]
        if not told:
            if taken is None:
                return {name: None}
            due = taken
        told[name] = tokens
    return told


def _kept(engine: Any) -> list[Any]:
    """vLLM's own request objects, in order of arrival, as they come."""
    found: list[Any] = []
    inner = engine.scheduler.add_request

    def add_request(request: Any) -> Any:
        found.append(request)
        return inner(request)

    engine.scheduler.add_request = add_request
    return found
