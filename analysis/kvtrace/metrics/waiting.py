"""Preemptions, and what requests waited for."""

from __future__ import annotations

from kvtrace.metrics.declare import Group, Metric, quantiles

_away, _away_sql = quantiles(
    "(readmit_ns - time_ns) / 1e9", "preempted", "s", "the times from being preempted to running again",
    "no preempted request ran again",
)  # fmt: skip
PREEMPTION = Group(
    "preemption",
    "Preemption",
    (
        Metric("preemptions", "times", "requests preempted, each time counted"),
        Metric("preempted_request_ratio", "ratio", "requests preempted at least once / requests scheduled"),
        Metric("preempted_blocks", "blocks", "blocks that they gave up"),
        Metric("preempted_tokens", "tokens", "tokens that they had computed"),
        Metric("recomputed_tokens", "tokens", "tokens scheduled below the point that their request had reached before"),
        Metric("recomputed_token_ratio", "ratio", "recomputed_tokens / scheduled tokens"),
        *_away,
    ),
    f"""
    WITH lost AS (
      SELECT engine_index, count(*) AS times, count(DISTINCT request) AS victims,
             sum(blocks_lost) AS blocks, sum(tokens_lost) AS tokens, sum(tokens_recomputed) AS recomputed, {_away_sql}
      FROM preemptions GROUP BY engine_index),
    ran AS (SELECT engine_index, count(*) AS requests FROM requests WHERE first_step IS NOT NULL GROUP BY engine_index),
    worked AS (SELECT engine_index, sum(tokens) AS scheduled FROM steps GROUP BY engine_index)
    SELECT * EXCLUDE (times), coalesce(times, 0) AS preemptions,
           coalesce(victims, 0) / requests AS preempted_request_ratio,
           coalesce(blocks, 0) AS preempted_blocks, coalesce(tokens, 0) AS preempted_tokens,
           coalesce(recomputed, 0) AS recomputed_tokens, coalesce(recomputed, 0) / scheduled AS recomputed_token_ratio
    FROM ran JOIN worked USING (engine_index) LEFT JOIN lost USING (engine_index)
    """,
    ("steps", "scheduled"),
)

_none = "no request got that far"
_ttft, _ttft_sql = quantiles("ttft_ns / 1e9", "ttft", "s", "the times from arrival to the first token", _none)
_queue, _queue_sql = quantiles("queue_ns / 1e9", "queue", "s", "the times from arrival to the first step", _none)
_e2e, _e2e_sql = quantiles("e2e_ns / 1e9", "e2e", "s", "the times from arrival to the end", _none)
_gen, _gen_sql = quantiles("generation_ns / 1e9", "generation", "s", "the times from the first token to the end", _none)
_link = "one of the two never varied"


def _correlation(y: str, x: str) -> str:
    """SQL for the correlation over the rows that have both; null where one of the two never varies."""
    both = f"FILTER (WHERE {x} IS NOT NULL AND {y} IS NOT NULL)"
    vary = [f"min({column}) {both} < max({column}) {both}" for column in (x, y)]
    return f"CASE WHEN {' AND '.join(vary)} THEN corr({y}, {x}) END"


LATENCY = Group(
    "latency",
    "Latency, as the scheduler saw it (requests that were aborted left out)",
    (
        *_ttft,
        *_queue,
        *_gen,
        *_e2e,
        Metric("queue_share_of_ttft", "ratio", "sum of the queueing times / sum of the times to first token", _none),
        Metric("ttft_hit_correlation", "ratio", "Pearson's correlation of the time to first token and tokens found / "
               "prompt tokens", _link),
        Metric("ttft_queue_correlation", "ratio", "of the time to first token and the queueing time", _link),
        Metric("e2e_preemption_correlation", "ratio", "of the time end to end and the number of preemptions", _link),
    ),
    f"""
    WITH told AS (
      SELECT * FROM latencies JOIN (SELECT engine_index, request, cached_tokens / nullif(prompt_tokens, 0) AS hit_share,
                                           preemptions FROM requests) USING (engine_index, request)
      WHERE finish_reason IS NULL OR finish_reason <> 'abort')
    SELECT engine_index, {_ttft_sql}, {_queue_sql}, {_gen_sql}, {_e2e_sql},
           sum(queue_ns) FILTER (WHERE ttft_ns IS NOT NULL) / nullif(sum(ttft_ns), 0) AS queue_share_of_ttft,
           {_correlation("ttft_ns", "hit_share")} AS ttft_hit_correlation,
           {_correlation("ttft_ns", "queue_ns")} AS ttft_queue_correlation,
           {_correlation("e2e_ns", "preemptions")} AS e2e_preemption_correlation
    FROM told GROUP BY engine_index
    """,
    ("scheduled",),
)  # fmt: skip

# Outputs of a request arrive at the ends of the steps that compute all of its prompt, and more of it than it had
# before. In a stretch of consecutive steps every gap is that between the outputs of two successive steps, so gaps are
# counted per step, and only those between stretches one by one.
_gaps = tuple(
    Metric(f"itl_p{n}_s", "s", f"{words} of the times between successive outputs of a request that bring it a token "
           "(the smallest time that at least so many of them do not exceed)", "no request got a second token")
    for n, words in ((50, "median"), (99, "99th percentile"))
)  # fmt: skip
ITL = Group(
    "inter_token_latency",
    "Inter-token latency",
    (Metric("itl_mean_s", "s", "mean of the same times", "no request got a second token"), *_gaps),
    """
    WITH spans AS (
      SELECT *, greatest(prompt_tokens, 1 + coalesce(max(computed_before + steps * tokens) OVER (
                  PARTITION BY engine_index, request ORDER BY first_step
                  ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)) AS least_tokens
      FROM step_spans JOIN (SELECT engine_index, request, prompt_tokens FROM requests) USING (engine_index, request)
      WHERE tokens > 0),
    runs AS (
      SELECT engine_index, request, first_step + steps - 1 AS last,
             first_step + greatest((least_tokens - computed_before - 1) // tokens, 0) AS first
      FROM spans WHERE computed_before + steps * tokens >= least_tokens),
    ends AS (SELECT engine_index, step, end_ns FROM steps WHERE end_ns IS NOT NULL),
    successive AS (
      SELECT engine_index, step, end_ns - lag(end_ns) OVER w AS gap_ns, step - lag(step) OVER w AS apart
      FROM ends WINDOW w AS (PARTITION BY engine_index ORDER BY step)),
    weights AS (
      SELECT engine_index, step, sum(sum(change)) OVER (PARTITION BY engine_index ORDER BY step) AS requests
      FROM (SELECT engine_index, first + 1 AS step, 1 AS change FROM runs WHERE last > first
            UNION ALL SELECT engine_index, last + 1, -1 FROM runs WHERE last > first)
      GROUP BY engine_index, step),
    within AS (
      SELECT s.engine_index, gap_ns, coalesce(requests, 0) AS many
      FROM successive s ASOF LEFT JOIN weights w ON s.engine_index = w.engine_index AND s.step >= w.step
      WHERE apart = 1),
    breaks AS (
      SELECT engine_index, first, lag(last) OVER (PARTITION BY engine_index, request ORDER BY first) AS before
      FROM runs),
    gaps AS (
      SELECT engine_index, gap_ns, sum(many) AS many FROM (
        SELECT * FROM within
        UNION ALL
        SELECT b.engine_index, f.end_ns - e.end_ns, 1
        FROM breaks b JOIN ends f ON f.engine_index = b.engine_index AND f.step = b.first
        JOIN ends e ON e.engine_index = b.engine_index AND e.step = b.before)
      GROUP BY engine_index, gap_ns HAVING sum(many) > 0),
    ranked AS (
      SELECT *, sum(many) OVER (PARTITION BY engine_index ORDER BY gap_ns) AS up_to,
             sum(many) OVER (PARTITION BY engine_index) AS total FROM gaps)
    SELECT engine_index, sum(gap_ns * many::DOUBLE) / any_value(total) / 1e9 AS itl_mean_s,
           min(gap_ns) FILTER (WHERE up_to >= 0.5 * total) / 1e9 AS itl_p50_s,
           min(gap_ns) FILTER (WHERE up_to >= 0.99 * total) / 1e9 AS itl_p99_s
    FROM ranked GROUP BY engine_index
    """,
    ("steps",),
)
