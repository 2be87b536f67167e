"""Two servers, the same requests: the recorded one, and one with half as many blocks again.

The second is simulated and written as a trace, which everything reads like a recorded one; two recordings of the same
clients are compared in the same way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import kvtrace
from kvtrace.simulations import simulate_trace, write_trace
from kvtrace.sql import Database

small = kvtrace.open("traces/samples/thrash.kvt")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "large.kvt"
    write_trace(simulate_trace(small, {"num_blocks": [small.header["num_blocks"] * 3 // 2]}), path)
    both = Database([small, kvtrace.open(path)])
    sums = both.query("""
        SELECT trace, any_value(capacity_blocks) AS blocks, count(*) AS lookups, sum(tokens_hit) AS hit,
               sum(capacity_tokens) AS evicted
        FROM misses JOIN engines USING (trace, engine_index) GROUP BY trace ORDER BY blocks
    """)
    for row in sums.iter_rows(named=True):
        print(f"{row['trace']:6} {row['blocks']} blocks: {row['lookups']} lookups, {row['hit']:,} tokens hit, "
              f"{row['evicted']:,} missed because they were evicted")  # fmt: skip
    changed = both.query("""
        SELECT count(*) FILTER (WHERE l.cached_tokens > s.cached_tokens) AS gained,
               count(*) FILTER (WHERE l.cached_tokens < s.cached_tokens) AS lost,
               count(*) FILTER (WHERE s.preemptions > 0 AND l.preemptions = 0) AS spared,
               count(*) FILTER (WHERE s.preemptions = 0 AND l.preemptions > 0) AS newly_preempted
        FROM requests s JOIN requests l USING (request) WHERE s.trace = 'thrash' AND l.trace = 'large'
    """).row(0, named=True)
print(f"on the larger one {changed['gained']} requests find more, {changed['lost']} find less; "
      f"{changed['spared']} are no longer preempted, {changed['newly_preempted']} are that were not")  # fmt: skip
