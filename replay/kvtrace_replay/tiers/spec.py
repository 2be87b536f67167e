"""`Tier`, and how people write one: `dram:20k`, `ssd:1TiB:policy=s3fifo:small=0.2,write=demote,bandwidth=6GB/s`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtrace_replay.policies.registry import Policy, find_policy, policies
from kvtrace_replay.tiers.words import MAX_TIERS
from kvtrace_traces.errors import UsageError

SEMANTICS = ("object", "prefix")
MODES = ("nine", "inclusive", "exclusive")
WRITES = ("through", "demote")
FORM = "NAME:CAPACITY[:KEY=VALUE,...]"
_NAME = re.compile(r"[A-Za-z][\w.-]*")
_SPEED = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)\s*(?:([kKMGT]i?)?(B|bit)/s)?")
_LOWER_ONLY = ("write", "mode", "promote", "bandwidth")


@dataclass(frozen=True)
class Tier:
    """One tier of a cache. The first of a list is the top: the memory in which blocks are used.

    Attributes:
        name: what the rows call it; letters, digits and `_.-`.
        capacity: blocks, or any form of `parse_capacity`.
        policy: as `--policy` takes it.
        write: "through": a block is copied into this tier when it is used in the top tier; "demote": it enters when
            the last copy above is evicted. Default: "demote" in an exclusive tier, else "through".
        mode: "exclusive": a block that is in a tier above is not in this one; "inclusive": every block that is in a
            tier above is in this one; "nine": neither is enforced (non-inclusive non-exclusive).
        uses: a block is stored here from its `uses`-th use in all on, 1 to 255. None: what the policy says by
            `+second-touch`, else 1.
        promote: a hit here moves the block (nine, inclusive: a copy) to the top tier; False: it is read where it lies.
        bandwidth: bytes a second at which this tier is read, or a text (`25GB/s`); None where unknown.

    `write`, `mode`, `promote` and `bandwidth` say how a tier serves the ones above, so the top tier has none.
    """

    name: str
    capacity: int | float | str = math.inf
    policy: str = "lru"
    write: str | None = None
    mode: str = "nine"
    uses: int | None = None
    promote: bool = True
    bandwidth: float | str | None = None

    @property
    def demotes(self) -> bool:
        """Blocks enter it by demotion."""
        return self.write == "demote" or (self.write is None and self.mode == "exclusive")


def parse_tier(text: str, policy: str = "lru") -> Tier:
    """The tier written as `NAME:CAPACITY[:KEY=VALUE,...]`, its keys being those of `Tier`.

    A policy's parameters follow it as in `--policy`; `policy` is that of a tier which names none. Raises UsageError
    for anything else.
    """
    name, _, rest = text.strip().partition(":")
    capacity, _, options = rest.partition(":")
    if not capacity:
        raise UsageError(f"tier {text!r} must read {FORM}, as in dram:20k or ssd:200k:write=demote")
    values: dict[str, str] = {}
    last = ""
    for part in filter(None, (piece.strip() for piece in options.split(","))):
        key, equals, value = part.partition("=")
        if key in _READERS and equals and value:
            if key in values:
                raise UsageError(f"tier {name!r}: {key} is given twice")
            values[key] = value
            last = key
        elif last == "policy" and ":" in values[last]:
            values[last] += f",{part}"
        else:
            raise UsageError(f"tier {name!r}: {part!r} must read KEY=VALUE, KEY one of {', '.join(_READERS)}")
    read = {key: _READERS[key](value, f"tier {name!r}: {key}") for key, value in values.items()}
    return Tier(name, capacity, **{"policy": policy, **read})


def parse_bandwidth(value: float | str, what: str = "bandwidth") -> float:
    """Bytes a second from `25GB/s`, `900MiB/s`, `100Gbit/s` or a number. Raises UsageError for anything else."""
    match = _SPEED.fullmatch(str(value).strip())
    speed = 0.0
    if match:
        prefix = match[2] or ""
        steps = "kmgt".index(prefix[0].lower()) + 1 if prefix else 0
        speed = float(match[1]) * (1024 if prefix.endswith("i") else 1000) ** steps / (8 if match[3] == "bit" else 1)
    if not 0 < speed < math.inf:
        raise UsageError(f"{what}: {value!r} is no speed: write 25GB/s, 900MiB/s or 100Gbit/s")
    return speed


def _word(words: tuple[str, ...]) -> Callable[[str, str], str]:
    def read(value: str, what: str) -> str:
        if value.lower() not in words:
            raise UsageError(f"{what}={value} is not one of {', '.join(words)}")
        return value.lower()

    return read


def _yes(value: str, what: str) -> bool:
    return _word(("yes", "no"))(value, what) == "yes"


def _count(value: str, what: str) -> int:
    if not value.isdecimal():
        raise UsageError(f"{what}={value} must be a number from 1 to 255")
    return int(value)


_READERS: dict[str, Callable[[str, str], Any]] = {
    "policy": lambda value, what: value,
    "write": _word(WRITES),
    "mode": _word(MODES),
    "uses": _count,
    "promote": _yes,
    "bandwidth": lambda value, what: parse_bandwidth(value, what),
}


def check_tiers(tiers: Sequence[Tier]) -> None:
    """Raises UsageError, naming the fix, where the tiers make no sense together."""
    if not 1 <= len(tiers) <= MAX_TIERS:
        raise UsageError(f"{len(tiers)} tiers given: name 1 to {MAX_TIERS}, the fastest first")
    names = [tier.name for tier in tiers]
    for name in names:
        if not _NAME.fullmatch(name) or name == "total":
            raise UsageError(f"a tier cannot be called {name!r}: use letters, digits and _.-, and not 'total'")
        if names.count(name) > 1:
            raise UsageError(f"two tiers are called {name!r}: give each a name of its own")
    plain = Tier("plain")
    for key in _LOWER_ONLY:
        if getattr(tiers[0], key) != getattr(plain, key):
            raise UsageError(
                f"tier {names[0]!r} is the top tier, which takes no {key}=: that says how a tier below serves it"
            )
    for k, tier in enumerate(tiers):
        _check_tier(tier)
        _check_removal(tiers, k)


def _check_tier(tier: Tier) -> None:
    for key, value, known in (("mode", tier.mode, MODES), ("write", tier.write or "through", WRITES)):
        if value not in known:
            raise UsageError(f"tier {tier.name!r}: {key}={value} is not one of {', '.join(known)}")
    uses = uses_of(tier)
    if not 1 <= uses <= 255:
        raise UsageError(f"tier {tier.name!r}: uses={uses} must lie between 1 and 255")
    if tier.bandwidth is not None:
        parse_bandwidth(tier.bandwidth, f"tier {tier.name!r}: bandwidth")
    if tier.mode == "exclusive" and not tier.demotes:
        raise UsageError(
            f"tier {tier.name!r}: write=through would copy blocks that an exclusive tier must not have: leave it out, "
            "or take mode=nine"
        )
    if tier.mode == "inclusive" and (tier.demotes or uses > 1):
        raise UsageError(
            f"tier {tier.name!r}: an inclusive tier has every block at once: leave out write=demote and uses, or take "
            "mode=nine"
        )


def _check_removal(tiers: Sequence[Tier], k: int) -> None:
    tier, entry = tiers[k], find_policy(tiers[k].policy)
    if entry.removable or not gives_up(tiers, k) or not _has_tiers(entry):
        return
    below = [tier.name for tier in tiers[k + 1 :] if tier.mode == "inclusive"]
    cause = "mode=exclusive" if tier.mode == "exclusive" else f"mode=inclusive of tier {below[0]!r}"
    able = ", ".join(other.name for other in policies() if other.removable)
    raise UsageError(
        f"tier {tier.name!r}: policy {entry.name!r} has no remove(), so it cannot give up a block that is not its "
        f"victim, which {cause} asks for: give it one, take mode=nine, or one of {able}"
    )


def gives_up(tiers: Sequence[Tier], k: int) -> bool:
    """Whether blocks leave tier `k` other than by eviction: it is exclusive, or one below it is inclusive."""
    return tiers[k].mode == "exclusive" or any(tier.mode == "inclusive" for tier in tiers[k + 1 :])


def _has_tiers(entry: Policy) -> bool:
    """Whether it runs in semantics that tiers have; where not, that is what is said."""
    return any(semantics in entry.semantics for semantics in SEMANTICS)


def uses_of(tier: Tier) -> int:
    """The use from which on the tier stores a block. Raises UsageError when it is said twice."""
    by_policy = find_policy(tier.policy).uses
    if tier.uses is not None and by_policy > 1:
        raise UsageError(f"tier {tier.name!r}: both uses= and +second-touch are given: leave one out")
    return by_policy if tier.uses is None else tier.uses
