"""How much cache is enough? The recorded requests, run again through the same scheduler with more and fewer blocks."""

from __future__ import annotations

import sys

import kvtrace

ENOUGH = 0.9  # of what the largest cache finds

trace = kvtrace.open(sys.argv[1] if len(sys.argv) > 1 else "traces/samples/thrash.kvt")
own = trace.header["num_blocks"]
sizes = [own // 2, own, own * 3 // 2, own * 2, own * 3, own * 4]
rows = kvtrace.simulate(trace, num_blocks=sizes)

print(f"recorded with {own} blocks of {trace.header['block_size']} tokens")
print("blocks  hit tokens  first admissions  preemptions  steps")
first = rows["hit_tokens"] - rows["hit_tokens_after_preemption"]
for row, found in zip(rows.iter_rows(named=True), first, strict=True):
    print(f"{row['num_blocks']:6}  {row['hit_tokens']:10,}  {found:16,}  {row['preemptions']:11}  {row['steps']:5,}")
chosen = next(row for row, found in zip(sizes, first, strict=True) if found >= ENOUGH * first.max())
print(f"{chosen} blocks find {ENOUGH:.0%} of what {sizes[-1]} find")
