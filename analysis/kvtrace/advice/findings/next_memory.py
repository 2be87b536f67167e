"""What the next GiB of cache would find; for caches below 4 GiB, the next quarter of them."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.declare import Finding, adviser

GIB = 1 << 30
LEAST = 4 * GIB


def step_blocks(capacity: int, block_bytes: int | None) -> int:
    """The blocks that are added: a GiB, or a quarter where that is less or bytes are not known."""
    if block_bytes and capacity * block_bytes >= LEAST:
        return max(1, GIB // block_bytes)
    return max(1, capacity // 4)


@adviser("next-memory")
def next_memory(case: Case) -> Iterator[Finding]:
    """Hits at the capacity as it is, and with some more."""
    if case.capacity is None:
        return
    step = step_blocks(case.capacity, case.block_bytes)
    if case.open_because is None:
        now = case.capacity + 1  # the engine's figure counts the null block
        found = {row.row["num_blocks"]: row for row in case.simulated({"num_blocks": [now, now + step]})}
    else:
        now = case.capacity
        found = {row.row["capacity_blocks"]: row for row in case.replayed(["lru"], [now, now + step])}
    if now not in found or now + step not in found:
        return
    text = f"{case.size(step)} more cache, beside {case.size(case.capacity)}, would have had {{gain}}."
    yield case.saving("next-memory", text, found[now + step], found[now])
