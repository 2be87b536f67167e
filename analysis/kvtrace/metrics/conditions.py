"""Conditions on metrics, for pipelines: `kvtrace stats --fail-if`."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import polars as pl

from kvtrace.metrics.collect import GROUPS
from kvtrace_traces.errors import UsageError


class Condition(NamedTuple):
    """`metric` compared with `limit` by `sign`; `text` as the user wrote it."""

    text: str
    metric: str
    sign: str
    limit: float


_SIGNS = {
    "<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__, "==": float.__eq__,
    "!=": float.__ne__,
}  # fmt: skip


def condition(text: str) -> Condition:
    """`token_hit_ratio<0.4`, also with `40%`. Raises UsageError for anything else, naming metrics that come near."""
    match = re.fullmatch(
        r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(%?)\s*", text, re.I
    )
    if match is None:
        raise UsageError(f"{text!r} is no condition: write METRIC, one of {' '.join(_SIGNS)}, and a number")
    name, sign, number, percent = match.groups()
    names = [metric.name for group in GROUPS for metric in group.metrics if not group.at]
    if name not in names:
        parts = [metric.name for group in GROUPS if group.at for metric in group.metrics]
        if name in parts:
            raise UsageError(f"{name} has a value for each of several parts: conditions are on metrics with one value")
        near = difflib.get_close_matches(name, names, 3, 0.5) or [other for other in names if name in other][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "`kvtrace stats` lists them"
        raise UsageError(f"there is no metric {name!r}: {hint}")
    return Condition(text.strip(), name, sign, float(number) / (100 if percent else 1))


def failures(frame: pl.DataFrame, conditions: list[Condition]) -> list[str]:
    """What to say of the conditions that hold in a frame of `stats`, or cannot be told; one line for each engine."""
    engines = frame["engine_index"].n_unique()
    lines = []
    for each in conditions:
        for row in frame.filter(pl.col("metric") == each.metric).iter_rows(named=True):
            whose = f" (engine {row['engine_index']})" if engines > 1 else ""
            if row["value"] is None:
                lines.append(f"{each.text}: {each.metric} is not known{whose}: {row['why']}")
            elif _SIGNS[each.sign](row["value"], each.limit):
                lines.append(f"{each.text}: {each.metric} is {row['value']:.6g}{whose}")
    return lines
