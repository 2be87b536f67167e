"""Whether tokens that were lost are cheaper computed again, or copied out and in (swap, offload)."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.confidence import SAID, slope_interval, stretches
from kvtrace.advice.declare import Figure, Finding, adviser
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError


@adviser("recompute-or-copy")
def recompute_or_copy(case: Case) -> Iterator[Finding]:
    """What the preempted requests would cost both ways, where the link is known; else the link that breaks even."""
    profile = case.profile
    if profile is not None and profile.link:
        yield from _both_ways(case, profile)
    else:
        yield from _break_even(case)


def _break_even(case: Case) -> Iterator[Finding]:
    """The bandwidth at which loading a token takes as long as computing it."""
    cost = case.token_cost
    if cost is None or not cost.value or not case.header.get("bytes_per_token"):
        return
    (size,) = case.ask(
        f"SELECT engine_index, bytes_per_token FROM engines WHERE engine_index = {case.index}",
        {"bytes_per_token": "bytes"},
    )
    assert size.value is not None
    steps = case.columns(
        "SELECT duration_ns, prefill_tokens FROM step_phases WHERE duration_ns IS NOT NULL "
        f"AND engine_index = {case.index} ORDER BY step"
    )
    slow, fast = slope_interval(steps["prefill_tokens"].to_numpy(), steps["duration_ns"].to_numpy())
    value = size.value / cost.value  # bytes a nanosecond are GB a second
    low, high = (size.value / fast if fast > 0 else 0.0, size.value / slow if slow > 0 else float("inf"))
    text = (
        f"Loading keys and values is cheaper than computing them again on any link faster than {value:.3g} GB/s "
        f"(95 %: {low:.3g} to {high:.3g}); copying them out first, twice that. A trace does not tell the link: "
        "--timing and --link name one."
    )
    yield Finding(
        "recompute-or-copy", text, (size, cost), "bytes_per_token / ns_per_prefill_token", value, "GB/s", low, high,
        f"slope of the steps' durations over their prefill tokens; {SAID.format(stretches(steps.height))}",
    )  # fmt: skip


def _both_ways(case: Case, profile: Profile) -> Iterator[Finding]:
    """All preemptions of the trace, recomputed and swapped, at the profile's costs."""
    from kvtrace.people import seconds

    costs = profile.mean_costs
    try:
        one, two = (profile.swap_ns(blocks, case.block_size) for blocks in (1, 2))
    except KvtraceError:
        yield from _break_even(case)
        return
    query = f"""
        SELECT sum({_number(costs["call"])} + tokens_lost * {_number(costs["prefill_token"])}
                   + tokens_lost * (tokens_lost + 1) / 2 * {_number(costs["prefill_pair"])}) AS recompute_ns,
               sum({_number(2 * one - two)} + blocks_lost * {_number(two - one)}) AS swap_ns, count(*) AS preemptions
        FROM preemptions WHERE engine_index = {case.index}
    """
    figures = case.ask(query, {"recompute_ns": "ns", "swap_ns": "ns", "preemptions": "times"})
    if not figures or not figures[2].value or figures[0].value is None or not figures[1].value:
        yield from _per_block(case, profile, two - one)
        return
    value = figures[0].value / figures[1].value
    low, high = _spread(profile, value)
    cheaper = "copying out and in is cheaper" if value > 1 else "computing again is cheaper"
    text = (
        f"What {figures[2].value:,.0f} preempted requests lost takes {seconds(figures[0].value / 1e9)} to compute "
        f"again, {seconds(figures[1].value / 1e9)} to copy out and in: {cheaper} ({value:.3g} times; the fits' spread: "
        f"{low:.3g} to {high:.3g}), at the costs of {profile.name}. Computing again assumes that no block is found."
    )
    yield Finding(
        "recompute-or-copy", text, tuple(figures), "recompute_ns / swap_ns", value, "ratio", low, high,
        f"costs from {profile.source}; the bounds are the lowest and highest cost of a prefill token in "
        "cross-validation, where the profile has them",
    )  # fmt: skip


def _per_block(case: Case, profile: Profile, copied_ns: float) -> Iterator[Finding]:
    """Without preemptions: one block, which is what an offloaded prefix consists of."""
    costs, tokens = profile.mean_costs, case.block_size
    query = (
        f"SELECT block_size * {_number(costs['prefill_token'])} AS recompute_ns, {_number(copied_ns)} AS copy_ns "
        f"FROM engines WHERE engine_index = {case.index}"
    )
    figures: list[Figure] = case.ask(query, {"recompute_ns": "ns", "copy_ns": "ns"})
    if figures[0].value is None or not figures[1].value:
        return
    value = figures[0].value / figures[1].value
    low, high = _spread(profile, value)
    text = (
        f"A block of {tokens} tokens takes {figures[0].value / 1e3:,.1f} µs to compute and "
        f"{figures[1].value / 1e3:,.1f} µs to copy out and in: {'copying' if value > 1 else 'computing'} is cheaper, "
        f"at the costs of {profile.name}. Nobody was preempted here; it concerns offloaded prefixes."
    )
    yield Finding(
        "recompute-or-copy", text, tuple(figures), "recompute_ns / copy_ns", value, "ratio", low, high,
        f"costs from {profile.source}; the bounds are the lowest and highest cost of a prefill token in "
        "cross-validation, where the profile has them",
    )  # fmt: skip


def _number(value: float) -> str:
    """For SQL, in which 0.1 would be a decimal."""
    return f"{float(value)!r}::DOUBLE"


def _spread(profile: Profile, value: float) -> tuple[float, float]:
    cost = profile.costs["prefill_token"]
    low, high = profile.spread.get("prefill_token", (cost, cost))
    return (value * low / cost, value * high / cost) if cost else (value, value)
