"""What the requests could share, whatever the cache: open loop, and so known of imports too."""

from __future__ import annotations

from kvtrace.metrics.declare import Group, Metric, power_of_two, powers_of_ten, powers_of_two, quantiles

_none = "no block was used twice"
_distances, _distances_sql = quantiles("distance_blocks", "reuse_distance", "blocks", "reuse distances: distinct "
                                       "other blocks used between two uses of a block", _none)  # fmt: skip
_times, _times_sql = quantiles(
    "reuse_ns / 1e9", "reuse_time", "s", "times between two uses of a block", f"{_none}, or the trace has no times"
)
REUSE = Group(
    "reuse",
    "Reuse (a request uses every block of its chain once)",
    (
        Metric("block_uses", "blocks", "uses of blocks by requests, output included"),
        Metric("unique_blocks", "blocks", "distinct blocks among them"),
        Metric("reused_block_ratio", "ratio", "uses of a block used before / block_uses: the hits of an endless cache"),
        Metric("uses_per_block", "ratio", "block_uses / unique_blocks"),
        Metric("single_use_block_ratio", "ratio", "blocks used once / unique_blocks: caching them can never pay"),
        *_distances,
        *_times,
        Metric("unique_blocks_over_capacity", "ratio", "unique_blocks / usable blocks of the engine",
               "the trace does not know the size of the cache"),
    ),
    f"""
    WITH counted AS (
      SELECT engine_index, count(*) AS block_uses, count(*) FILTER (WHERE nth_use = 1) AS unique_blocks,
             unique_blocks - count(*) FILTER (WHERE nth_use = 2) AS single FROM reuse GROUP BY engine_index),
    spread AS (SELECT engine_index, {_distances_sql}, {_times_sql} FROM reuse GROUP BY engine_index)
    SELECT *, 1 - unique_blocks / block_uses AS reused_block_ratio, block_uses / unique_blocks AS uses_per_block,
           single / unique_blocks AS single_use_block_ratio,
           unique_blocks / capacity_blocks AS unique_blocks_over_capacity
    FROM counted JOIN spread USING (engine_index) JOIN engines USING (engine_index)
    """,
    ("chains",),
)  # fmt: skip

DISTANCES = Group(
    "reuse_distances",
    "Reuse distances",
    (
        Metric("reuses_at_distance", "blocks", "uses of a block used before, at such a distance"),
        Metric("reuses_up_to_distance_ratio", "ratio", "those, and those at smaller ones / all of them"),
    ),
    f"""
    WITH counted AS (
      SELECT engine_index, {power_of_two("distance_blocks")} AS place, count(*) AS uses
      FROM reuse WHERE distance_blocks IS NOT NULL GROUP BY engine_index, place)
    SELECT engine_index, {powers_of_two("place")} AS at, uses AS reuses_at_distance,
           sum(uses) OVER (PARTITION BY engine_index ORDER BY place)
             / sum(uses) OVER (PARTITION BY engine_index) AS reuses_up_to_distance_ratio
    FROM counted ORDER BY engine_index, place
    """,
    ("chains",),
    "range of distances in blocks",
)

TIMES = Group(
    "reuse_times",
    "Reuse times",
    (
        Metric("reuses_after_time", "blocks", "uses of a block used before, after such a time"),
        Metric("reuses_up_to_time_ratio", "ratio", "those, and those after shorter ones / all of them"),
    ),
    f"""
    SELECT engine_index, {powers_of_ten("reuse_ns")} AS at, count(*) AS reuses_after_time,
           sum(count(*)) OVER (PARTITION BY engine_index ORDER BY min(reuse_ns))
             / sum(count(*)) OVER (PARTITION BY engine_index) AS reuses_up_to_time_ratio
    FROM reuse WHERE reuse_ns IS NOT NULL GROUP BY engine_index, "at" ORDER BY engine_index, min(reuse_ns)
    """,
    ("chains",),
    "decade of times",
)

WORKING_SET = Group(
    "working_set",
    "Working set (the time of the uses, cut into tenths)",
    (
        Metric("working_set_max_blocks", "blocks", "the most distinct blocks used in a tenth of the time"),
        Metric("working_set_mean_blocks", "blocks", "mean of the distinct blocks used in a tenth"),
        Metric("working_set_over_capacity", "ratio", "working_set_max_blocks / usable blocks of the engine",
               "the trace does not know the size of the cache"),
    ),
    """
    WITH bounds AS (SELECT engine_index, min(time_ns) AS first_ns, max(time_ns) + 1 AS past_ns
                    FROM reuse GROUP BY engine_index HAVING min(time_ns) IS NOT NULL),
    sets AS (SELECT engine_index, ((time_ns - first_ns) * 10::HUGEINT // (past_ns - first_ns))::INTEGER AS tenth,
                    count(DISTINCT identity) AS blocks
             FROM reuse JOIN bounds USING (engine_index) GROUP BY ALL)
    SELECT engine_index, max(blocks) AS working_set_max_blocks, sum(blocks) / 10 AS working_set_mean_blocks,
           max(blocks) / any_value(capacity_blocks) AS working_set_over_capacity
    FROM sets JOIN engines USING (engine_index) GROUP BY engine_index
    """,
    ("chains",),
)  # fmt: skip

HOT = Group(
    "hot_prefixes",
    "Hot prefixes (nodes of the radix tree that save most tokens)",
    (
        Metric("hot_prefix_requests", "requests", "requests that go through the node"),
        Metric("hot_prefix_tokens", "tokens", "tokens in the node"),
        Metric("hot_prefix_saved_tokens", "tokens", "(requests - 1) * tokens: what keeping it can save"),
        Metric("hot_prefix_bytes", "bytes", "keys and values of its blocks", "the trace does not know a block's bytes"),
    ),
    """
    SELECT engine_index, 'identity ' || node AS at, requests AS hot_prefix_requests, tokens AS hot_prefix_tokens,
           (requests - 1) * tokens AS hot_prefix_saved_tokens, bytes AS hot_prefix_bytes
    FROM prefixes
    QUALIFY row_number() OVER (PARTITION BY engine_index ORDER BY (requests - 1) * tokens DESC, node) <= 5
    ORDER BY engine_index, hot_prefix_saved_tokens DESC, node
    """,
    ("chains",),
    "node: the identity of its last block",
)

# Needs a column that only some imports have: see `stats`.
BY_TURN = Group(
    "reuse_by_turn",
    "Reuse by turn of the conversation",
    (Metric("reused_block_ratio_at_turn", "ratio", "uses of a block used before / uses, of requests of this turn"),),
    """
    SELECT engine_index, turn::VARCHAR AS at, count(distance_blocks) / count(*) AS reused_block_ratio_at_turn
    FROM reuse JOIN requests USING (engine_index, request) WHERE turn IS NOT NULL
    GROUP BY engine_index, turn ORDER BY engine_index, turn
    """,
    ("turns",),
    "turn, as the file counts",
)
