"""A preemption storm: when it raged, whom it hit, what it cost, and what would have spared it."""

from __future__ import annotations

import sys

import kvtrace

trace = kvtrace.open(sys.argv[1] if len(sys.argv) > 1 else "traces/samples/thrash.kvt")

print("steps, preemptions, tokens computed again, running, waiting, free blocks")
storm = trace.sql("""
    SELECT step // 100 * 100 AS from_step, coalesce(sum(victims), 0) AS victims,
           coalesce(sum(recomputed), 0) AS recomputed, avg(running) AS running, avg(waiting) AS waiting,
           avg(free_blocks) AS free_blocks
    FROM steps LEFT JOIN (SELECT engine_index, step, count(*) AS victims, sum(tokens_recomputed) AS recomputed
                          FROM preemptions GROUP BY ALL) USING (engine_index, step)
    GROUP BY from_step HAVING victims > 0 ORDER BY from_step
""")
for row in storm.iter_rows(named=True):
    print(f"from {row['from_step']:4}: {row['victims']:2}, {row['recomputed']:5,}, {row['running']:4.1f}, "
          f"{row['waiting']:4.1f}, {row['free_blocks']:4.1f}")  # fmt: skip

worst = trace.sql("""
    SELECT request, count(*) AS times, sum(tokens_recomputed) AS tokens FROM preemptions
    GROUP BY request ORDER BY tokens DESC, request LIMIT 3
""")
print("hit hardest:", ", ".join(f"request {r} ({n} times, {t} tokens)" for r, n, t in worst.iter_rows()))

own = trace.header["num_blocks"]
for what, settings in (
    ("as recorded", {}),
    ("twice the blocks", {"num_blocks": 2 * own}),
    ("half the batch", {"max_num_seqs": trace.header["scheduler"]["max_num_seqs"] // 2}),
    ("a watermark of 5 %", {"watermark": 0.05}),
):
    row = kvtrace.simulate(trace, **settings).row(0, named=True)
    print(f"{what}: {row['preemptions']} preemptions in {row['steps']:,} steps")
