"""Forward passes: throughput, and how evenly they are loaded."""

from __future__ import annotations

from kvtrace.metrics.declare import Group, Metric, quantiles

_NO_TIME = "no time passed, or no output arrived"
_steps, _steps_sql = quantiles("duration_ns / 1e9", "step", "s", "the steps' durations", _NO_TIME)

THROUGHPUT = Group(
    "throughput",
    "Throughput",
    (
        Metric("steps", "steps", "scheduler calls that scheduled at least one token"),
        Metric("duration_s", "s", "from the begin of the first step to the last output", _NO_TIME),
        Metric("busy_ratio", "ratio", "durations of all steps / duration_s; a step lasts from the output before it, "
               "or its own begin where that is later, to its own output", _NO_TIME),
        Metric("scheduled_tokens", "tokens", "tokens scheduled in all steps"),
        Metric("prefill_tokens", "tokens", "scheduled tokens that lie in prompts"),
        Metric("decode_tokens", "tokens", "scheduled_tokens - prefill_tokens"),
        Metric("scheduled_tokens_per_s", "tokens/s", "scheduled_tokens / duration_s", _NO_TIME),
        Metric("prefill_tokens_per_s", "tokens/s", "prefill_tokens / duration_s", _NO_TIME),
        Metric("decode_tokens_per_s", "tokens/s", "decode_tokens / duration_s", _NO_TIME),
        Metric("prefill_step_tokens_per_s", "tokens/s", "tokens of the steps with any prefill / their durations",
               "no step had prefill"),
        Metric("decode_step_tokens_per_s", "tokens/s", "tokens of the steps without prefill / their durations",
               "every step had prefill"),
        *_steps,
    ),
    f"""
    WITH timed AS (SELECT * FROM steps JOIN step_phases USING (engine_index, step)),
    sums AS (
      SELECT engine_index, count(*) AS steps, (max(end_ns) - min(start_ns)) / 1e9 AS duration_s,
             sum(duration_ns) / 1e9 AS busy_s, sum(tokens) AS scheduled_tokens,
             sum(prefill_tokens) AS prefill_tokens, sum(decode_tokens) AS decode_tokens, {_steps_sql},
             sum(tokens) FILTER (WHERE prefill_tokens > 0 AND duration_ns IS NOT NULL)
               / nullif(sum(duration_ns) FILTER (WHERE prefill_tokens > 0) / 1e9, 0) AS prefill_step_tokens_per_s,
             sum(tokens) FILTER (WHERE prefill_tokens = 0 AND duration_ns IS NOT NULL)
               / nullif(sum(duration_ns) FILTER (WHERE prefill_tokens = 0) / 1e9, 0) AS decode_step_tokens_per_s
      FROM timed GROUP BY engine_index)
    SELECT *, busy_s / nullif(duration_s, 0) AS busy_ratio,
           scheduled_tokens / nullif(duration_s, 0) AS scheduled_tokens_per_s,
           prefill_tokens / nullif(duration_s, 0) AS prefill_tokens_per_s,
           decode_tokens / nullif(duration_s, 0) AS decode_tokens_per_s
    FROM sums
    """,
    ("steps",),
)  # fmt: skip

_NO_BUDGET = "the trace does not know the token budget of a step"
BALANCE = Group(
    "balance",
    "Balance of the forward passes",
    (
        Metric("step_tokens_mean", "tokens", "scheduled tokens / steps"),
        Metric("step_tokens_max", "tokens", "the most tokens in a step"),
        Metric("step_tokens_cv", "ratio", "standard deviation (population) of the tokens of a step / their mean"),
        Metric("step_tokens_max_over_mean", "ratio", "step_tokens_max / step_tokens_mean"),
        Metric("step_requests_mean", "requests", "mean number of requests scheduled in a step"),
        Metric("prefill_token_ratio", "ratio", "prefill tokens / scheduled tokens"),
        Metric("prefill_step_ratio", "ratio", "steps with prefill alone / steps"),
        Metric("decode_step_ratio", "ratio", "steps with decode alone / steps"),
        Metric("mixed_step_ratio", "ratio", "steps with both / steps"),
        Metric("unused_budget_ratio", "ratio", "1 - scheduled tokens / (steps * token budget of a step)", _NO_BUDGET),
        Metric("wasted_budget_ratio", "ratio", "as unused_budget_ratio, of the steps after which requests still waited",
               f"{_NO_BUDGET}, or nobody ever waited"),
    ),
    """
    SELECT engine_index, avg(tokens) AS step_tokens_mean, max(tokens) AS step_tokens_max,
           stddev_pop(tokens) / avg(tokens) AS step_tokens_cv, max(tokens) / avg(tokens) AS step_tokens_max_over_mean,
           avg(requests) AS step_requests_mean, sum(prefill_tokens) / sum(tokens) AS prefill_token_ratio,
           count(*) FILTER (WHERE decode_requests = 0) / count(*) AS prefill_step_ratio,
           count(*) FILTER (WHERE prefill_requests = 0) / count(*) AS decode_step_ratio,
           count(*) FILTER (WHERE prefill_requests > 0 AND decode_requests > 0) / count(*) AS mixed_step_ratio,
           1 - sum(tokens) / (count(*) * any_value(budget_tokens)) AS unused_budget_ratio,
           1 - sum(tokens) FILTER (WHERE waiting > 0)
             / nullif(count(*) FILTER (WHERE waiting > 0) * any_value(budget_tokens), 0) AS wasted_budget_ratio
    FROM steps JOIN step_phases USING (engine_index, step) JOIN engines USING (engine_index)
    GROUP BY engine_index
    """,
    ("steps",),
)  # fmt: skip
