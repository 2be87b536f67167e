"""In which rules of scheduling and block management the versions of vLLM V1 differ (0.10 to 0.32).

Read in the sources of the versions in ``CHECKED`` by comparing, function by function, ``Scheduler.schedule``,
``_preempt_request``, ``_update_after_schedule``, ``update_from_output``, ``finish_requests``, ``AsyncScheduler``, the
request queues, ``check_stop``, ``KVCacheManager``, ``SingleTypeKVCacheManager``, ``FullAttentionManager``,
``BlockPool``, ``FreeKVCacheBlockQueue`` and ``EngineCore.step_with_batch_queue``; and run: see ``tests/simulation``.
They hold for one KV cache group with full attention, without speculative decoding and connectors.

Differences found that change no schedule, and so have no flag: with two batches in flight (asynchronous scheduling
without pipeline parallelism) every output of a preempted request arrives before the next call of the scheduler, so
that the older ways to account for it (placeholders kept, up to 0.26; zeroed, with the request set aside until its
stale output has arrived, from 0.27) come to the same; an empty batch is waited for at once (up to 0.22) or left in
flight (from 0.23), which changes no order of scheduling and output either; queues of requests set aside (from 0.18)
stay empty; lookups are counted at each attempt (up to 0.26) or at admission (from 0.27), and only the latter are
lookups here.

Where vLLM itself fails: up to 0.11, equal priorities with equal arrival times may raise (the heap compares requests);
up to 0.11.0 a victim that stays scheduled (see ``priority_victim``) fails an assertion with asynchronous scheduling,
and before 0.10.2 at times without.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

#: The versions whose sources were compared. Every change below lies between two versions that follow each other here
#: and on the package index, so that none is guessed.
CHECKED: tuple[str, ...] = (
    *("0.10.0", "0.10.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.16.0", "0.18.0", "0.18.1", "0.19.0"),
    *("0.19.1", "0.20.0", "0.21.0", "0.22.0", "0.23.0", "0.24.0", "0.25.0", "0.26.0", "0.27.0", "0.27.1", "0.28.0"),
    *("0.29.0", "0.30.0", "0.31.0", "0.32.0"),
)

# What becomes of a request that is preempted in the scheduler call that has already scheduled it (priority policy).
VICTIM_STAYS_SCHEDULED, VICTIM_INDEX_IF_SCHEDULED, VICTIM_INDEX_IF_BEFORE = range(3)


class Rules(NamedTuple):
    """The rules in which versions differ; everything else is common to all.

    ``uncached_first``: freed blocks without an identity go to the front of the free queue, in the order in which they
    are freed, before blocks with one go to the back (``BlockPool.free_blocks``, from 0.24; before, all go to the back).

    ``uncached_first_without_caching``: the same where prefix caching is off, so that no block has an identity
    (``BlockPool.free_blocks``: 0.24 to 0.26 ask for the identity alone; 0.27 wants prefix caching on besides, and
    appends; from 0.28 to the front again).

    ``whole_sequence_gate``: a waiting request is admitted only if there is room for all its known tokens, not for its
    first chunk alone (``KVCacheManager.can_fit_full_sequence`` from 0.19, ``allocate_slots(full_sequence_must_fit)``
    from 0.21 on; the option ``scheduler_reserve_full_isl``, on by default).

    ``watermark``: the option ``watermark`` exists: where anything runs, an admission must leave this share of the
    blocks free (``KVCacheManager.allocate_slots``, from 0.24).

    ``threshold_spares_lone_request``: ``long_prefill_token_threshold`` is ignored while a single request is queued or
    running (``Scheduler.schedule``, from 0.31).

    ``unchunked_prompt_blocks``: with chunked prefill off, a prompt that does not fit into the step's remaining
    tokens ends the admissions of the step (``Scheduler.schedule``, from 0.12). Before, it is passed over, and all
    passed over in a step are put back at the head of the queue *last first* (``FCFSRequestQueue.prepend_requests``).

    ``priority_victim``: under the priority policy the victim may be a request already scheduled in the same call
    (``Scheduler.schedule``). ``VICTIM_STAYS_SCHEDULED`` (up to 0.11.0): it stays in the step, its tokens stay spent and
    are counted as computed though its blocks are gone, its output is taken, and the scan of running requests skips one
    request for each victim before it. ``VICTIM_INDEX_IF_SCHEDULED`` (from 0.11.1): it leaves the step, its tokens go
    back to the budget, and the scan's position moves back by one. ``VICTIM_INDEX_IF_BEFORE`` (from 0.28): the
    position moves back for any victim that stood before it, scheduled or not.

    ``async_skips_finishing``: asynchronous scheduling does not schedule a request whose output in flight is its last
    by ``max_tokens`` (``Scheduler.schedule``, from 0.11.1, written anew in 0.12; before, it runs one step too many).

    ``stop_before_length``: a stop token that is also the last token allowed ends a request with reason "stop"
    (``check_stop``, from 0.11.1; before, "length").

    ``late_hashes``: a preempted request looks up only those blocks that its first lookup knew or that it has cached
    since, not blocks that output arriving after the preemption has filled, which asynchronous scheduling makes
    possible (``KVCacheManager.req_to_block_hashes``, 0.10.0 only; from 0.10.1 hashes follow the tokens).
    """

    uncached_first: bool
    uncached_first_without_caching: bool
    whole_sequence_gate: bool
    watermark: bool
    threshold_spares_lone_request: bool
    unchunked_prompt_blocks: bool
    priority_victim: int
    async_skips_finishing: bool
    stop_before_length: bool
    late_hashes: bool


FIRST = Rules(
    uncached_first=False,
    uncached_first_without_caching=False,
    whole_sequence_gate=False,
    watermark=False,
    threshold_spares_lone_request=False,
    unchunked_prompt_blocks=False,
    priority_victim=VICTIM_STAYS_SCHEDULED,
    async_skips_finishing=False,
    stop_before_length=False,
    late_hashes=True,
)

# From which version on what changes, oldest first.
_CHANGES: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
    ((0, 10, 1), {"late_hashes": False}),
    (
        (0, 11, 1),
        {"priority_victim": VICTIM_INDEX_IF_SCHEDULED, "async_skips_finishing": True, "stop_before_length": True},
    ),
    ((0, 12, 0), {"unchunked_prompt_blocks": True}),
    ((0, 19, 0), {"whole_sequence_gate": True}),
    ((0, 24, 0), {"uncached_first": True, "uncached_first_without_caching": True, "watermark": True}),
    ((0, 27, 0), {"uncached_first_without_caching": False}),
    ((0, 28, 0), {"uncached_first_without_caching": True, "priority_victim": VICTIM_INDEX_IF_BEFORE}),
    ((0, 31, 0), {"threshold_spares_lone_request": True}),
)


def rules_of(version: str) -> Rules:
    """Return the rules of a version of vLLM, such as "0.27.1" or "0.32.0+cpu"; of the newest for those after 0.32.

    ValueError for versions before 0.10, which have another scheduler or are not known, and for what is no version.
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None:
        raise ValueError(f"{version!r} is no version of vLLM; rules are known from 0.10 on, such as 0.32.0")
    number = (int(match[1]), int(match[2]), int(match[3] or 0))
    if number < (0, 10, 0):
        raise ValueError(f"no rules for vLLM {version}; they are known from 0.10 on (newer than 0.32: as 0.32)")
    rules = FIRST
    for since, changes in _CHANGES:
        if number >= since:
            rules = rules._replace(**changes)
    return rules


NEWEST = rules_of("0.32.0")
