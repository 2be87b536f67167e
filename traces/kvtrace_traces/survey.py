"""First passes of the decoder: which commits can be used, how many rows they make, and the chains of identities.

Compiled. The words of all OPS commits are one array; commit ``c`` is ``words[starts[c]:stops[c]]``. The layout of the
operations is :data:`kvtrace_traces.schema.OPS`; what a commit claims is checked here, so that the passes after this one
index arrays without looking.
"""

# ruff: noqa: SIM109 -- chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.schema import EXT_OPS, NO_REQUEST, OPS, SCHED_BIG, SCHED_COUNTS, SCHED_WIDE

KEY, OUTPUT, CHAIN, LOOKUP, HIT = (OPS[n].code for n in ("KEY", "OUTPUT", "CHAIN", "LOOKUP", "HIT"))
ALLOC, ALLOCN, FILL1, FILL = (OPS[n].code for n in ("ALLOC", "ALLOCN", "FILL1", "FILL"))
FREE, PREEMPT, FINISH, BEGIN, SCHED = (OPS[n].code for n in ("FREE", "PREEMPT", "FINISH", "BEGIN", "SCHED"))
X_TIME, X_REQ, X_OWN, X_RESET, X_EVICT = (EXT_OPS[n].code for n in ("TIME", "REQ", "OWN", "RESET", "EVICT"))
X_SKIP, X_INEXACT, X_ALLOC, X_HIT, X_FILL = (EXT_OPS[n].code for n in ("SKIP", "INEXACT", "ALLOCX", "HITX", "FILLX"))
X_FREE, X_IDS, X_STORE, X_LOAD, X_LOST = (EXT_OPS[n].code for n in ("FREEX", "IDS", "STORE", "LOAD", "LOST"))
X_TYPE, X_ABOUT, X_WHEN = (EXT_OPS[n].code for n in ("TYPE", "ABOUT", "WHEN"))
X_MOVE, X_MOVED = (EXT_OPS[n].code for n in ("MOVE", "MOVED"))
X_START, X_LIVE, X_KEPT, X_QUEUE = (EXT_OPS[n].code for n in ("START", "LIVE", "KEPT", "QUEUE"))
X_KNOWN = EXT_OPS["KNOWN"].code
REQ_WORDS = 12  # fixed part of EXT REQ
KEY_WORDS = 10  # fixed part of KEY; the last says how many HELD entries there are

COUNTS = (
    "requests", "id_bytes", "chain", "steps", "entries", "lookups", "preemptions", "references", "explicit", "moves",
    "owners", "logged", "inexact", "first_logged", "key_events_lost", "types", "type_bytes", "transfers",
)  # fmt: skip
(
    N_REQUESTS, N_ID_BYTES, N_CHAIN, N_STEPS, N_ENTRIES, N_LOOKUPS, N_PREEMPTIONS, N_REFERENCES, N_EXPLICIT, N_MOVES,
    N_OWNERS, N_LOGGED, N_INEXACT, N_FIRST_LOGGED, N_KEY_LOST, N_TYPES, N_TYPE_BYTES, N_TRANSFERS,
) = range(len(COUNTS))  # fmt: skip


@njit
def op_words(words, at, stop):
    """Words of the operation at ``at``, its own included; -1 where it is none or does not end by ``stop``."""
    word = words[at]
    op = word & np.uint32(15)
    operand = np.int64(word >> np.uint32(4))
    left = stop - at
    n = np.int64(-1)
    if op == ALLOC or op == OUTPUT or op == BEGIN:
        n = 1
    elif op == HIT or op == ALLOCN:
        n = 1 + operand
    elif op == FILL1 or op == LOOKUP or op == PREEMPT or op == FINISH:
        n = 3
    elif op == FILL or op == FREE:
        n = 2
    elif op == CHAIN:
        if left >= 2:
            n = 2 + 2 * np.int64(words[at + 1])
    elif op == SCHED:
        entries = (operand >> 4) & 0xFFF
        owners = operand >> 16
        n = 2
        if operand & SCHED_BIG:
            if left < 3:
                return np.int64(-1)
            entries = np.int64(words[at + 1])
            owners = np.int64(words[at + 2])
            n = 4
        if operand & SCHED_COUNTS:
            n += 2
        n += 3 * entries
        if owners > 0:
            n += owners if operand & SCHED_WIDE else 1 + (owners + 1) // 2
    elif op == KEY:
        if left >= 1 + KEY_WORDS:
            n = 1 + KEY_WORDS + 3 * operand + 4 * np.int64(words[at + KEY_WORDS])
    elif op == 15:
        n = 1 + (operand >> 8)
    if n > left:
        return np.int64(-1)
    return n


@njit
def sched_parts(words, at):
    """Of the SCHED at ``at``: entries, owners, and the offsets of its free-block word, entries and owners."""
    operand = np.int64(words[at] >> np.uint32(4))
    entries = (operand >> 4) & 0xFFF
    owners = operand >> 16
    free = at + 1
    if operand & SCHED_BIG:
        entries = np.int64(words[at + 1])
        owners = np.int64(words[at + 2])
        free = at + 3
    first = free + 1
    if operand & SCHED_COUNTS:
        first += 2
    return entries, owners, free, first, first + 3 * entries


@njit
def survey(words, starts, stops, keys, gaps, use, capacity_requests, num_blocks):
    """Check every operation and count the rows to come.

    Marks in ``use`` (bool, one per commit) the commits that can be decoded: those from a frame's start on with
    nothing missing in between. Returns ``COUNTS`` (int64) and how many commits were malformed: a frame after a gap
    that is older than what was read before it (a part of the file that stands there twice) is one of them.
    """
    counts = np.zeros(18, np.int64)
    malformed = 0
    live = False  # the state that operations are relative to is known
    fresh = True  # nothing was read yet
    resumed = True  # a KEY is due, and sets the state
    requests = np.int64(0)
    time = np.int64(0)
    bound = np.int64(num_blocks)
    for c in range(len(starts)):
        use[c] = False
        if gaps[c]:
            live = False
            resumed = True
            fresh = False
        if keys[c]:
            live = True
        if not live:
            continue
        before = counts.copy()
        requests_before, time_before = requests, time
        at, stop = starts[c], stops[c]
        good = True
        first = True
        owned = np.int64(0)
        logged = counts[N_LOGGED]
        while at < stop:
            n = op_words(words, at, stop)
            if n < 0:
                good = False
                break
            op = words[at] & np.uint32(15)
            operand = np.int64(words[at] >> np.uint32(4))
            if (first and keys[c]) != (op == KEY):
                good = False
                break
            first = False
            if op == ALLOC:
                counts[N_REFERENCES] += 1
                logged += 1
                good = operand < bound
            elif op == ALLOCN or op == HIT:
                counts[N_REFERENCES] += operand
                logged += operand
                for i in range(at + 1, at + n):
                    if np.int64(words[i]) >= bound:
                        good = False
            elif op == FILL1:
                counts[N_CHAIN] += 1
                logged += 1
                good = operand < requests
            elif op == CHAIN:
                counts[N_CHAIN] += np.int64(words[at + 1])
                good = operand < requests
            elif op == LOOKUP:
                counts[N_LOOKUPS] += 1
                good = operand < requests
            elif op == FILL or op == FREE:
                logged += np.int64(words[at + 1])
                good = operand < requests
            elif op == PREEMPT:
                counts[N_PREEMPTIONS] += 1
                logged += np.int64(words[at + 2])
                good = operand < requests
            elif op == FINISH:
                good = operand < requests
            elif op == SCHED:
                entries, owners, _, entry, _ = sched_parts(words, at)
                counts[N_STEPS] += 1
                counts[N_ENTRIES] += entries
                owned += owners
                for i in range(entries):
                    if np.int64(words[entry + 3 * i]) >= requests:
                        good = False
            elif op == KEY:
                claimed = np.int64(words[at + 4])
                told = np.int64(words[at + 5]) | np.int64(words[at + 6]) << 32
                begun = np.int64(words[at + 1]) | np.int64(words[at + 2]) << 32
                if resumed:
                    good = requests <= claimed <= capacity_requests and told >= logged and begun >= time
                    time = begun
                    if fresh:
                        counts[N_LOGGED] = logged = told
                        counts[N_FIRST_LOGGED] = told
                else:
                    good = claimed == requests
                resumed = False
                fresh = False
                requests = claimed
                if told > logged:
                    counts[N_KEY_LOST] += told - logged
                    logged = told
                counts[N_ENTRIES] += operand
                m = np.int64(words[at + KEY_WORDS])
                base = at + 1 + KEY_WORDS
                for i in range(operand):
                    if np.int64(words[base + 3 * i]) >= requests and words[base + 3 * i] != np.uint32(NO_REQUEST):
                        good = False
                base += 3 * operand
                for i in range(m):
                    if np.int64(words[base + 4 * i]) >= requests:
                        good = False
            elif op == 15:
                code = operand & 255
                size = n - 1
                if code == X_REQ:
                    good = size >= REQ_WORDS and np.int64(words[at + REQ_WORDS]) <= 4 * (size - REQ_WORDS)
                    good = good and requests < capacity_requests
                    if good:
                        counts[N_ID_BYTES] += np.int64(words[at + REQ_WORDS])
                        requests += 1
                elif code == X_IDS:
                    good = size % 2 == 0 and requests + size // 2 <= capacity_requests
                    counts[N_CHAIN] += size // 2
                    requests += size // 2
                elif code == X_TIME:
                    good = size == 2
                    if good:
                        time = np.int64(words[at + 1]) | np.int64(words[at + 2]) << 32
                elif code == X_OWN:
                    owned += size
                elif code == X_RESET:
                    counts[N_EXPLICIT] += 1
                    logged += 1
                elif code == X_EVICT:
                    counts[N_EXPLICIT] += size
                    logged += size
                    for i in range(at + 1, at + n):
                        if np.int64(words[i]) >= bound:
                            good = False
                elif code == X_ALLOC or code == X_HIT or code == X_FREE:
                    good = size >= 2
                    counts[N_EXPLICIT] += 2 * (size - 2)
                    logged += size - 2
                    for i in range(at + 3, at + n):
                        if np.int64(words[i]) >= bound:
                            good = False
                elif code == X_FILL:
                    good = size >= 2 and (size - 2) % 3 == 0
                    counts[N_EXPLICIT] += (size - 2) // 3
                    counts[N_CHAIN] += (size - 2) // 3
                    logged += (size - 2) // 3
                    for i in range((size - 2) // 3):
                        if np.int64(words[at + 3 + 3 * i]) >= bound:
                            good = False
                elif code == X_STORE or code == X_LOAD or code == X_MOVE:
                    fixed = 7 if code == X_MOVE else 6
                    good = size >= fixed
                    counts[N_TRANSFERS] += 1
                    counts[N_MOVES] += size - fixed
                    logged += size - fixed
                    for i in range(at + 1 + fixed, at + n):
                        if np.int64(words[i]) >= bound:
                            good = False
                elif code == X_MOVED:
                    good = size == 7
                elif code == X_LOST:
                    counts[N_PREEMPTIONS] += 1
                    good = size == 3 and np.int64(words[at + 1]) < requests
                elif code == X_INEXACT:
                    good = size == 1 and words[at + 1] < np.uint32(63)
                    if good:
                        counts[N_INEXACT] |= np.int64(1) << np.int64(words[at + 1])
                elif code == X_SKIP:
                    good = size == 1
                elif code == X_START:
                    good = size == 2
                elif code == X_LIVE:
                    good = size >= 6 and np.int64(words[at + 1]) < requests
                    good = good and np.int64(words[at + 6]) <= size - 6
                    counts[N_ENTRIES] += 1
                    counts[N_REFERENCES] += size - 6
                    for i in range(at + 7, at + n):
                        if np.int64(words[i]) >= bound:
                            good = False
                elif code == X_KEPT:
                    good = size % 5 == 0
                    counts[N_CHAIN] += size // 5
                    for i in range(size // 5):
                        if np.int64(words[at + 1 + 5 * i]) >= bound:
                            good = False
                elif code == X_QUEUE:
                    for i in range(at + 1, at + n):
                        if np.int64(words[i]) >= bound:
                            good = False
                elif code == X_KNOWN:
                    good = size % 5 == 0
                    for i in range(size // 5):
                        if np.int64(words[at + 1 + 5 * i]) >= requests:
                            good = False
                elif code == X_TYPE:
                    good = (
                        size >= 2 and np.int64(words[at + 2]) <= 4 * (size - 2) and words[at + 1] < np.uint32(1 << 31)
                    )
                    if good:
                        counts[N_TYPES] += 1
                        counts[N_TYPE_BYTES] += np.int64(words[at + 2])
                elif code == X_ABOUT:
                    good = size == 4 and np.int64(words[at + 1]) < requests
                    good = good and (words[at + 4] == np.uint32(NO_REQUEST) or np.int64(words[at + 4]) < requests)
                elif code == X_WHEN:
                    good = size % 3 == 1
                    if good:
                        told = np.int64(words[at + 1])
                        for i in range(size // 3):
                            told += np.int64(words[at + 2 + 3 * i])
                        good = told <= requests
                # An unknown code is of a newer minor version: its length says how far to skip.
            elif op == OUTPUT or op == BEGIN:
                time += operand
            else:
                good = False
            if not good:
                break
            at += n
        if good:
            use[c] = True
            counts[N_OWNERS] = max(counts[N_OWNERS], owned)  # most in one commit
            counts[N_LOGGED] = logged
        else:
            malformed += 1
            counts[:] = before
            requests, time = requests_before, time_before
            live = False
            resumed = True
    counts[N_REQUESTS] = requests
    return counts, malformed


@njit
def gather(words, starts, stops, gaps, use, known, length, owner, hashes):
    """Collect the identities in log order: ``owner`` (int32 request, -1 for blocks without a chain) and ``hashes``.

    ``known`` (bool) and ``length`` (int32), one per request: whether its arrival was read, and identities of its chain
    that were. A chain of which a part is missing ends there. Returns the number of identities.
    """
    broken = np.zeros(len(known), np.bool_)
    count = 0
    requests = 0
    resumed = True
    for c in range(len(starts)):
        resumed = resumed or gaps[c]
        if not use[c]:
            resumed = True
            continue
        at, stop = starts[c], stops[c]
        while at < stop:
            n = op_words(words, at, stop)
            op = words[at] & np.uint32(15)
            request = np.int64(words[at] >> np.uint32(4))
            first = np.int64(0)
            many = np.int64(0)
            stride = 2
            if op == FILL1:
                first, many = at + 1, np.int64(1)
            elif op == CHAIN:
                first, many = at + 2, np.int64(words[at + 1])
            elif op == KEY:
                requests = np.int64(words[at + 4])
                if resumed:
                    held = at + 1 + KEY_WORDS + 3 * request
                    for i in range(np.int64(words[at + KEY_WORDS])):
                        r = words[held + 4 * i]
                        if not known[r] or length[r] != np.int64(words[held + 4 * i + 3]):
                            broken[r] = True
                resumed = False
            elif op == 15:
                code = request & 255
                if code == X_REQ:
                    known[requests] = True
                    requests += 1
                elif code == X_IDS:
                    for i in range((n - 1) // 2):
                        known[requests] = True
                        length[requests] = 1
                        owner[count] = requests
                        low, high = np.uint64(words[at + 1 + 2 * i]), np.uint64(words[at + 2 + 2 * i])
                        hashes[count] = low | high << np.uint64(32)
                        requests += 1
                        count += 1
                elif code == X_FILL:
                    first, many, stride, request = at + 4, (n - 3) // 3, 3, np.int64(-1)
                elif code == X_KEPT:
                    first, many, stride, request = at + 2, (n - 1) // 5, 5, np.int64(-1)
            if many > 0 and (request < 0 or (known[request] and not broken[request])):
                for i in range(many):
                    j = first + stride * i
                    owner[count] = request
                    hashes[count] = np.uint64(words[j]) | np.uint64(words[j + 1]) << np.uint64(32)
                    count += 1
                if request >= 0:
                    length[request] += many
            at += n
    return count


@njit
def densify(hashes, count, multiplier, slots, identities, unique):
    """Number the identities in order of first use. ``slots``: int32 of a power of two >= 2 * count, all -1;
    ``multiplier``: odd, drawn at random, so that no file can be made to collide.

    Writes ``identities`` (int32) and the distinct hashes to ``unique`` (uint64); returns how many there are.
    """
    mask = np.uint64(len(slots) - 1)
    found = 0
    following = 0
    for i in range(count):
        value = hashes[i]
        # What follows a known identity is mostly what followed it when it was new, and that has the next number.
        if following < found and unique[following] == value:
            identities[i] = following
            following += 1
            continue
        mixed = value * multiplier
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while True:
            dense = slots[slot]
            if dense < 0:
                slots[slot] = found
                unique[found] = value
                dense = found
                found += 1
                break
            if unique[dense] == value:
                break
            slot = (slot + np.uint64(1)) & mask
        identities[i] = dense
        following = dense + 1
    return found


@njit
def by_request(owner, identities, count, indptr, chains):
    """Sort the identities by request, keeping their order: CSR. ``indptr`` (int64) holds the starts already."""
    place = indptr[:-1].copy()
    for i in range(count):
        request = owner[i]
        if request >= 0:
            chains[place[request]] = identities[i]
            place[request] += 1
