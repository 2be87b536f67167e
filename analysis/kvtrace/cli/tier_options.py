"""`kvtrace replay --tier ...`: the options of a cache in tiers, and what the command does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvtrace.cli.output import Output, in_place_of
from kvtrace.cli.traces import exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from kvtrace.api import Trace

F = TypeVar("F", bound=Callable[..., Any])

SHOWN = (
    "trace", "engine_index", "semantics", "block_size", "tier", "policy", "capacity_blocks", "block_hits",
    "block_hit_ratio", "token_hits", "token_hit_ratio", "blocks_up", "blocks_down", "bytes_up", "bytes_down",
    "evictions", "seconds_saved",
)  # fmt: skip
IF_VARIED = {"trace", "engine_index", "semantics", "block_size"}
IF_KNOWN = {"bytes_up", "bytes_down", "seconds_saved"}


@dataclass(frozen=True)
class Tiers:
    """The tiers that were given, at least one, as texts."""

    texts: tuple[str, ...]
    bytes_per_token: float | None = None
    prefill_tokens_per_s: float | None = None

    def run(
        self,
        paths: Sequence[Path],
        policies: list[str],
        capacities: list[str] | None,
        block_sizes: list[int] | None,
        semantics: list[str],
        warmup: float,
        output: Output,
    ) -> int:
        """What `kvtrace replay` does when it is given tiers; the arguments are its other options."""
        import polars as pl

        from kvtrace.people import Style, capacity, seconds, size
        from kvtrace.sql import distinct_names
        from kvtrace.tiers import replay_tiers

        if capacities:
            raise UsageError(
                "--capacity and --tier exclude each other: a tier's capacity is the 20k of --tier dram:20k"
            )
        if len(policies) > 1:
            raise UsageError(
                "several policies cannot share one --tier: give each tier its own, as in --tier dram:20k:policy=fifo"
            )
        traces = open_traces(paths)
        frames = []
        for trace, name in zip(traces, distinct_names([trace.path for trace in traces]), strict=True):
            frame = replay_tiers(
                trace,
                self.texts,
                policies[0],
                block_sizes,
                semantics,
                warmup,
                self.bytes_per_token,
                self.prefill_tokens_per_s,
            )
            several = len(traces) > 1
            frames.append(frame.select(pl.lit(name).alias("trace"), pl.all()) if several else frame)
            output.facts(*facts(trace, frame, f"{name}: " if several else ""))
        rows = pl.concat(frames, how="diagonal_relaxed")
        shown = [name for name in SHOWN if name in rows.columns and _tells(rows, name)]
        cells = {"capacity_blocks": capacity, "bytes_up": size, "bytes_down": size, "seconds_saved": seconds}
        output.table(rows, Style(columns=shown, cells=cells))
        return exit_code(traces)


def _tells(rows: pl.DataFrame, name: str) -> bool:
    if name in IF_KNOWN:
        return rows[name].null_count() < rows.height
    return name not in IF_VARIED or rows[name].n_unique() > 1


def facts(trace: Trace, rows: pl.DataFrame, lead: str) -> list[str]:
    """What the ratios are shares of, and how each tier is filled."""
    bases = rows.select("semantics", "block_size", "requests", "block_lookups", "token_lookups").unique(
        maintain_order=True
    )
    lines = [
        f"{lead}open loop, {base['semantics']} semantics, {base['block_size']} tokens a block; ratios are shares "
        f"of {base['block_lookups']:,} blocks and {base['token_lookups']:,} tokens looked up by "
        f"{base['requests']:,} requests"
        for base in bases.iter_rows(named=True)
    ]
    for row in rows.filter(rows["level"] > 0).unique("tier", maintain_order=True).iter_rows(named=True):
        stored = "stored when used in the top tier" if row["write"] == "through" else "stored when evicted above"
        after = f", from use {row['uses']} on" if row["uses"] > 1 else ""
        hit = "a hit moves up" if row["promote"] else "a hit is read in place"
        lines.append(f"{lead}{row['tier']}: {row['mode']}, {stored}{after}; {hit}")
    return lines + [f"{lead}{why}" for why in rows["why"].drop_nulls().unique(maintain_order=True)]


def tier_options(function: F) -> F:
    """Add --tier and its companions; the command receives them as `tiers: Tiers | None`."""

    @click.option("--tier", "texts", multiple=True, metavar="NAME:CAPACITY[:KEY=VALUE,...]",
                  help="A tier of the cache, in place of --capacity; up to 4, the fastest first. Keys: policy, "
                       "write=through|demote, mode=nine|exclusive|inclusive, uses=N, promote=yes|no, "
                       "bandwidth=25GB/s.")  # fmt: skip
    @click.option("--bytes-per-token", type=float, metavar="N",
                  help="With --tier: bytes of keys and values in a token. Default: the trace's own.")  # fmt: skip
    @click.option("--prefill-tokens-per-s", type=float, metavar="N",
                  help="With --tier: tokens recomputed in a second, to tell the time that hits save.")  # fmt: skip
    def wrapped(
        *args: Any,
        texts: tuple[str, ...],
        bytes_per_token: float | None,
        prefill_tokens_per_s: float | None,
        **rest: Any,
    ) -> Any:
        if not texts and (bytes_per_token is not None or prefill_tokens_per_s is not None):
            raise UsageError("--bytes-per-token and --prefill-tokens-per-s need a --tier, as in --tier hbm:2000")
        tiers = Tiers(texts, bytes_per_token, prefill_tokens_per_s) if texts else None
        return function(*args, tiers=tiers, **rest)

    return in_place_of(function, wrapped)
