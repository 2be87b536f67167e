"""Where the decoder puts what: rows of its arrays, by table. Plain numbers, which Numba compiles in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.schema import BLOCK_EVENT_KINDS

ALLOCATED, HITS, FILLED, FREED, EVICTED, RESET, STORED, LOADED = range(len(BLOCK_EVENT_KINDS))

# Rows of the int32 and int64 arrays of requests.
(R_ARRIVAL_STEP, R_PROMPT, R_OUTPUT, R_MAX, R_PRIORITY, R_FLAGS, R_CACHED, R_PREEMPTIONS, R_FIRST, R_LAST,
 R_FINISH_STEP, R_REASON, R_ID_BYTES, R_TYPE, R_TURN, R_PARENT, R_FINISH_EMPTY) = range(17)  # fmt: skip
R_ARRIVAL_NS, R_ARRIVAL_S, R_TENANT, R_FINISH_NS, R_ID_AT = range(5)
# Rows of the int32 arrays of steps, spans, lookups, preemptions and block events; S_START and S_END of an int64 one.
S_STEP, S_REQUESTS, S_TOKENS, S_RUNNING, S_WAITING, S_FREE, S_PREEMPTED, S_EMPTY = range(8)
S_START, S_END = range(2)
P_REQUEST, P_FIRST, P_STEPS, P_TOKENS, P_COMPUTED = range(5)
L_STEP, L_REQUEST, L_ASKED, L_HIT, L_AFTER = range(5)
V_STEP, V_REQUEST, V_BLOCKS, V_TOKENS = range(4)
E_STEP, E_REQUEST, E_BLOCK, E_IDENTITY = range(4)
T_NUMBER, T_AT, T_BYTES = range(3)  # names of types
# Rows of the int32 and int64 arrays of transfers.
M_STEP, M_REQUEST, M_KIND, M_TIER, M_BLOCKS, M_TOKENS, M_DONE_STEP = range(7)
M_NUMBER, M_TIME, M_BYTES, M_DONE, M_COPY = range(5)


class Rows(NamedTuple):
    """The arrays that ``events.play`` fills: one row per constant above, one column per row of the table.

    ``times`` int64, ``kinds`` uint8 and ``groups`` int16 belong to ``events``; ``preempted_at`` int64 belongs to
    ``preemptions``; ``type_bytes`` uint8 are the names that ``types`` points to.
    """

    requests32: NDArray[np.int32]
    requests64: NDArray[np.int64]
    id_bytes: NDArray[np.uint8]
    steps32: NDArray[np.int32]
    steps64: NDArray[np.int64]
    spans: NDArray[np.int32]
    lookups: NDArray[np.int32]
    preemptions: NDArray[np.int32]
    preempted_at: NDArray[np.int64]
    events: NDArray[np.int32]
    times: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    groups: NDArray[np.int16]
    types: NDArray[np.int32]
    type_bytes: NDArray[np.uint8]
    moves32: NDArray[np.int32]
    moves64: NDArray[np.int64]
