"""Which eviction policy? First the open loop with the best possible beside it, then the best one in the engine."""

from __future__ import annotations

import sys

import kvtrace

POLICIES = ["lru", "fifo", "s3fifo", "sieve", "slru", "arc"]

trace = kvtrace.open(sys.argv[1] if len(sys.argv) > 1 else "traces/samples/thrash.kvt")
capacity = trace.header["num_blocks"] - 1  # without vLLM's null block
replayed = kvtrace.replay(trace, policy=[*POLICIES, "opt"], capacity=capacity).sort("token_hits", descending=True)
print(f"open loop, {capacity} blocks")
for row in replayed.iter_rows(named=True):
    print(f"  {row['policy']:7} {row['token_hit_ratio']:6.1%} of tokens hit")

best = next(name for name in replayed["policy"] if name != "opt")
simulated = kvtrace.simulate(trace, policy=["vllm", best])
print("closed loop: admissions and preemptions follow from what is in the cache")
for row in simulated.iter_rows(named=True):
    print(f"  {row['policy']:7} {row['token_hit_ratio']:6.1%} of tokens hit, {row['preemptions']:2} preemptions")
