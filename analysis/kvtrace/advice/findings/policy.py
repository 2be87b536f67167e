"""Whether another eviction policy would find more, and how much there is to find."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.declare import Finding, adviser
from kvtrace.advice.findings.knee import curve_of, knee_of

#: Of different families. Each takes a while to compile when it is first used, so they are few.
TRIED = ("arc", "s3fifo", "sieve", "slru")


@adviser("policy")
def policy(case: Case) -> Iterator[Finding]:
    """The best of TRIED against the engine's own; imports, which have none, against lru at the knee of its curve."""
    capacity = case.capacity
    if capacity is None:
        points = curve_of(case)
        if points.height < 2:
            return
        capacity = knee_of(points)
    tried = {row.row["policy"]: row for row in case.replayed(["lru", "opt", *TRIED], [capacity])}
    if not {"lru", "opt"} <= set(tried) or not set(TRIED) & set(tried):
        return
    best = max((name for name in TRIED if name in tried), key=lambda name: int(tried[name].cached.sum()))
    own, found, where = "lru", tried, f"lru, at {case.size(capacity)}"
    if case.open_because is None:  # what the engine would do with it; only the best, since each must be compiled
        own, where = "vllm", f"the engine's own rule, at {case.size(capacity)}"
        found = {row.row["policy"]: row for row in case.simulated({"policy": [own, best]})}
    if own not in found or best not in found:
        return
    pays = found[best].cached.sum() > found[own].cached.sum()
    text = "" if pays else "No other policy pays: "
    text += (
        f"{best}, of {', '.join(TRIED)} the best in the open loop, would have had {{gain}}, against {where}. "
        f"Knowing the future (opt, open loop), {tried['opt'].row['token_hit_ratio']:.1%} of tokens hit, "
        f"with lru {tried['lru'].row['token_hit_ratio']:.1%}."
    )
    extra = (
        tried["opt"].figure("opt_ratio", "token_hit_ratio", "ratio"),
        tried["lru"].figure("lru_ratio", "token_hit_ratio", "ratio"),
    )
    yield case.saving("policy", text, found[best], found[own], *extra)
