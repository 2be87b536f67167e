"""What a sample draws as a whole: in `object` semantics a block, else all requests that share blocks.

Requests are told apart by the first block of their chains. Where a few first blocks stand for most of the traffic (a
system prompt that everyone shares), blocks that many requests go through are put aside as the *trunk*, from the most
shared ones on, and what counts is the first block behind it, or the request itself where it ends in the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.curves.lru import read_only
from kvtrace_replay.curves.subset import some_blocks, some_requests
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

# The trunk grows until a sample holds so many independent groups, but not to blocks that a smaller share of the
# requests go through, and not beyond a share of all blocks: much of what seems shared is then one long conversation.
ENOUGH_GROUPS, LEAST_SHARED, LARGEST_TRUNK = 50.0, 0.02, 0.1


class TrunkUse(NamedTuple):
    """What a workload's requests look up in the trunk, and what of it they hit if it stays once it is there."""

    block_lookups: int
    token_lookups: int
    block_hits: int
    token_hits: int


class Part(NamedTuple):
    """A part of a workload, and its use of the trunk."""

    workload: Workload
    trunk: TrunkUse


@dataclass(frozen=True, eq=False)
class Units:
    """Units by number.

    Attributes:
        hashes: uint64[m], evenly spread.
        choose: makes the part of the workload in which the units live where a bool[m] holds; given the share of
            requests for warm-up, which the use of the trunk leaves out.
        trunk: bool[n_identities], the blocks of the trunk; empty where there is no trunk.
        groups: how many equal units would vary as much as these, by their lookups. Blocks count one each: what
            the hottest of them distort is corrected.
    """

    hashes: U64
    choose: Callable[[Bools, float], Part]
    trunk: Bools
    groups: float

    @property
    def trunk_blocks(self) -> int:
        return int(self.trunk.sum())


def block_units(workload: Workload, seed: int) -> Units:
    """Every block is a unit."""
    n = distinct_blocks(workload, "object")
    return Units(
        hashes=_hash(np.arange(n, dtype=np.uint64), seed),
        choose=lambda chosen, warmup: Part(some_blocks(workload, chosen), TrunkUse(0, 0, 0, 0)),
        trunk=np.zeros(0, np.bool_),
        groups=n,
    )


def chain_units(workload: Workload, rate: float, seed: int) -> Units:
    """Units of requests behind the smallest trunk that leaves enough groups for a sample of `rate`."""
    n = workload.n_requests
    through = _counts(read_only(workload.identities), workload.n_identities)
    most = n
    unit, groups = _units_behind(workload, through, most)
    while groups * rate < ENOUGH_GROUPS and most // 2 >= max(LEAST_SHARED * n, 1):
        if (through > most // 2).sum() > LARGEST_TRUNK * workload.n_identities:
            break
        most //= 2
        unit, groups = _units_behind(workload, through, most)
    trunk = through > most
    hashes = _hash(np.arange(workload.n_identities + n, dtype=np.uint64), seed)[unit]

    def choose(chosen: Bools, warmup: float) -> Part:
        part, originals = some_requests(workload, chosen)
        return Part(part, trunk_use(part, trunk[originals], warmup))

    return Units(hashes, choose, trunk, groups)


def trunk_use(workload: Workload, trunk: Bools, warmup: float) -> TrunkUse:
    """What the requests after `warmup` use of the blocks where `trunk` (bool[n_identities]) holds."""
    return TrunkUse(
        *_trunk_use(
            read_only(workload.identities), read_only(workload.indptr), read_only(workload.prompt_blocks),
            read_only(workload.hit_cap), read_only(workload.last_tokens), workload.block_size, trunk,
            int(warmup * workload.n_requests),
        )
    )  # fmt: skip


def _units_behind(workload: Workload, through: I64, most: int) -> tuple[I64, float]:
    unit = _first_behind(read_only(workload.identities), read_only(workload.indptr), through, most)
    return unit, _effective(np.bincount(unit, weights=np.diff(workload.indptr)))


@njit
def _counts(refs: I32, n_identities: int) -> I64:
    """int64[n_identities]: references to each block (`np.bincount` would copy the references to int64)."""
    counts = np.zeros(n_identities, np.int64)
    for p in range(refs.size):
        counts[np.intp(np.uint32(refs[p]))] += 1
    return counts


@njit
def _first_behind(refs: I32, indptr: I64, through: I64, most: int) -> I64:
    """int64[n_requests]: the first block of each request that at most `most` requests go through; where there is
    none a number of the request's own, behind those of the blocks."""
    unit = np.empty(indptr.size - 1, np.int64)
    for r in range(indptr.size - 1):
        unit[r] = through.size + r
        for p in range(indptr[r], indptr[r + 1]):
            if through[refs[p]] <= most:
                unit[r] = refs[p]
                break
    return unit


@njit
def _trunk_use(
    refs: I32, indptr: I64, prompt_blocks: I32, hit_cap: I32, last_tokens: I32, block_size: int,
    trunk: Bools, first: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    """As TrunkUse, of requests from `first` on."""
    seen = np.zeros(trunk.size, np.bool_)
    looked_up, looked_up_short, hits, hits_short = 0, 0, 0, 0
    for r in range(indptr.size - 1):
        start, end = indptr[r], indptr[r + 1]
        hit = True
        for p in range(start, start + prompt_blocks[r]):
            key = refs[p]
            if not trunk[key]:
                break
            hit = hit and seen[key] and p - start < hit_cap[r]
            seen[key] = True
            if r >= first:
                short = block_size - last_tokens[r] if p == end - 1 else 0
                looked_up += 1
                looked_up_short += short
                if hit:
                    hits += 1
                    hits_short += short
    return looked_up, looked_up * block_size - looked_up_short, hits, hits * block_size - hits_short


def _effective(weights: npt.NDArray[np.generic]) -> float:
    sizes = weights.astype(np.float64)
    squares = float((sizes**2).sum())
    return float(sizes.sum()) ** 2 / squares if squares else 0.0


def _hash(numbers: U64, seed: int) -> U64:
    return mixed(numbers + mixed(np.array([seed % 2**64], np.uint64)))


def mixed(numbers: U64) -> U64:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): every bit of the result depends on every bit."""
    bits = numbers + np.uint64(0x9E37_79B9_7F4A_7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return bits ^ (bits >> np.uint64(31))
