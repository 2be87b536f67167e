"""Whether blocks of another size would find more, at the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.declare import Finding, adviser

STEPS = (0.25, 0.5, 2, 4)  # times the engine's own


@adviser("block-size")
def block_size(case: Case) -> Iterator[Finding]:
    """The best of a few other sizes. Those finer than the trace's granule cannot be told."""
    if case.capacity is None:
        return
    own, granule = case.block_size, int(case.header.get("granule") or case.block_size)
    others = [int(own * step) for step in STEPS if own * step >= 1 and own * step % granule == 0]
    if not others:
        return
    if case.open_because is None:
        rows = case.simulated({"block_size": sorted([own, *others])})
        found = {row.row["block_size"]: row for row in rows}
    else:
        tokens = case.capacity * own
        rows = case.replayed(["lru"], [f"{tokens}tok"], sorted([own, *others]))
        found = {row.row["block_size"]: row for row in rows}
    if own not in found or len(found) < 2:
        return
    best = max((size for size in found if size != own), key=lambda size: int(found[size].cached.sum()))
    tried = ", ".join(str(size) for size in sorted(found) if size != own)
    pays = found[best].cached.sum() > found[own].cached.sum()
    text = "" if pays else "No other size pays: "
    text += "Blocks" if pays else "blocks"
    text += f" of {best} tokens instead of {own}, in the same bytes, would have had {{gain}} (tried: {tried})."
    if min(others) > own:
        text += f" Smaller ones cannot be told: the trace keeps identities of {granule} tokens (record --granule)."
    text += " What kernels gain or lose by it is not in this figure."
    yield case.saving("block-size", text, found[best], found[own])
