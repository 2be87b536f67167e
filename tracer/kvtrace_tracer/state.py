"""What the hooks of one engine share."""

from __future__ import annotations

from typing import Any

LOOK_STEPS = 32
"""So many steps apart it is looked whether a frame is due."""

MAX_DELTA = 1 << 28
"""Nanoseconds between two times that an operation can state."""

OUTSIDE, RUNNING, ADMITTING, UPDATING = 0, 1, 2, 3
"""Where the scheduler is: outside a call, serving its running queue, admitting the request looked up last, or taking
in a step's output."""
CALLS = frozenset((RUNNING, ADMITTING))
"""In a scheduler call."""


class Entry:
    """What the tracer knows of a request: its number, identities logged (of the prompt alone, and in all), blocks
    cached, state of its own chain."""

    __slots__ = ("chain", "filled", "link", "number", "prompt")

    def __init__(self, number: int) -> None:
        self.number = number
        self.chain = 0
        self.filled = 0
        self.prompt = 0
        self.link: list[Any] = []


class State:
    """Mutable state of one recorder. ``last``: the scheduled set of the last call, request id -> tokens; ``ids``: its
    requests in the order of the engine's output, if each had one token and none arrived since, else None.

    ``special``: ids in ``last`` with another number of tokens than one; ``gone``: ids finished or preempted since;
    ``looked``: ids looked up in this call; ``admitted``: the last of them, else None; ``pending``: first block of each
    allocation whose owner is not told yet (it is not among ``Log.events`` so far); ``steps``: scheduler outputs without
    a model output, oldest first; ``look``: the step to see at whether a frame is due; ``time``: the clock at the last
    BEGIN or OUTPUT; ``transfers``: number of the next transfer to or from a slower tier. But for ``phase`` they follow
    the log: notes count when they are encoded.
    """

    __slots__ = (
        "admitted", "entries", "gone", "ids", "last", "look", "looked", "pending", "phase", "requests", "running",
        "special", "step", "steps", "time", "transfers", "waiting",
    )  # fmt: skip

    def __init__(self, time: int) -> None:
        self.entries: dict[str, Entry] = {}
        self.requests = 0
        self.transfers = 0
        self.last: dict[str, int] = {}
        self.ids: list[str] | None = None
        self.special: list[str] = []
        self.gone: list[str] = []
        self.looked: list[str] = []
        self.pending: list[int] = []
        self.admitted: Entry | None = None
        self.phase = OUTSIDE
        self.step = 0
        self.look = LOOK_STEPS
        self.steps: list[Any] = []
        self.running = 0
        self.waiting = 0
        self.time = time
