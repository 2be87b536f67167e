"""SGLang's tree, whose nodes are runs of blocks, kept by the policies `sglang-*`.

A node is what one insertion added: a run of blocks down from an existing one. A lookup or insertion that ends, or
leaves for another branch, within a run splits it there. Runs never grow together again. The node as a whole
is evicted, an unlocked leaf of the least rank first; a parent left without children becomes a leaf.

What is known of a node, and how (`sglang/srt/mem_cache/radix_cache.py` and `evict_policy.py`, 0.5.23):
- *last use*: a lookup or insertion uses all nodes of its path, at its own time. Also the node it splits: the
  part below the split, though not on the path, counts as used just then;
- *creation*: when it was inserted, and for the upper part of a split node the time of the split, while the lower
  part keeps its own;
- *hits*: requests whose path covered it, the one that inserted it included; each counts a node once. The upper
  part of a split node takes the count over and adds the request that split it;
- *importance*: the highest of the requests whose path covered it; the upper part of a split node takes it over.

The time of a node's last use is set again when the last request that holds it ends, as SGLang inserts a
request's path once more at its end.

The rules are applied to pages, here blocks. Eviction is asked for as many blocks as are short. What SGLang's
scheduler does around its tree is left out: a prompt's last block that is in the cache, but has to be computed
again, is not held twice meanwhile, and is not evicted for its own request.

State, the same for all: `refs` int32[n_refs] and `depths` int32[n_refs] of the stream; `links`
int32[n_identities, 4] and `facts` int64[n_identities, 5], a node's under its lowest block; `entries` and
`tickets`, the unlocked leaves by rank; `weights` int32[n_refs], importance of the request of each reference
(empty but for `sglang-priority`); `at` int64[7].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.ranked import is_in, new_ranked, put_in, take_least, take_out
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
State = tuple[I32, I32, I32, I64, I64, I32, I32, I64]

# Orders in which leaves are evicted.
LRU, LFU, FIFO, MRU, FILO, SLRU, PRIORITY = range(7)

# Columns of `links`. BOTTOM is set at a node's highest block, TOP at its lowest; UNDER, within a node, is the block
# below; OVER is the block above, in whatever node.
BOTTOM, TOP, UNDER, OVER = range(4)
NONE = -1
# Columns of `facts`. CHILDREN counts resident blocks right below a block, those of its own node included.
LAST, CREATED, HITS, IMPORTANCE, CHILDREN = range(5)
# Slots of `at` behind those of `ranked`. HIT_AT and PLACED_AT are positions of the last calls.
CLOCK, HIT_AT, PLACED_AT, ORDER, THRESHOLD = range(2, 7)


def new_nodes(stream: Stream, capacity: int, order: int, weights: I32 | None = None, threshold: int = 0) -> State:
    """The state of an empty tree whose leaves are evicted in `order`."""
    links = np.full((stream.n_identities, 4), NONE, np.int32)
    entries, tickets = new_ranked(stream.n_identities, capacity)
    at = np.zeros(7, np.int64)
    at[HIT_AT] = at[PLACED_AT] = NONE - 1
    at[ORDER], at[THRESHOLD] = order, threshold
    facts = np.zeros((stream.n_identities, 5), np.int64)
    if weights is None:
        weights = np.zeros(0, np.int32)
        weights.setflags(write=False)
    return stream.refs, stream.depths(), links, facts, entries, tickets, weights, at


@njit(cache=False)
def _tick(at: I64) -> int:
    at[CLOCK] += 1
    return at[CLOCK]


@njit(cache=False)
def _offer(node: int, facts: I64, entries: I64, tickets: I32, at: I64) -> None:
    """Puts the leaf `node` among those that may be evicted."""
    order = at[ORDER]
    last = facts[node, LAST]
    major = 0
    minor = last
    if order == LFU:
        major = facts[node, HITS]
    elif order == FIFO:
        minor = facts[node, CREATED]
    elif order == MRU:
        minor = -last
    elif order == FILO:
        minor = -facts[node, CREATED]
    elif order == SLRU:
        major = 1 if facts[node, HITS] >= at[THRESHOLD] else 0
    elif order == PRIORITY:
        major = facts[node, IMPORTANCE]
    put_in(entries, tickets, at, node, major, minor)


@njit(cache=False)
def _split(key: int, now: int, refs: I32, links: I32, facts: I64, entries: I64, tickets: I32, at: I64) -> None:
    """Makes `key` the lowest block of a node of its own, the upper part of the one it is in."""
    p = now
    while links[refs[p], BOTTOM] == NONE:
        p -= 1
    top = refs[p]
    lower = links[top, BOTTOM]
    lower_top = links[key, UNDER]
    facts[lower, LAST] = _tick(at)
    facts[key, LAST] = facts[key, CREATED] = _tick(at)
    facts[key, HITS] = facts[lower, HITS]
    facts[key, IMPORTANCE] = facts[lower, IMPORTANCE]
    links[top, BOTTOM] = key
    links[key, TOP] = top
    links[key, UNDER] = NONE
    links[lower_top, BOTTOM] = lower
    links[lower, TOP] = lower_top
    if is_in(tickets, lower):
        _offer(lower, facts, entries, tickets, at)


@njit(cache=False)
def _weigh(node: int, now: int, facts: I64, weights: I32, at: I64) -> None:
    if at[ORDER] == PRIORITY:
        facts[node, IMPORTANCE] = max(facts[node, IMPORTANCE], np.int64(weights[now]))


# What a policy is made of: compiled with the policy, so plain functions here.


def insert(
    key: int,
    now: int,
    refs: I32,
    depths: I32,
    links: I32,
    facts: I64,
    entries: I64,
    tickets: I32,
    weights: I32,
    at: I64,
) -> None:
    goes_on = at[PLACED_AT] == now + 1 and depths[now + 1] > 0
    at[PLACED_AT] = now
    at[HIT_AT] = NONE - 1
    links[key, OVER] = NONE
    if depths[now] > 0:
        links[key, OVER] = refs[now - 1]
        facts[refs[now - 1], CHILDREN] += 1
    if goes_on:  # the run is placed from its lowest block upwards
        under = refs[now + 1]
        bottom = links[under, BOTTOM]
        links[under, BOTTOM] = NONE
        links[key, UNDER] = under
        links[key, BOTTOM] = bottom
        links[bottom, TOP] = key
    else:
        links[key, BOTTOM] = key
        links[key, TOP] = key
        facts[key, LAST] = facts[key, CREATED] = _tick(at)
        facts[key, HITS] = 1
        if at[ORDER] == PRIORITY:
            facts[key, IMPORTANCE] = weights[now]


def hit(
    key: int, pinned: bool, now: int,
    refs: I32, depths: I32, links: I32, facts: I64, entries: I64, tickets: I32, weights: I32, at: I64,
) -> None:  # fmt: skip
    begins = at[HIT_AT] != now + 1 or depths[now + 1] == 0
    at[HIT_AT] = now
    at[PLACED_AT] = NONE - 1
    if begins and links[key, TOP] == NONE:
        _split(key, now, refs, links, facts, entries, tickets, at)
    if links[key, TOP] != NONE:
        facts[key, LAST] = _tick(at)
        facts[key, HITS] += 1
        _weigh(key, now, facts, weights, at)


def evict(
    key: int, now: int, pins: I32,
    refs: I32, depths: I32, links: I32, facts: I64, entries: I64, tickets: I32, weights: I32, at: I64,
) -> int:  # fmt: skip
    node = take_least(entries, tickets, at)
    if node == NONE:
        return NONE
    top = links[node, TOP]
    links[node, TOP] = NONE
    links[top, BOTTOM] = NONE
    block = top
    while block != NONE:
        under = links[block, UNDER]
        links[block, UNDER] = NONE
        facts[block, CHILDREN] = 0
        block = under
    over = links[top, OVER]
    if over != NONE:
        facts[over, CHILDREN] -= 1
        if pins[over] == 1:  # nothing but the child that leaves
            _offer(over, facts, entries, tickets, at)
    return top


def pin(
    key: int, refs: I32, depths: I32, links: I32, facts: I64, entries: I64, tickets: I32, weights: I32, at: I64
) -> None:
    take_out(tickets, key)


def unpin(
    key: int, refs: I32, depths: I32, links: I32, facts: I64, entries: I64, tickets: I32, weights: I32, at: I64
) -> None:
    if links[key, TOP] != NONE:
        facts[key, LAST] = _tick(at)
        if facts[key, CHILDREN] == 0:
            _offer(key, facts, entries, tickets, at)
