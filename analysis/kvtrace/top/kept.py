"""What is kept of a request while it lives, and the sums that stay."""

from __future__ import annotations

from array import array


class Request:
    """A request that has not ended: what is asked of it later."""

    __slots__ = (
        "admitted", "asked", "blocks", "call", "chain", "ended", "filled", "found", "granules", "marks", "no_read",
        "preempted", "prompt", "prompt_blocks", "queued",
    )  # fmt: skip

    def __init__(self, prompt: int, no_read: bool) -> None:
        self.prompt, self.no_read = prompt, no_read
        self.chain = array("Q")  # at the stride of blocks
        self.marks: array[int] | None = None
        self.granules = self.filled = self.asked = self.found = self.prompt_blocks = 0
        self.blocks: list[int] = []
        self.call = -1
        self.admitted = self.preempted = self.ended = False
        self.queued = True


class Totals:
    """Sums up to `time_ns` of the trace's clock: tokens of `prefill` and `decode` scheduled, tokens `asked` and `hit`
    in lookups at first admissions, `preemptions`, `evictions`, `steps`."""

    __slots__ = ("asked", "decode", "evictions", "hit", "preemptions", "prefill", "steps", "time_ns")

    def __init__(self) -> None:
        self.time_ns = self.prefill = self.decode = self.asked = self.hit = 0
        self.preemptions = self.evictions = self.steps = 0

    @staticmethod
    def at(time_ns: int) -> Totals:
        """Nothing yet, at this time."""
        made = Totals()
        made.time_ns = time_ns
        return made

    def copy(self) -> Totals:
        """The sums as they are now."""
        made = Totals()
        for name in Totals.__slots__:
            setattr(made, name, getattr(self, name))
        return made
