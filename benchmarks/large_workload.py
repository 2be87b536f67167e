"""An enlarged workload: the requests of a busy chat server, as many as wanted, in place of a sample's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace import samples
from kvtrace_replay.schedulers.recorded import LENGTH, Recorded, recorded
from kvtrace_replay.schedulers.settings import Settings, own_settings
from kvtrace_traces import open_trace

BLOCK, BLOCKS, SEQS, BUDGET = 16, 5600, 128, 8192
STEPS_PER_REQUEST = 1.4  # between two arrivals
SYSTEMS, SYSTEM_BLOCKS = 200, 16  # system prompts, each shared by many conversations
TURN_BLOCKS = 8  # a question, on the mean
EVENTS_PER_REQUEST = 184  # measured at these settings


def enlarged(n_requests: int, seed: int = 7) -> tuple[Recorded, Settings]:
    """`n_requests` in conversations of one to four turns: each prompt is the last prompt, its answer and a question.

    System prompts are chosen by Zipf's law; of a request's blocks all but the answer's belong to its prompt. A request
    arrives about every step and a half, so that the batch is full and some wait. Identities are dense, in order of
    first use, as a trace has them.
    """
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 5, n_requests)
    conversation = np.repeat(np.arange(n_requests), turns)[:n_requests]
    first = np.flatnonzero(np.append(True, np.diff(conversation) > 0))
    nth = np.arange(n_requests) - first[conversation]
    question = rng.integers(1, 2 * TURN_BLOCKS, n_requests)
    answer = rng.integers(1, 21, n_requests)
    begin = np.minimum((rng.pareto(1.0, n_requests) * 3).astype(np.int64), SYSTEMS - 1)[first][conversation]
    # What a conversation has said before its n-th turn, in blocks behind the system prompt.
    said = np.cumsum(question + answer) - question - answer
    before = said - said[first][conversation]
    own = before + question + answer
    lengths = SYSTEM_BLOCKS + own
    # A conversation's blocks are numbered through, so that a later turn begins with the blocks of the ones before.
    base = SYSTEMS * SYSTEM_BLOCKS + said[first][conversation]
    at = np.append(0, np.cumsum(lengths)).astype(np.int64)
    place = np.arange(at[-1], dtype=np.int64) - np.repeat(at[:-1], lengths)
    behind = np.repeat(base, lengths) + place - SYSTEM_BLOCKS
    chain = np.where(place < SYSTEM_BLOCKS, np.repeat(begin, lengths) * SYSTEM_BLOCKS + place, behind)
    # Turns follow one another after a while, not at once.
    arrival = conversation_times(conversation, nth, rng)
    order = np.argsort(arrival, kind="stable")
    chain, at = _reordered(chain, at, order)
    chain = _dense(chain)
    stub = rng.integers(1, BLOCK, n_requests)[order]  # the last block is not full
    prompt = ((SYSTEM_BLOCKS + before + question) * BLOCK)[order]
    stop = prompt + answer[order] * BLOCK + stub
    with_sample = open_trace(samples.path("thrash"))
    source = recorded(with_sample)
    header = {
        **source.header,
        "max_model_len": 4096,
        "num_blocks": BLOCKS,
        "granule": BLOCK,
        "block_size": BLOCK,
        "bytes_per_block": BLOCK * int(source.header["bytes_per_token"]),
    }
    settings = own_settings(header).changed_to(num_blocks=BLOCKS, max_num_seqs=SEQS, max_num_batched_tokens=BUDGET)
    zeros = np.zeros(n_requests, np.int32)
    bigger = replace(
        source,
        header=header,
        prompt=prompt.astype(np.int32),
        stop=stop.astype(np.int32),
        most=stop.astype(np.int32),
        reason=np.full(n_requests, LENGTH, np.int32),
        no_read=np.zeros(n_requests, bool),
        priority=zeros,
        arrival_s=np.arange(n_requests, dtype=np.float64),
        request_id=pl.Series([f"r{i}" for i in range(n_requests)]),
        arrival_step=(np.arange(n_requests) * STEPS_PER_REQUEST).astype(np.int32),
        arrival_late=np.zeros(n_requests, bool),
        abort_step=np.full(n_requests, -2, np.int32),
        abort_calls=np.zeros(n_requests, np.int32),
        abort_early=np.zeros(n_requests, bool),
        abort_ns=np.zeros(n_requests, np.int64),
        tenant=np.zeros(n_requests, np.uint64),
        chain=chain,
        chain_at=at,
        hashes=rng.integers(1, 2**63, int(chain.max()) + 1).astype(np.uint64),
        unfinished=0,
        resets=0,
    )
    return bigger, replace(settings, max_model_len=4096)


def conversation_times(
    conversation: npt.NDArray[np.int64], nth: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """When each request comes: conversations begin one after the other, and a turn follows some 300 requests later."""
    return conversation * 2.5 + nth * 300 + rng.random(conversation.size) * 100


def _reordered(
    chain: npt.NDArray[np.int64], at: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    lengths = np.diff(at)[order]
    new = np.append(0, np.cumsum(lengths)).astype(np.int64)
    source = np.arange(new[-1], dtype=np.int64) + np.repeat(at[:-1][order] - new[:-1], lengths)
    return chain[source], new


def _dense(chain: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The identities renumbered in order of first use."""
    first = np.full(int(chain.max()) + 1, chain.size, np.int64)
    np.minimum.at(first, chain, np.arange(chain.size))
    used = np.argsort(first, kind="stable")
    number = np.empty(first.size, np.int32)
    number[used] = np.arange(first.size, dtype=np.int32)
    return number[chain]
