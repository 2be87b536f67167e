"""What the cache's blocks held, and for how long."""

from __future__ import annotations

from kvtrace.metrics.declare import Group, Metric, powers_of_ten, quantiles

_UNSURE = "the tracer could not follow the engine exactly, or no block was ever used"
USE = Group(
    "cache_use",
    "Use of the cache (means over steps, after scheduling)",
    (
        Metric("capacity_blocks", "blocks", "usable blocks of the engine"),
        Metric("block_utilisation_mean", "ratio", "mean of blocks held by requests / capacity"),
        Metric("block_utilisation_max", "ratio", "the most of it"),
        Metric("slot_utilisation_mean", "ratio", "mean of token slots that really hold keys and values of running "
               "requests / all slots (capacity * block size)", _UNSURE),
        Metric("slot_utilisation_max", "ratio", "the most of it", _UNSURE),
        Metric("fragmentation_ratio", "ratio", "internal fragmentation: slots of used blocks without a token / slots "
               "of used blocks, each summed over steps", _UNSURE),
        Metric("cached_idle_ratio", "ratio", "mean of blocks that are cached and held by none / capacity"),
        Metric("free_ratio", "ratio", "mean of empty blocks / capacity"),
        Metric("sharing_degree", "ratio", "block table entries of all requests / blocks used, each summed over steps",
               "no block was ever used"),
    ),
    """
    SELECT engine_index, any_value(capacity_blocks) AS capacity_blocks,
           avg(used / capacity_blocks) AS block_utilisation_mean, max(used / capacity_blocks) AS block_utilisation_max,
           avg(used_tokens / (capacity_blocks * block_size)) AS slot_utilisation_mean,
           max(used_tokens / (capacity_blocks * block_size)) AS slot_utilisation_max,
           sum(wasted_slots) / nullif(sum(wasted_slots + used_tokens), 0) AS fragmentation_ratio,
           avg(cached_idle / capacity_blocks) AS cached_idle_ratio, avg(free / capacity_blocks) AS free_ratio,
           sum(holds) / nullif(sum(used), 0) AS sharing_degree
    FROM occupancy JOIN engines USING (engine_index) GROUP BY engine_index
    """,
    ("steps", "capacity"),
)  # fmt: skip

USE_OVER_TIME = Group(
    "cache_use_over_time",
    "Use of the cache over time",
    (
        Metric("block_utilisation", "ratio", "mean of used blocks / capacity over the steps begun in this tenth"),
        Metric("slot_utilisation", "ratio", "mean of used token slots / all slots over them", _UNSURE),
    ),
    """
    WITH bounds AS (SELECT engine_index, min(start_ns) AS first_ns, max(start_ns) + 1 AS past_ns
                    FROM steps GROUP BY engine_index),
    placed AS (SELECT *, ((start_ns - first_ns) * 10::HUGEINT // (past_ns - first_ns))::INTEGER AS tenth
               FROM occupancy JOIN bounds USING (engine_index) JOIN engines USING (engine_index))
    SELECT engine_index, tenth::VARCHAR AS at, avg(used / capacity_blocks) AS block_utilisation,
           avg(used_tokens / (capacity_blocks * block_size)) AS slot_utilisation
    FROM placed GROUP BY engine_index, tenth ORDER BY engine_index, tenth
    """,
    ("steps", "capacity"),
    "tenth of the time, from 0",
)  # fmt: skip

_none = "no block was evicted"
_lives, _lives_sql = quantiles("lifetime_ns / 1e9", "lifetime", "s", "the times from fill to eviction", _none)
_idles, _idles_sql = quantiles(
    "idle_ns / 1e9", "idle", "s", "the times from the last request's letting go to eviction", _none
)
LIFETIMES = Group(
    "lifetimes",
    "Lifetimes of cached blocks",
    (
        Metric("fills", "blocks", "blocks that became cached"),
        Metric("evictions", "blocks", "blocks whose identity was forgotten, for any reason"),
        *_lives,
        *_idles,
        Metric("unused_fill_ratio", "ratio", "fills that no request ever hit / fills: caching them did not pay"),
        Metric("uses_per_fill", "ratio", "hits / fills"),
    ),
    f"""
    SELECT engine_index, count(*) AS fills, count(evict_ns) AS evictions, {_lives_sql}, {_idles_sql},
           count(*) FILTER (WHERE uses = 0) / count(*) AS unused_fill_ratio, sum(uses) / count(*) AS uses_per_fill
    FROM block_lifetimes GROUP BY engine_index
    """,
    ("fills",),
)

SPREAD = Group(
    "lifetimes_spread",
    "Lifetimes of cached blocks, and how long they lay idle at the end",
    (
        Metric("lifetimes_of_time", "blocks", "blocks evicted after such a time from their fill on"),
        Metric("idle_of_time", "blocks", "blocks evicted after such a time from the last request's letting go on"),
    ),
    f"""
    WITH times AS (
      SELECT engine_index, lifetime_ns AS time_ns, 1 AS lifetimes, 0 AS idle FROM block_lifetimes
      UNION ALL SELECT engine_index, idle_ns, 0, 1 FROM block_lifetimes)
    SELECT engine_index, {powers_of_ten("time_ns")} AS at, sum(lifetimes) AS lifetimes_of_time,
           sum(idle) AS idle_of_time
    FROM times WHERE time_ns IS NOT NULL GROUP BY engine_index, "at" ORDER BY engine_index, min(time_ns)
    """,
    ("fills",),
    "decade of times",
)
