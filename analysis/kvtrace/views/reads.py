"""`reads`: derived, not logged. Expanded row by row as a query asks for them, never kept."""

from __future__ import annotations

from kvtrace.views.declare import ENGINE, REQUEST, STEP, View, column, expanded
from kvtrace_traces.schema import Column

VIEW = View(
    "reads",
    "one row per step and block that a scheduled request read: all blocks up to what it has computed by its end",
    (
        ENGINE,
        STEP,
        REQUEST,
        column("block_events", "group"),
        Column("position", "i32", "blocks", "0-based place of the block in the request"),
        Column("block", "i32", "block", "the block's number in the engine"),
        Column("tokens", "i32", "tokens", "tokens of the block that were read"),
    ),
    ("read_spans", "engines"),
    # The engine's block size comes in before the expansion: a join behind it could choose to hold all reads.
    f"""
SELECT {{key}}, (first_step + i)::INTEGER AS step, request, "group", position, block,
       least(block_size, computed_before + (i + 1) * tokens - position * block_size)::INTEGER AS tokens
FROM {expanded("(SELECT * FROM read_spans JOIN (SELECT {key}, block_size FROM engines) USING ({key}))")}
""",
)
