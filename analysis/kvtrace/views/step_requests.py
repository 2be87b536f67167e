"""`step_requests`: expanded from its run-length form as it is read, so that counting a million rows keeps none."""

from __future__ import annotations

from kvtrace.views.declare import View, expanded
from kvtrace_traces.schema import TABLES

VIEW = View(
    "step_requests",
    TABLES["step_requests"].doc,
    TABLES["step_requests"].columns,
    ("step_spans",),
    f"""
SELECT {{key}}, (first_step + i)::INTEGER AS step, request, tokens,
       (computed_before + i * tokens)::INTEGER AS computed_before
FROM {expanded("step_spans")}
""",
)
