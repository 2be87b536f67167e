"""`preemptions`: what the log tells of each, and what became of its victim.

Counted as computed twice is what a request computes below the highest point that it had reached before.
"""

from __future__ import annotations

from kvtrace.views.declare import View
from kvtrace_traces.schema import TABLES, Column

VIEW = View(
    "preemptions",
    "one row per preemption; `request` is the victim",
    (
        *TABLES["preemptions"].columns,
        Column("readmit_step", "i32", "step", "the step in which it ran again; null: it did not", True),
        Column("readmit_ns", "i64", "ns", "when that step began", True),
        Column("tokens_found", "i32", "tokens", "tokens that it then found in the cache", True),
        Column("tokens_recomputed", "i32", "tokens", "tokens then computed once more, up to its next preemption", True),
    ),
    ("logged_preemptions", "step_spans", "steps"),
    """
WITH lost AS (
  SELECT *, lead(tokens_lost) OVER w AS next_lost, max(tokens_lost) OVER w AS highest
  FROM (SELECT row_number() OVER () AS n, * FROM logged_preemptions)
  WINDOW w AS (PARTITION BY {key}, request ORDER BY n)),
spans AS (
  SELECT {key}, request, first_step, computed_before, computed_before + steps * tokens AS computed_after
  FROM step_spans),
ends AS (
  SELECT {key}, request, max_by(computed_after, first_step) AS last_computed FROM spans GROUP BY {key}, request)
SELECT {key}, step, time_ns, request, blocks_lost, tokens_lost, readmit_step, start_ns AS readmit_ns,
       CASE WHEN readmit_step IS NOT NULL THEN tokens_found END AS tokens_found,
       CASE WHEN readmit_step IS NOT NULL
            THEN greatest(0, least(coalesce(next_lost, last_computed), highest) - tokens_found) END::INTEGER
         AS tokens_recomputed
FROM (
  SELECT l.*, s.first_step AS readmit_step, s.computed_before AS tokens_found
  FROM lost l ASOF LEFT JOIN spans s ON {l=s} AND l.request = s.request AND l.step <= s.first_step)
LEFT JOIN (SELECT {key}, step AS readmit_step, start_ns FROM steps) USING ({key}, readmit_step)
LEFT JOIN ends USING ({key}, request)
""",
)
