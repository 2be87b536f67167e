"""What lookups found, and why not more."""

from __future__ import annotations

from kvtrace.metrics.declare import Group, Metric, powers_of_two

HITS = Group(
    "hits",
    "Hits",
    (
        Metric("lookups", "lookups", "prefix-cache lookups of admitted requests"),
        Metric("token_hit_ratio", "ratio", "tokens found / tokens asked, at the requests' first admissions"),
        Metric("block_hit_ratio", "ratio", "full blocks found / full blocks asked, at the first admissions",
               "no request asked for a full block"),
        Metric("token_hit_ratio_all", "ratio", "tokens found / tokens asked, lookups after preemptions included"),
        Metric("request_hit_ratio", "ratio", "first admissions that found something / first admissions"),
        Metric("request_hit_ratio_p50", "ratio", "median of tokens found / tokens asked, request by request"),
        Metric("cold_miss_ratio", "ratio", "tokens never cached before / tokens asked in all lookups; so the next"),
        Metric("capacity_miss_ratio", "ratio", "tokens whose block had been cached in an earlier step, but was "
               "evicted, or lies behind such a one / tokens asked"),
        Metric("preemption_miss_ratio", "ratio", "tokens that the request had computed itself, and lost by preemption "
               "/ tokens asked"),
        Metric("short_miss_ratio", "ratio", "tokens behind the last block that a lookup may find (too few for a block, "
               "or the last token, which must be computed) / tokens asked"),
        Metric("unread_miss_ratio", "ratio", "tokens of requests that asked not to read the cache / tokens asked"),
    ),
    """
    SELECT engine_index, count(*) AS lookups,
           sum(tokens_hit) FILTER (WHERE NOT after_preemption)
             / nullif(sum(tokens_asked) FILTER (WHERE NOT after_preemption), 0) AS token_hit_ratio,
           sum(tokens_hit // block_size) FILTER (WHERE NOT after_preemption)
             / nullif(sum(tokens_asked // block_size) FILTER (WHERE NOT after_preemption), 0) AS block_hit_ratio,
           sum(tokens_hit) / sum(tokens_asked) AS token_hit_ratio_all,
           count(*) FILTER (WHERE NOT after_preemption AND tokens_hit > 0)
             / nullif(count(*) FILTER (WHERE NOT after_preemption), 0) AS request_hit_ratio,
           quantile_cont(tokens_hit / tokens_asked, 0.5) FILTER (WHERE NOT after_preemption) AS request_hit_ratio_p50,
           sum(cold_tokens) / sum(tokens_asked) AS cold_miss_ratio,
           sum(capacity_tokens) / sum(tokens_asked) AS capacity_miss_ratio,
           sum(preemption_tokens) / sum(tokens_asked) AS preemption_miss_ratio,
           sum(short_tokens) / sum(tokens_asked) AS short_miss_ratio,
           sum(unread_tokens) / sum(tokens_asked) AS unread_miss_ratio
    FROM misses JOIN engines USING (engine_index) GROUP BY engine_index
    """,
    ("lookups",),
)  # fmt: skip

HITS_BY_DEPTH = Group(
    "hits_by_depth",
    "Hits by depth in the prompt",
    (
        Metric("block_lookups_at_depth", "blocks", "full blocks at these places of prompts, at first admissions"),
        Metric("block_hit_ratio_at_depth", "ratio", "those found / all of them"),
    ),
    f"""
    WITH asked AS (
      SELECT engine_index, tokens_hit // block_size AS found, tokens_asked // block_size AS places
      FROM lookups JOIN engines USING (engine_index) WHERE NOT after_preemption AND tokens_asked >= block_size),
    ranges AS (  -- from 2^k - 1 on, as many as that and one more: not place by place, which are many
      SELECT *, (1::BIGINT << k) - 1 AS low, (2::BIGINT << k) - 1 AS past
      FROM (SELECT *, unnest(range(floor(log2(places))::BIGINT + 2)) AS k FROM asked))
    SELECT engine_index, {powers_of_two("k")} AS at, sum(least(places, past) - low)::BIGINT AS block_lookups_at_depth,
           sum(greatest(least(found, past), low) - low) / sum(least(places, past) - low) AS block_hit_ratio_at_depth
    FROM ranges WHERE low < places GROUP BY engine_index, k ORDER BY engine_index, k
    """,
    ("lookups",),
    "places of blocks, from 0",
)  # fmt: skip

HITS_OVER_TIME = Group(
    "hits_over_time",
    "Hits over time",
    (Metric("token_hit_ratio_at_time", "ratio", "tokens found / tokens asked, at first admissions in this tenth"),),
    """
    WITH bounds AS (SELECT engine_index, min(start_ns) AS first_ns, max(start_ns) + 1 AS past_ns
                    FROM steps GROUP BY engine_index),
    placed AS (SELECT *, ((start_ns - first_ns) * 10::HUGEINT // (past_ns - first_ns))::INTEGER AS tenth
               FROM lookups JOIN steps USING (engine_index, step) JOIN bounds USING (engine_index)
               WHERE NOT after_preemption)
    SELECT engine_index, tenth::VARCHAR AS at, sum(tokens_hit) / nullif(sum(tokens_asked), 0) AS token_hit_ratio_at_time
    FROM placed GROUP BY engine_index, tenth ORDER BY engine_index, tenth
    """,
    ("lookups",),
    "tenth of the time, from 0",
)

# Engines know nothing of conversations; what they log of a chat tells its turns by the blocks that hold answers.
HITS_BY_TURN = Group(
    "hits_by_turn",
    "Hits by turn of the conversation, as far as blocks tell",
    (
        Metric("requests_at_turn", "requests", "first admissions of requests of this turn: 1 more than the number of "
               "earlier requests whose last block, with output in it, lies in the prompt (an answer too short to end "
               "a block does not count)"),
        Metric("token_hit_ratio_at_turn", "ratio", "tokens found / tokens asked, at their first admissions"),
    ),
    """
    WITH answers AS (
      SELECT engine_index, max_by(identity, position) AS identity, request AS answered
      FROM request_blocks GROUP BY engine_index, request HAVING NOT max_by(in_prompt, position)),
    heard AS (
      SELECT engine_index, request, count(DISTINCT identity) AS turns
      FROM request_blocks JOIN answers USING (engine_index, identity)
      WHERE in_prompt AND answered < request GROUP BY engine_index, request),
    asked AS (
      SELECT engine_index, coalesce(turns, 0) + 1 AS turn, tokens_asked, tokens_hit
      FROM lookups LEFT JOIN heard USING (engine_index, request) WHERE NOT after_preemption)
    SELECT engine_index, turn::VARCHAR AS at, count(*) AS requests_at_turn,
           sum(tokens_hit) / nullif(sum(tokens_asked), 0) AS token_hit_ratio_at_turn
    FROM asked GROUP BY engine_index, turn ORDER BY engine_index, turn
    """,
    ("lookups",),
    "turn, from 1",
)  # fmt: skip

COST = Group(
    "lookup_cost",
    "Cost of lookups",
    (
        Metric("probes_per_lookup", "probes", "mean of identities looked for in a lookup: the blocks found, and the "
               "first one missing if there is one (vLLM 0.32.0, `find_longest_cache_hit`)"),
        Metric("probes_max", "probes", "the most of them"),
        Metric("cached_blocks_mean", "blocks", "mean of blocks cached when a lookup's step began"),
        Metric("probes_cached_correlation", "ratio", "Pearson's correlation of the probes of a lookup and the blocks "
               "cached then: near 0 if a lookup costs the same in a large cache", "one of the two never varied"),
    ),
    """
    WITH changes AS (
      SELECT engine_index, coalesce(fill_ns, -(2::BIGINT ** 62)::BIGINT) AS time_ns, 1 AS change FROM block_lifetimes
      UNION ALL SELECT engine_index, evict_ns, -1 FROM block_lifetimes WHERE evict_ns IS NOT NULL),
    levels AS (
      SELECT engine_index, time_ns, sum(sum(change)) OVER w AS cached
      FROM changes GROUP BY engine_index, time_ns
      WINDOW w AS (PARTITION BY engine_index ORDER BY time_ns ROWS UNBOUNDED PRECEDING)),
    probed AS (
      SELECT engine_index, start_ns,
             tokens_hit // block_size
               + (tokens_hit // block_size < greatest(tokens_asked - 1, 0) // block_size)::INTEGER AS probes
      FROM lookups JOIN steps USING (engine_index, step) JOIN engines USING (engine_index)),
    met AS (
      SELECT p.*, coalesce(cached, 0)::BIGINT AS cached
      FROM probed p ASOF LEFT JOIN levels l ON p.engine_index = l.engine_index AND p.start_ns > l.time_ns)
    SELECT engine_index, avg(probes) AS probes_per_lookup, max(probes) AS probes_max,
           avg(cached) AS cached_blocks_mean,
           CASE WHEN min(probes) < max(probes) AND min(cached) < max(cached) THEN corr(probes, cached) END
             AS probes_cached_correlation
    FROM met GROUP BY engine_index
    """,
    ("lookups",),
)  # fmt: skip
