"""Questions in SQL: which prefixes are shared, who waited, and what the cache was full of."""

from __future__ import annotations

import sys

import kvtrace

trace = kvtrace.open(sys.argv[1] if len(sys.argv) > 1 else "traces/samples/thrash.kvt")

print("the prefixes that save most, kept once:")
hot = trace.sql("""
    SELECT depth, blocks, requests, (requests - 1) * tokens AS saved_tokens
    FROM prefixes ORDER BY saved_tokens DESC, node LIMIT 3
""")
for row in hot.iter_rows(named=True):
    saved = row["saved_tokens"]
    print(f"  {row['blocks']} blocks at depth {row['depth']}, {row['requests']} requests: {saved:,} tokens")

print("time to the first token, by what was found in the cache:")
waits = trace.sql("""
    SELECT CASE WHEN cached_tokens * 2 < prompt_tokens THEN 'below half' ELSE 'half and more' END AS found,
           count(*) AS requests, avg(ttft_ns) / 1e6 AS ttft_ms, avg(queue_ns) / 1e6 AS queue_ms
    FROM latencies JOIN requests USING (engine_index, request) GROUP BY found ORDER BY found
""")
for row in waits.iter_rows(named=True):
    queued = row["queue_ms"]
    print(f"  {row['found']:13} {row['requests']:4} requests: {row['ttft_ms']:.0f} ms, {queued:.0f} of it queued")

print("and the result is a Polars frame:", type(hot).__name__, hot.shape)
