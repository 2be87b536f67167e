"""The rules of the twin by name: one sentence each, with the function of vLLM (0.32.0) that it mirrors."""

from __future__ import annotations

RULES: dict[str, str] = {
    # the block pool
    "allocate-front": "Blocks are handed out from the front of the free queue (BlockPool.get_new_blocks).",
    "free-tail-first": "A request gives its blocks back last first (SingleTypeKVCacheManager.free).",
    "uncached-front": "Freed blocks without an identity go to the front of the free queue (BlockPool.free_blocks).",
    "front-keeps-order": "Blocks put at the front keep the order they are freed in (FreeKVCacheBlockQueue.prepend_n).",
    "cached-back": "Freed blocks with an identity go to the back of the free queue (BlockPool.free_blocks).",
    "first-duplicate": "Of several blocks with one identity a lookup gets the first cached"
    " (BlockHashToBlockMap.get_one_block).",
    # lookups
    "hit-leaves-a-token": "A hit covers at most all known tokens but one (KVCacheManager.get_computed_blocks).",
    "hit-includes-generated": "A preempted request finds blocks of generated tokens too"
    " (KVCacheManager.get_computed_blocks).",
    "late-hashes": "A preempted request looks up only blocks it knew or cached before (KVCacheManager; 0.10.0 only).",
    "no-read": "A request may ask not to read the cache (KVCacheManager.prefix_cache_lookup_enabled).",
    # filling
    "filled-when-allocated": "Blocks are cached when scheduled, before they are computed"
    " (KVCacheManager.allocate_slots).",
    "only-known-tokens-filled": "No block is cached that a token in flight fills (KVCacheManager.allocate_slots).",
    "generated-blocks-filled": "Blocks of generated tokens are cached like those of prompts (Request.block_hashes).",
    "async-fills-after-output": "Asynchronously, a block is cached once its last token has arrived"
    " (AsyncScheduler._update_request_with_output).",
    # admission
    "max-num-seqs": "At most max_num_seqs requests run (Scheduler.schedule).",
    "whole-sequence-gate": "A request is admitted only if all its known tokens fit (KVCacheManager.allocate_slots).",
    "gate-counts-generated": "Known tokens of a preempted request include what it generated"
    " (KVCacheManager.allocate_slots).",
    "evictable-hits-count": "Hit blocks that nobody uses count as needed"
    " (SingleTypeKVCacheManager.get_num_blocks_to_allocate).",
    "watermark": "Admissions leave a share of the blocks free (KVCacheManager.allocate_slots).",
    "watermark-needs-running": "Where nothing runs, the watermark is ignored (Scheduler.schedule, has_scheduled_reqs).",
    "watermark-for-admissions": "Running requests may use what the watermark keeps free"
    " (KVCacheManager.allocate_slots).",
    "no-admission-after-preemption": "A call that preempted admits nobody (Scheduler.schedule).",
    "head-blocks": "A request that does not fit blocks those behind it (Scheduler.schedule).",
    "admitted-run-last": "Admitted requests join the running ones at the end (Scheduler.schedule).",
    "unchunked-waits": "With chunked prefill off, a prompt waits until it fits into one step (Scheduler.schedule).",
    "unchunked-blocks": "Such a prompt blocks those behind it (Scheduler.schedule; from 0.12 on).",
    "passed-over-reversed": "Prompts passed over are put back last first"
    " (FCFSRequestQueue.prepend_requests; up to 0.11).",
    "threshold-waiting": "long_prefill_token_threshold cuts the first chunk (Scheduler.schedule).",
    # running
    "threshold-running": "long_prefill_token_threshold cuts later chunks (Scheduler.schedule).",
    "threshold-lone": "The threshold is ignored for a request that is alone (Scheduler.schedule; from 0.31 on).",
    "model-length-cut": "No token is scheduled at the last position of max_model_len (Scheduler.schedule).",
    "model-length-ends": "A request ends at max_model_len tokens (check_stop).",
    "stop-before-length": "A stop token as the last token allowed counts as a stop (check_stop; from 0.11.1 on).",
    # preemption
    "victim-last": "First come, first served: the victim is the last running request (Scheduler.schedule).",
    "victim-priority": "By priority: the victim is the running request of the highest number (Scheduler.schedule).",
    "victim-latest": "Of equal priorities the latest arrival is the victim (Scheduler.schedule).",
    "victim-first-of-equals": "Of equal priorities and times the first in the running queue is the victim"
    " (Scheduler.schedule).",
    "victim-tokens-restored": "The tokens of a victim already scheduled return to the budget"
    " (Scheduler.schedule; from 0.11.1 on).",
    "victim-moves-scan": "The scan goes on with the request after the present one"
    " (Scheduler.schedule; from 0.11.1 on).",
    "preempted-to-head": "A preempted request waits first (Scheduler._preempt_request).",
    # priorities
    "waiting-by-priority": "By priority: the waiting request of the lowest number is next (PriorityRequestQueue).",
    "waiting-ties-by-arrival": "Of equal priorities the earliest arrival is next (Request.__lt__).",
    "waiting-ties-by-id": "Of equal priorities and times the lowest request id, as text, is next"
    " (Request.__lt__; from 0.12 on).",
    # outputs, aborts, asynchronous scheduling
    "outputs-in-order": "Requests that end in one step free their blocks in scheduled order"
    " (Scheduler.update_from_output).",
    "aborts-in-order": "Requests aborted between two calls free their blocks in the order of the aborts"
    " (Scheduler.finish_requests).",
    "queue-depth": "Asynchronous scheduling keeps two steps in flight (EngineCore.step_with_batch_queue).",
    "async-skips-finishing": "A request whose last token is in flight is not scheduled"
    " (Scheduler.schedule; from 0.11.1 on).",
    "stale-output-kept": "Output in flight at a preemption is kept (Scheduler.update_from_output).",
}
