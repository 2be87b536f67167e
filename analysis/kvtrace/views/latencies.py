"""`latencies`: what requests waited for, as the scheduler saw it (the way to the client not included)."""

from __future__ import annotations

from kvtrace.views.declare import ENGINE, REQUEST, View, column
from kvtrace_traces.schema import Column

VIEW = View(
    "latencies",
    "one row per request that was scheduled",
    (
        ENGINE,
        REQUEST,
        column("requests", "finish_reason"),
        Column("queue_ns", "i64", "ns", "from arrival to the begin of its first step"),
        Column("first_token_step", "i32", "step", "the step that computed the last token of its prompt", True),
        Column("first_token_ns", "i64", "ns", "when that step's output arrived", True),
        Column("ttft_ns", "i64", "ns", "time to first token: from arrival to that", True),
        Column("generation_ns", "i64", "ns", "from the first token to the end", True),
        Column("itl_ns", "f64", "ns", "inter-token latency, its mean: generation time over tokens after the first",
               True),
        Column("e2e_ns", "i64", "ns", "end to end: from arrival to the end", True),
        Column("preempted_ns", "i64", "ns", "from being preempted to running again, all times together"),
    ),
    ("requests", "steps", "step_spans", "preemptions"),
    """
WITH prompts AS (
  SELECT {key}, request,
         min(first_step + greatest((prompt_tokens - computed_before - 1) // tokens, 0)) AS first_token_step
  FROM step_spans JOIN (SELECT {key}, request, prompt_tokens FROM requests) USING ({key}, request)
  WHERE tokens > 0 AND computed_before + steps * tokens >= prompt_tokens GROUP BY {key}, request),
paused AS (
  SELECT {key}, request, sum(readmit_ns - time_ns)::BIGINT AS preempted_ns FROM preemptions GROUP BY {key}, request),
told AS (
  SELECT {key}, request, finish_reason, arrival_ns, finish_ns, output_tokens, start_ns, first_token_step,
         end_ns AS first_token_ns, preempted_ns
  FROM requests
  JOIN (SELECT {key}, step AS first_step, start_ns FROM steps) USING ({key}, first_step)
  LEFT JOIN prompts USING ({key}, request)
  LEFT JOIN (SELECT {key}, step AS first_token_step, end_ns FROM steps) USING ({key}, first_token_step)
  LEFT JOIN paused USING ({key}, request))
SELECT {key}, request, finish_reason, start_ns - arrival_ns AS queue_ns, first_token_step::INTEGER AS first_token_step,
       first_token_ns, first_token_ns - arrival_ns AS ttft_ns, finish_ns - first_token_ns AS generation_ns,
       CASE WHEN output_tokens > 1 THEN (finish_ns - first_token_ns) / (output_tokens - 1) END AS itl_ns,
       finish_ns - arrival_ns AS e2e_ns, coalesce(preempted_ns, 0) AS preempted_ns
FROM told
""",
)  # fmt: skip
