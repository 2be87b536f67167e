"""The manager of the CPU tier: `vllm/v1/kv_offload/cpu/manager.py`, `policies/lru.py` and `policies/arc.py` (0.32.0).

A chunk is its identity. Its request knows it as the n-th of its chain: what a request did with it is a byte beside it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    B1,
    B2,
    COUNT,
    EVICT,
    F_TARGET,
    G_LOG,
    G_READY,
    G_REFUSED,
    G_ROOM,
    G_STAMP,
    G_STORED_BLOCKS,
    G_TIER_EVICTIONS,
    GONE,
    HEAD,
    I_MARK,
    I_NEXT,
    I_OFFERED,
    I_PREVIOUS,
    I_READERS,
    I_WHERE,
    INNER,
    INSERTED,
    K_KEYS,
    LOAD,
    LOG_TIER,
    LOW_BITS,
    LOW_SIZE,
    MISSED,
    NONE,
    O_STORED,
    P_ARC,
    P_CHUNK_BLOCKS,
    P_CHUNKS,
    P_LOG,
    P_THRESHOLD,
    REFUSE,
    REUSED,
    SEEN,
    STORE,
    STORING,
    T1,
    T2,
    TAIL,
)
from kvtrace_traces.compile import njit

NEXT, PREVIOUS = I_NEXT, I_PREVIOUS


@njit(cache=False, **INNER)
def chunk_key(s, request, chunk):
    """The identity of chunk `chunk` of a request: that of its last block."""
    return np.int64(s.chain[s.chain_at[request] + (chunk + 1) * s.p[P_CHUNK_BLOCKS] - 1])


@njit(cache=False, **INNER)
def write(s, what, a, b, c, d, e, f):
    """A row of the log, if there is one. What it has no room for is counted."""
    if s.p[P_LOG]:
        n = s.g[G_LOG]
        if n < s.log.shape[0]:
            row = s.log[n]
            row[0], row[1], row[2], row[3], row[4], row[5], row[6] = what, a, b, c, d, e, f
        s.g[G_LOG] = n + 1


@njit(cache=False, **INNER)
def write_time(s, what, value, time):
    """A row with a time, in two parts that an int32 holds."""
    write(s, what, value, time & LOW_BITS, time >> LOW_SIZE, 0, 0, 0)


@njit(cache=False, **INNER)
def note(s, code, value):
    write(s, LOG_TIER, code, value, 0, 0, 0, 0)


@njit(cache=False, **INNER)
def append(s, which, key):
    last = s.lists[which, TAIL]
    s.ids[key, PREVIOUS], s.ids[key, NEXT] = last, -1
    if last < 0:
        s.lists[which, HEAD] = key
    else:
        s.ids[last, NEXT] = key
    s.lists[which, TAIL] = key
    s.lists[which, COUNT] += 1
    s.ids[key, I_WHERE] = which


@njit(cache=False, **INNER)
def unlink(s, key):
    which = s.ids[key, I_WHERE]
    before, after = s.ids[key, PREVIOUS], s.ids[key, NEXT]
    if before < 0:
        s.lists[which, HEAD] = after
    else:
        s.ids[before, NEXT] = after
    if after < 0:
        s.lists[which, TAIL] = before
    else:
        s.ids[after, PREVIOUS] = before
    s.lists[which, COUNT] -= 1
    s.ids[key, I_WHERE] = NONE


@njit(cache=False, **INNER)
def to_end(s, key):
    which = s.ids[key, I_WHERE]
    unlink(s, key)
    append(s, which, key)


@njit(cache=False, **INNER)
def miss(s, key):
    """ARC: a ghost that is asked for moves the share of the first list: `_adapt_to_ghost_hit`."""
    once, again = s.lists[B1, COUNT], s.lists[B2, COUNT]
    if s.ids[key, I_WHERE] == B1:
        s.real[F_TARGET] = min(s.real[F_TARGET] + max(1.0, again / once), np.float64(s.p[P_CHUNKS]))
        to_end(s, key)
    elif s.ids[key, I_WHERE] == B2:
        s.real[F_TARGET] = max(s.real[F_TARGET] - max(1.0, once / again), 0.0)
        to_end(s, key)


@njit(cache=False, **INNER)
def drop(s, key):
    """A chunk leaves the tier; under ARC its ghost stays."""
    ghosts = B1 if s.ids[key, I_WHERE] == T1 else B2
    unlink(s, key)
    if s.p[P_ARC]:
        append(s, ghosts, key)
    s.ids[key, I_READERS] = GONE
    s.g[G_ROOM] += 1
    s.g[G_READY] -= 1
    s.g[G_TIER_EVICTIONS] += 1
    note(s, -1, key)


@njit(cache=False, **INNER)
def candidate(s, key, stamp):
    """From `key` on in its list, the first chunk that may be dropped; -1 for none."""
    while key >= 0 and (s.ids[key, I_READERS] != 0 or s.ids[key, I_MARK] == stamp):
        key = s.ids[key, NEXT]
    return key


@njit(cache=False, **INNER)
def make_room(s, short, stamp):
    """Drop `short` chunks; the caller has seen that there are so many. `CachePolicy.evict`."""
    note(s, EVICT, short)
    one, two = candidate(s, s.lists[T1, HEAD], stamp), candidate(s, s.lists[T2, HEAD], stamp)
    for _ in range(short):
        if one >= 0 and (s.lists[T1, COUNT] >= np.int64(s.real[F_TARGET]) or two < 0):
            following = candidate(s, np.int64(s.ids[one, NEXT]), stamp)
            drop(s, one)
            one = following
        else:
            following = candidate(s, np.int64(s.ids[two, NEXT]), stamp)
            drop(s, two)
            two = following
    if s.p[P_ARC]:
        for ghosts in (B1, B2):
            while s.lists[ghosts, COUNT] > s.p[P_CHUNKS]:
                unlink(s, s.lists[ghosts, HEAD])


@njit(cache=False, **INNER)
def prepare_store(s, req, request, start, stop):
    """Chunks `start` to `stop` of a request are on offer: `CPUOffloadingManager.prepare_store`. Those that the tier
    takes become STORING, with the stamp of this offer, negative, as their mark. Returns how many these are, -1 where it
    refuses for want of room."""
    s.g[G_STAMP] += 1
    stamp, at = s.g[G_STAMP], s.chain_at[request]
    for c in range(start, stop):
        key = chunk_key(s, request, c)
        s.ids[key, I_OFFERED] += 1
        s.ids[key, I_MARK] = stamp
    new, spared = 0, 0
    for c in range(stop - 1, start - 1, -1):
        key = chunk_key(s, request, c)
        if s.ids[key, I_READERS] == GONE:
            if s.p[P_THRESHOLD] < 2 or s.ids[key, I_OFFERED] >= s.p[P_THRESHOLD]:
                new += 1
                s.flags[at + c] |= SEEN
                if not s.flags[at + c] & MISSED:
                    s.flags[at + c] |= MISSED
                    miss(s, key)
        elif s.ids[key, I_READERS] >= 0:
            spared += s.ids[key, I_READERS] == 0
            s.flags[at + c] |= SEEN
            if not s.flags[at + c] & INSERTED:
                s.flags[at + c] |= REUSED
    if new == 0:
        return 0
    short = new - s.g[G_ROOM]
    if short > 0:
        if short > s.g[G_READY] - spared:
            note(s, REFUSE, stop - start)
            for c in range(start, stop):
                note(s, -1, chunk_key(s, request, c))
            s.g[G_REFUSED] += 1
            return -1
        make_room(s, short, stamp)
    note(s, STORE, new)
    for c in range(start, stop):
        key = chunk_key(s, request, c)
        if s.ids[key, I_READERS] == GONE and (s.p[P_THRESHOLD] < 2 or s.ids[key, I_OFFERED] >= s.p[P_THRESHOLD]):
            if s.ids[key, I_WHERE] != NONE:  # a ghost
                unlink(s, key)
            append(s, T1, key)
            s.ids[key, I_READERS] = STORING
            s.g[G_ROOM] -= 1
            s.flags[at + c] |= INSERTED
            s.ids[key, I_MARK] = -stamp  # it is new
            note(s, -1, key)
    s.g[G_STORED_BLOCKS] += new * s.p[P_CHUNK_BLOCKS]
    req[request, O_STORED] += new * s.p[P_CHUNK_BLOCKS]
    return new


@njit(cache=False, **INNER)
def end_store(s, request, chunk):
    s.ids[chunk_key(s, request, chunk), I_READERS] = 0
    s.g[G_READY] += 1


@njit(cache=False, **INNER)
def begin_load(s, request, start, stop):
    """`prepare_load`: the chunks stay while they are read."""
    note(s, LOAD, stop - start)
    for c in range(start, stop):
        key, at = chunk_key(s, request, c), s.chain_at[request] + c
        s.g[G_READY] -= s.ids[key, I_READERS] == 0
        s.ids[key, I_READERS] += 1
        s.flags[at] |= SEEN
        if not s.flags[at] & INSERTED:
            s.flags[at] |= REUSED
        note(s, -1, key)


@njit(cache=False, **INNER)
def end_load(s, request, chunk):
    key = chunk_key(s, request, chunk)
    s.ids[key, I_READERS] -= 1
    s.g[G_READY] += s.ids[key, I_READERS] == 0


@njit(cache=False, **INNER)
def forget_request(s, req, request):
    """A request has ended: what it saw counts as used now, the tail before the head. `on_request_finished`."""
    at = s.chain_at[request]
    for c in range(req[request, K_KEYS] - 1, -1, -1):
        flags = s.flags[at + c]
        if not flags & SEEN:
            continue
        key = chunk_key(s, request, c)
        which = s.ids[key, I_WHERE]
        if s.p[P_ARC]:
            if flags & INSERTED and not flags & REUSED:
                if which in (T1, T2):
                    to_end(s, key)
            elif flags & REUSED and which == T1:
                unlink(s, key)
                append(s, T2, key)
            elif flags & REUSED and which == T2:
                to_end(s, key)
        elif which == T1:
            to_end(s, key)
