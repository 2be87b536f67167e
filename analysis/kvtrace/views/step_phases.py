"""`step_phases`: how long each step took, and how its tokens divide into prefill and decode.

A token is prefill where it lies in the prompt, also when it is computed for the second time. A step lasts from the
output before it, or its own begin where that is later, to its own output: under asynchronous scheduling steps overlap,
and time is counted once.
"""

from __future__ import annotations

from kvtrace.views.declare import ENGINE, STEP, View
from kvtrace_traces.schema import Column

VIEW = View(
    "step_phases",
    "one row per step",
    (
        ENGINE,
        STEP,
        Column("duration_ns", "i64", "ns", "from the output before, or its begin, to its output", True),
        Column("prefill_tokens", "i64", "tokens", "scheduled tokens that lie in prompts"),
        Column("decode_tokens", "i64", "tokens", "the other ones"),
        Column("prefill_requests", "i64", "requests", "requests with tokens of the prompt scheduled"),
        Column("decode_requests", "i64", "requests", "the other ones"),
    ),
    ("steps", "step_spans", "requests"),
    """
WITH spans AS (
  SELECT *, least(steps, greatest(0, (prompt_tokens - computed_before + tokens - 1) // tokens)) AS prefill_steps
  FROM step_spans JOIN (SELECT {key}, request, prompt_tokens FROM requests) USING ({key}, request)
  WHERE tokens > 0),
prefills AS (
  SELECT {key}, first_step + i AS step, count(*) AS prefill_requests,
         sum(least(tokens, prompt_tokens - computed_before - i * tokens)) AS prefill_tokens
  FROM (SELECT *, unnest(range(prefill_steps)) AS i FROM spans) GROUP BY {key}, first_step + i),
timed AS (
  SELECT *, end_ns - greatest(start_ns, coalesce(max(end_ns) OVER (
           PARTITION BY {key} ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), start_ns)) AS duration_ns
  FROM steps)
SELECT {key}, step, duration_ns, coalesce(prefill_tokens, 0)::BIGINT AS prefill_tokens,
       (tokens - coalesce(prefill_tokens, 0))::BIGINT AS decode_tokens,
       coalesce(prefill_requests, 0)::BIGINT AS prefill_requests,
       (requests - coalesce(prefill_requests, 0))::BIGINT AS decode_requests
FROM timed LEFT JOIN prefills USING ({key}, step)
""",
)
