"""What a metric is, and how a group of them is declared."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A figure: its name, its unit, its formula in words, and what to say where it has no value.

    `name` is a column of its group's SQL.
    """

    name: str
    unit: str
    formula: str
    none: str = "there is nothing to count"


class Group(NamedTuple):
    """Metrics that one query finds.

    `sql` gives a row per engine, with `engine_index` and a column per metric; where `at` says what varies, also a
    column `at` (text) and a row per value of it, in order. `needs` names what the trace must hold (keys of MISSING);
    without it the metrics are null.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    sql: str
    needs: tuple[str, ...] = ()
    at: str = ""


# What a trace may lack: a query that is true where an engine has it, and what is said where not.
MISSING = {
    "steps": (
        "SELECT DISTINCT engine_index FROM steps",
        "the trace has no steps: imports tell of requests only",
    ),
    "lookups": (
        "SELECT DISTINCT engine_index FROM lookups",
        "no engine looked anything up: imports, and engines without prefix caching",
    ),
    "fills": (
        "SELECT DISTINCT engine_index FROM block_lifetimes",
        "no block was ever cached: imports, and engines without prefix caching",
    ),
    "capacity": (
        "SELECT engine_index FROM engines WHERE capacity_blocks IS NOT NULL",
        "the trace does not know the size of the cache",
    ),
    "chains": ("SELECT DISTINCT engine_index FROM prefixes", "no request has a whole block"),
    "scheduled": (
        "SELECT DISTINCT engine_index FROM requests WHERE first_step IS NOT NULL",
        "no request was scheduled: imports tell of requests only",
    ),
}


def quantiles(column: str, name: str, unit: str, doc: str, none: str) -> tuple[tuple[Metric, ...], str]:
    """Metrics for the median and the 99th percentile of a column, and their SQL."""
    metrics = (
        Metric(f"{name}_p50_{unit}", unit, f"median of {doc}", none),
        Metric(f"{name}_p99_{unit}", unit, f"99th percentile of {doc}", none),
    )
    # Both of one list: every quantile with a place of its own keeps all values once more.
    both = f"quantile_cont({column}, [0.5, 0.99])"
    parts = [f"{both}[{i}] AS {name}_p{n}_{unit}" for i, n in ((1, 50), (2, 99))]
    return metrics, ", ".join(parts)


def power_of_two(number: str) -> str:
    """SQL for the place of the range that a whole number falls into: 0 for 0, 1 for 1-2, 2 for 3-6 and so on."""
    return f"floor(log2({number} + 1))::INTEGER"


def powers_of_two(place: str) -> str:
    """SQL for the name of that range: `0`, `1-2`, `3-6`, `7-14` and so on."""
    low = f"(1::BIGINT << {place})"
    return f"CASE WHEN {place} = 0 THEN '0' ELSE ({low} - 1) || '-' || (2 * {low} - 2) END"


def powers_of_ten(time_ns: str) -> str:
    """SQL for the decade that a time falls into, by its lower bound: `from 10 ms`; below 10 ns from 0."""
    bounds = ["0", *(f"{10**i} {unit}" for unit in ("ns", "us", "ms", "s") for i in range(3))]
    bounds.remove("1 ns")
    names = ", ".join(f"'from {bound}'" for bound in [*bounds, *(f"{10**i} s" for i in range(3, 10))])
    return f"list_extract([{names}], length(greatest({time_ns}, 0)::VARCHAR)::INTEGER)"
