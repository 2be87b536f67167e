"""`offloads`: blocks copied to a slower tier and back."""

from __future__ import annotations

from kvtrace.views.declare import ENGINE, STEP, View, column
from kvtrace_traces.schema import Column

VIEW = View(
    "offloads",
    "one row per request, moment and direction in which blocks were copied to a slower tier or back",
    (
        ENGINE,
        STEP,
        column("block_events", "time_ns"),
        column("block_events", "request"),
        Column("kind", "str", "", "`store` to the slower tier, `load` from it"),
        Column("blocks", "i64", "blocks", "blocks copied"),
        Column("bytes", "i64", "bytes", "keys and values of whole blocks", True),
    ),
    ("block_events", "engines"),
    """
SELECT {key}, step, time_ns, request, kind, blocks, blocks * bytes_per_block AS bytes
FROM (
  SELECT {key}, step, time_ns, request, kind::VARCHAR AS kind, count(*) AS blocks
  FROM block_events WHERE kind IN ('store', 'load') GROUP BY ALL)
JOIN engines USING ({key})
""",
)
