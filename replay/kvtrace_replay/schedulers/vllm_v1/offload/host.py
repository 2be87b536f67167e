"""Host memory as a block pool of vLLM's own, which `SimpleCPUOffloadScheduler` keeps (0.32.0).

Its functions are those of the engine's pool (`vllm_v1.blocks`), on arrays of its own. A block whose identity is guessed
can be found by nobody; that the host has the same as a block of the engine is said by each of the two of the other one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v1.blocks import append_free, remember, take_block, touch
from kvtrace_replay.schedulers.vllm_v1.layout import B_IDENTITY, B_REFS, G_EVICTIONS, GUESSED
from kvtrace_replay.schedulers.vllm_v1.offload.events import FREE, HIT, emit
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    B_HAND,
    CACHE,
    G_ROOM,
    G_TIER_EVICTIONS,
    GIVE,
    INNER,
    LOG_HOST,
    PIN,
    TAKE,
)
from kvtrace_replay.schedulers.vllm_v1.offload.tier import write
from kvtrace_traces.compile import njit


@njit(cache=False, **INNER)
def take_host(s):
    """`BlockPool.get_new_blocks`, one."""
    evicted = s.host_g[G_EVICTIONS]
    block = take_block(s.host, s.host_first, s.host_g)
    if s.host_g[G_EVICTIONS] > evicted:
        s.g[G_TIER_EVICTIONS] += 1
    else:
        s.g[G_ROOM] -= 1
    s.host[block, B_HAND] = 0
    write(s, LOG_HOST, TAKE, block, -1, 0, 0, 0)
    return block


@njit(cache=False, **INNER)
def pin_host(s, block):
    """`BlockPool.touch`."""
    if s.host[block, B_REFS] == 0:
        write(s, LOG_HOST, PIN, block, -1, 0, 0, 0)
    touch(s.host, s.host_g, block)


@njit(cache=False, **INNER)
def give_host(s, block):
    """`BlockPool.free_blocks`, one; what is given up here has always been cached, so it goes to the end."""
    s.host[block, B_REFS] -= 1
    if s.host[block, B_REFS] == 0:
        write(s, LOG_HOST, GIVE, block, -1, 0, 0, 0)
        append_free(s.host, s.host_g, block)


@njit(cache=False, **INNER)
def cache_host(s, host, block):
    """`_insert_block_hash`: what block `block` of the engine holds can be found in block `host` from here on."""
    identity = s.blk[block, B_IDENTITY]
    remember(s.host, s.host_first, host, identity)
    if identity == GUESSED:
        s.host[host, B_HAND], s.blk[block, B_HAND] = block, host
    write(s, LOG_HOST, CACHE, host, identity, 0, 0, 0)


@njit(cache=False, **INNER)
def on_host(s, block, identity):
    """Whether the host has what a cached block of the engine holds."""
    if identity != GUESSED:
        return s.host_first[identity] >= 0
    host = s.blk[block, B_HAND]
    return host > 0 and s.host[host, B_HAND] == block and s.host[host, B_IDENTITY] == GUESSED


@njit(cache=False, **INNER)
def hold(s, block):
    """A block of the engine is held for a copy."""
    touch(s.blk, s.g, block)
    emit(s, HIT, -1, block, s.blk[block, B_IDENTITY])


@njit(cache=False, **INNER)
def let_go(s, block):
    """The copy is over. Who is the last to let go a block that was copied finds it cached: it goes to the end."""
    emit(s, FREE, -1, block, s.blk[block, B_IDENTITY])
    s.blk[block, B_REFS] -= 1
    if s.blk[block, B_REFS] == 0:
        append_free(s.blk, s.g, block)
