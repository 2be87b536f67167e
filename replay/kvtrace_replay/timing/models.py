"""From what a user names to a profile: what `kvtrace simulate --timing` takes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from kvtrace_replay.timing.catalogue import GPUS, find_gpu
from kvtrace_replay.timing.learn import learn
from kvtrace_replay.timing.link import WAYS, LinkCost
from kvtrace_replay.timing.profile import Profile, shipped
from kvtrace_replay.timing.roofline import link_of, roofline
from kvtrace_traces.errors import UsageError
from kvtrace_traces.trace import Trace

_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(GB/s|MB/s)", re.IGNORECASE)


def timing_for(trace: Trace, named: str | None = None, link: str | None = None) -> Profile:
    """The profile to time a simulation of `trace` with.

    `named`: None to learn it from the trace's own steps; a profile's file or name; or `GPU:MODEL` for arithmetic
    (MODEL: a name or a config.json). `link`: whose link to the host a learnt profile shall have, as `link_named` takes
    it.
    Raises KvtraceError, with the remedy, where a trace cannot tell, UsageError for unknown names.
    """
    if named is None:
        return learn(trace, link_named(link) if link else None)
    gpu, colon, model = named.partition(":")
    if colon and not Path(named).exists():
        return roofline(gpu, model)
    return Profile.load(named)


def with_link(profile: Profile, named: str | None) -> Profile:
    """`profile` with the link of `named`, as `link_named` takes it; None leaves its own."""
    return profile if named is None else replace(profile, link=link_named(named))


def link_named(named: str) -> dict[str, LinkCost]:
    """The link of a GPU of the catalogue, or of a profile; or, for `25GB/s`, of that bandwidth each way, with nothing
    for a transfer or a copy but its bytes. Raises UsageError where there is none of these, and for no bandwidth."""
    if match := _RATE.fullmatch(named.strip()):
        rate = float(match[1]) * (1e9 if match[2][0] in "Gg" else 1e6)
        if rate <= 0:
            raise UsageError(f"--link {named}: over a link without bandwidth nothing ever moves; give more than 0")
        return dict.fromkeys(WAYS, LinkCost(0.0, 0.0, rate))
    if named.lower() in GPUS or not (Path(named).exists() or named.endswith(".toml") or named in shipped()):
        return link_of(find_gpu(named))
    profile = Profile.load(named)
    profile.needs_link()
    return profile.link
