"""`Start`: the run under way that a cut begins with, as the simulated scheduler takes it up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.families import VICTIM_STAYS_SCHEDULED
from kvtrace_replay.schedulers.settings import NATIVE, Settings
from kvtrace_traces.errors import KvtraceError, UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Start:
    """A run at the moment before a scheduler call. Requests 0 to m - 1 are under way; arrays of m have one entry each.

    Attributes:
        running, waiting: int32; requests in the order of their queues.
        scheduled: bool[m]; the call before scheduled it. begun: bool[m]; some call did.
        computed, tokens: int32[m]; tokens computed, those under way included, and known of prompt and output.
        under_way: int32[m]; tokens scheduled in the call whose output is due. gives: bool[m]; that call, or the one
            before where none is due, gives it a token.
        cached: int32[m]; the hit at its first admission, -1 before it. preemptions: int32[m], so far. lost: int32[m];
            most tokens that one of them cost.
        filled: int32[m]; blocks of its table that are cached.
        table, table_at: int32 and int64[m + 1]; block tables, one after the other.
        blocks, identities, parents: int32; cached blocks in the order in which they were filled, what each holds (at
            the granule, dense) and what the block before it does, -1 where that is not known.
        queue: int32; the free queue from its front. num_blocks, block_size: of the pool; prefix_caching: of the engine.
        preempted, empty: requests preempted, and calls that made no step, since the last step.
        due: calls whose output is due, 0 or 1. due_ns: when it came, in ns since the first call, 0 where it never did.
    """

    running: I32
    waiting: I32
    scheduled: Bools
    begun: Bools
    computed: I32
    tokens: I32
    under_way: I32
    gives: Bools
    cached: I32
    preemptions: I32
    lost: I32
    filled: I32
    table: I32
    table_at: I64
    blocks: I32
    identities: I32
    parents: I32
    queue: I32
    num_blocks: int
    block_size: int
    prefix_caching: bool
    preempted: int
    empty: int
    due: int
    due_ns: int

    @property
    def n_requests(self) -> int:
        return int(self.computed.size)

    def blocks_of(self, request: int) -> I32:
        """int32: the block table of a request."""
        return self.table[self.table_at[request] : self.table_at[request + 1]]

    def at(self, settings: Settings) -> Start:
        """This state in the pool of `settings`.

        More blocks than there were stand at the front of the free queue, as blocks that were never used do. Of fewer,
        those at the front of the queue are left out; blocks whose numbers are too high take the numbers of these. Under
        an eviction policy of the open loop no two idle blocks hold one identity.

        Raises UsageError for another block size, for prefix caching switched, and for fewer blocks than requests hold.
        """
        if settings.block_size != self.block_size:
            raise UsageError(
                f"--block-size {settings.block_size}: this trace begins with a run under way in blocks of "
                f"{self.block_size} tokens, which cannot be told in others; simulate the trace that it was cut from"
            )
        if settings.prefix_caching != self.prefix_caching:
            raise UsageError(
                f"--{'' if settings.prefix_caching else 'no-'}prefix-caching: this trace begins with a run under way "
                f"{'with' if self.prefix_caching else 'without'} it; simulate the trace that it was cut from"
            )
        start = self._resized(settings.num_blocks)
        return start if settings.policy == NATIVE else start._single()

    def _resized(self, new: int) -> Start:
        if new == self.num_blocks:
            return self
        if new > self.num_blocks:
            fresh = np.arange(self.num_blocks, new, dtype=np.int32)
            return replace(self, queue=np.concatenate([fresh, self.queue]), num_blocks=new)
        used = self.num_blocks - 1 - self.queue.size
        if used > new - 1:
            raise UsageError(
                f"--num-blocks {new}: requests hold {used} blocks where this trace begins, so --num-blocks must be at "
                f"least {used + 1} (the null block included)"
            )
        gone = self.num_blocks - new
        left_out = np.zeros(self.num_blocks, bool)
        left_out[self.queue[:gone]] = True
        number = np.arange(self.num_blocks, dtype=np.int32)
        high = np.flatnonzero(~left_out[new:]) + new
        number[high] = np.flatnonzero(left_out[:new])
        kept = ~left_out[self.blocks]
        return replace(
            self,
            table=number[self.table],
            queue=number[self.queue[gone:]],
            blocks=number[self.blocks[kept]],
            identities=self.identities[kept],
            parents=self.parents[kept],
            num_blocks=new,
        )

    def _single(self) -> Start:
        """Without the idle blocks whose identity another block holds, too: the last of the free queue is kept, if no
        request holds one. What a policy chooses among are identities."""
        place = np.full(self.num_blocks, self.queue.size, np.int64)  # a held block goes before all idle ones
        place[self.queue] = np.arange(self.queue.size)
        at = place[self.blocks]
        best = np.full(int(self.identities.max(initial=0)) + 1, -1, np.int64)
        np.maximum.at(best, self.identities, at)
        kept = at == best[self.identities]
        return replace(self, blocks=self.blocks[kept], identities=self.identities[kept], parents=self.parents[kept])

    def untold(self, settings: Settings) -> bool:
        """Whether a part of the state that decides what `settings`, the trace's own, do is not told.

        Up to vLLM 0.11 the waiting queue is reordered where chunked prefill is off and prompts are passed over, and up
        to 0.11.0 a victim may stay scheduled; what that has under way asynchronously is in no log.
        """
        rules = settings.rules
        passed = not rules.unchunked_prompt_blocks and not settings.chunked_prefill
        stays = rules.priority_victim == VICTIM_STAYS_SCHEDULED and settings.async_scheduling
        by_priority = settings.scheduling_policy == "priority"
        return bool(
            (passed and not by_priority and self.waiting.size > 1) or (stays and by_priority and self.preemptions.any())
        )


def carried_start(trace: Any, header: dict[str, Any], begin_ns: int) -> Start | None:
    """The state that an engine of `trace` begins with, None where it begins idle. `begin_ns`: when its first call did.

    Raises KvtraceError for a cut that does not tell all that is needed: one of an older format.
    """
    snapshot = trace.snapshot(header["engine_index"])
    if snapshot is None:
        return None
    live = sorted(snapshot.live)
    if any(one.tokens is None for one in live):
        raise KvtraceError(
            f"{trace.path} was cut by an older kvtrace, and does not tell how far its requests were: cut it anew"
        )
    m = len(live)
    odd = [
        one.request for i, one in enumerate(live) if one.request != i or one.running == (not one.table)
    ]  # fmt: skip
    if odd or snapshot.due > 1:
        what = f"what request {odd[0]} holds" if odd else f"{snapshot.due} calls under way"
        raise KvtraceError(f"{trace.path} begins with a state that the simulated engine does not have: {what}")

    def column(name: str, dtype: Any = np.int32) -> Any:
        return np.array([getattr(one, name) for one in live], dtype)

    tables = [one.table or [] for one in live]
    table_at = np.zeros(m + 1, np.int64)
    np.cumsum([len(table) for table in tables], out=table_at[1:])
    return Start(
        running=np.array([one.request for one in snapshot.live if one.running], np.int32),
        waiting=np.array([one.request for one in snapshot.live if not one.running], np.int32),
        scheduled=column("scheduled", bool),
        begun=column("begun", bool),
        computed=column("computed"),
        tokens=column("tokens"),
        under_way=column("under_way"),
        gives=column("gives", bool),
        cached=np.array([-1 if one.cached is None else one.cached for one in live], np.int32),
        preemptions=column("preemptions"),
        lost=column("lost"),
        filled=column("filled"),
        table=np.array([block for table in tables for block in table], np.int32),
        table_at=table_at,
        blocks=snapshot.blocks,
        identities=snapshot.identities,
        parents=snapshot.parents,
        queue=snapshot.queue,
        num_blocks=int(header["num_blocks"]),
        block_size=int(header["block_size"]),
        prefix_caching=bool(header["prefix_caching"]),
        preempted=snapshot.preempted,
        empty=snapshot.empty,
        due=snapshot.due,
        due_ns=0 if snapshot.due_ns is None else max(snapshot.due_ns - begin_ns, 0),
    )
