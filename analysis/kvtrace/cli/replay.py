"""`kvtrace replay`: what would caches of other sizes and policies have found?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, output_options, refuse_to_overwrite, table_suffix, write_table
from kvtrace.cli.tier_options import Tiers, tier_options
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from kvtrace.api import Trace

# What people see; a column that never varies is left out, and said in the line of facts where it matters.
SHOWN = (
    "trace", "engine_index", "semantics", "block_size", "policy", "capacity_blocks", "block_hits",
    "block_hit_ratio", "token_hits", "token_hit_ratio", "evictions", "seconds",
)  # fmt: skip
IF_VARIED = {"trace", "engine_index", "semantics", "block_size"}


class Policies(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A list of policies, in which a comma may also stand between the parameters of one of them."""

    name = "list"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        items: list[str] = []
        for text in filter(None, (part.strip() for part in str(value).split(","))):
            if items and "=" in text and ":" not in text and ":" in items[-1]:
                items[-1] += f",{text}"
            else:
                items.append(text)
        if not items:
            self.fail("the list is empty", param, ctx)
        return items


class Items(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A list with commas between its items."""

    name = "list"

    def __init__(self, item: type = str) -> None:
        self.item = item

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[object]:
        items = [text.strip() for text in str(value).split(",") if text.strip()]
        if not items:
            self.fail("the list is empty", param, ctx)
        try:
            return [self.item(text) for text in items]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers", param, ctx)


@click.command(
    "replay",
    epilog=examples(
        "kvtrace replay traces/samples/thrash.kvt --policy lru,fifo,opt --capacity 25%,50%,inf",
        "kvtrace replay traces/samples/thrash.kvt --tier hbm:100 --tier dram:400:write=demote --json",
    ),
)
@click.argument("paths", nargs=-1, required=True, type=TRACE, metavar="TRACE...")
@click.option("--policy", "policies", type=Policies(), default="lru", show_default=True, metavar="A,B",
              help="Eviction policies, as in lru,s3fifo:small=0.2; `kvtrace policies` lists them. FILE.py:CLASS is one "
                   "of your own.")  # fmt: skip
@click.option("--capacity", "capacities", type=Items(), metavar="A,B",
              help="Blocks (1000, 10k), 50% of the distinct ones, 65536tok, 8GiB or inf. "
                   "Default: the run's own, and inf.")  # fmt: skip
@click.option("--block-size", "block_sizes", type=Items(int), metavar="A,B",
              help="Tokens in a block, multiples of the granule. Default: the trace's own.")  # fmt: skip
@click.option("--semantics", type=Items(), default="prefix", show_default=True, metavar="A,B",
              help="prefix, radix (only leaves are evicted) or object (every block reference by itself).")  # fmt: skip
@click.option("--warmup", type=float, default=0.0, show_default=True, metavar="SHARE",
              help="Share of the requests that fill the cache before anything is counted.")  # fmt: skip
@click.option("--per-request", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write each request's hits to a table, .csv .parquet or .json.")  # fmt: skip
@tier_options
@output_options
def command(
    paths: tuple[Path, ...],
    policies: list[str],
    capacities: list[str] | None,
    block_sizes: list[int] | None,
    semantics: list[str],
    warmup: float,
    per_request: Path | None,
    tiers: Tiers | None,
    output: Output,
) -> int:
    """Replay a trace's lookups in caches of other sizes and policies.

    Open loop: the recorded lookups are given, only the cache varies.
    """
    import polars as pl

    import kvtrace
    from kvtrace.people import Style, capacity

    if block_sizes and min(block_sizes) < 1:
        raise UsageError("a block has at least one token")
    if per_request is not None:
        table_suffix(per_request)
        refuse_to_overwrite(per_request, output.force)
    if tiers is not None:
        if per_request is not None:
            raise UsageError("--per-request and --tier exclude each other")
        return tiers.run(paths, policies, capacities, block_sizes, semantics, warmup, output)
    traces = open_traces(paths, as_they_are=True)
    names = _names(traces)
    frames: list[pl.DataFrame] = []
    requests: list[pl.DataFrame] = []
    for trace, name in zip(traces, names, strict=True):
        cells: list[pl.DataFrame] | None = None if per_request is None else []
        frame = kvtrace.replay(trace, policies, capacities, block_sizes or [None], semantics, warmup, per_request=cells)
        requests += [cell.select(pl.lit(name).alias("trace"), pl.all()) for cell in cells or ()]
        frames.append(frame if len(traces) == 1 else frame.select(pl.lit(name).alias("trace"), pl.all()))
        output.facts(*facts(trace, frame, name if len(traces) > 1 else "", warmup))
    if per_request is not None:
        if not requests:
            raise UsageError("--per-request: no cell of the grid could be run")
        write_table(pl.concat(requests), per_request, output.force)
    rows = pl.concat(frames, how="diagonal_relaxed")
    shown = [name for name in SHOWN if name in rows.columns and _tells(rows, name)]
    output.table(rows, Style(columns=shown, cells={"capacity_blocks": capacity}))
    return exit_code(traces)


def _names(traces: list[Trace]) -> list[str]:
    if len(traces) == 1:  # it is not shown
        return [""]
    from kvtrace.sql import distinct_names

    return distinct_names([trace.path for trace in traces])


def _waste(base: dict[str, Any]) -> str:
    from kvtrace.people import percent

    if base["fragmentation"] is None:
        return ""
    return f"; {percent(base['fragmentation'])} of the slots of their blocks stay empty, in last blocks"


def _tells(rows: pl.DataFrame, name: str) -> bool:
    return name not in IF_VARIED or rows[name].n_unique() > 1


def facts(trace: Trace, rows: pl.DataFrame, name: str, warmup: float = 0.0) -> list[str]:
    """What the ratios are shares of, and what the engine itself found beside an LRU cache of its size."""
    from kvtrace import metrics
    from kvtrace.people import percent
    from kvtrace.replays import replay_engine

    lead = f"{name}: " if name else ""
    bases = rows.select(
        "semantics", "block_size", "requests", "block_lookups", "token_lookups", "empty_slots", "fragmentation"
    ).unique(maintain_order=True)
    after = f" after a warm-up of {percent(warmup)} of them" if warmup else ""
    lines = [
        f"{lead}open loop, {base['semantics']} semantics, {base['block_size']} tokens a block; ratios are shares "
        f"of {base['block_lookups']:,} blocks and {base['token_lookups']:,} tokens looked up by "
        f"{base['requests']:,} requests{after}{_waste(base)}"
        for base in bases.iter_rows(named=True)
    ]
    overflows = max(rows["pin_overflow_requests"].drop_nulls().to_list(), default=0)
    if overflows:
        lines.append(
            f"{lead}up to {overflows:,} requests found no room for all their blocks beside those in use "
            "(pin_overflow_requests; --per-request names them): `kvtrace simulate` tells what the engine would do"
        )
    for header in trace.engines:
        own, size = metrics.own_hits(trace.reader, header), metrics.capacity_blocks(header)
        if own is None or size is None:
            continue
        (lru,) = replay_engine(trace, header, "lru", size)
        which = f"engine {header['engine_index']}" if len(trace.engines) > 1 else "the engine itself"
        lines.append(
            f"{lead}{which}, {size:,} blocks, first admissions: {percent(own['block_hit_ratio'])} of blocks "
            f"and {percent(own['token_hit_ratio'])} of tokens hit; lru replayed at that size: "
            f"{percent(lru['block_hit_ratio'])} and {percent(lru['token_hit_ratio'])}"
        )
    lines += [f"{lead}{why}" for why in rows["why"].drop_nulls().unique(maintain_order=True)]
    return lines
