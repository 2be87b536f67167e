"""`kvtrace curve`: how much would more, or less, cache find? And how much is in use at a time?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, output_options
from kvtrace.cli.replay import Items, Policies
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

# What people see; columns that never vary are left out.
SHOWN = (
    "engine_index", "semantics", "block_size", "policy", "capacity_blocks", "block_hits", "block_hit_ratio",
    "block_hit_ratio_error", "token_hits", "token_hit_ratio", "token_hit_ratio_error", "method",
)  # fmt: skip
WINDOWS_SHOWN = (
    "engine_index", "semantics", "block_size", "window_start_s", "window_s", "first_request", "requests",
    "block_lookups", "distinct_blocks", "distinct_tokens", "distinct_bytes",
)  # fmt: skip
IF_VARIED = {"engine_index", "semantics", "block_size", "method", "window_s"}


@click.command(
    "curve",
    epilog=examples(
        "kvtrace curve traces/samples/thrash.kvt --policy lru,opt",
        "kvtrace curve traces/samples/thrash.kvt --working-set 500ms --json",
    ),
)
@click.argument("path", type=TRACE, metavar="TRACE")
@click.option("--policy", "policies", type=Policies(), default="lru", show_default=True, metavar="A,B",
              help="Eviction policies, as for `kvtrace replay`: lru in one pass, others by replays.")  # fmt: skip
@click.option("--sample", metavar="RATE",
              help="Estimate from this share of the blocks (0.01, 1%), for any policy, with an error.")  # fmt: skip
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Another number draws another sample."
)
@click.option("--capacity", "capacities", type=Items(), metavar="A,B",
              help="The points: blocks (1000, 10k), 50% of the distinct ones, 65536tok, 8GiB or inf. "
                   "Default: some from the largest request to all distinct blocks.")  # fmt: skip
@click.option("--points", type=click.Choice(["default", "all"]), default="default", show_default=True,
              help="all: every capacity at which the curve of lru takes another value.")  # fmt: skip
@click.option("--block-size", "block_sizes", type=Items(int), metavar="A,B",
              help="Tokens in a block, multiples of the granule. Default: the trace's own.")  # fmt: skip
@click.option("--semantics", type=Items(), default="prefix", show_default=True, metavar="A,B",
              help="prefix, radix (only leaves are evicted) or object (every block reference by itself).")  # fmt: skip
@click.option("--warmup", type=float, default=0.0, show_default=True, metavar="SHARE",
              help="Share of the requests that fill the cache before anything is counted.")  # fmt: skip
@click.option("--working-set", "window", metavar="WINDOW",
              help="Instead: the distinct blocks in each window of time (60s) or of requests (1000).")  # fmt: skip
@output_options
def command(
    path: Path,
    policies: list[str],
    sample: str | None,
    seed: int,
    capacities: list[str] | None,
    points: str,
    block_sizes: list[int] | None,
    semantics: list[str],
    warmup: float,
    window: str | None,
    output: Output,
) -> int:
    """Hit ratios of a trace at all cache sizes, or its working sets.

    Open loop: the recorded lookups are given, only the cache varies.
    """
    from kvtrace.curves import curve, working_set
    from kvtrace.people import Style, capacity, percent, size

    if block_sizes and min(block_sizes) < 1:
        raise UsageError("a block has at least one token")
    if capacities and points == "all":
        raise UsageError("choose one of --capacity and --points all")
    if sample and points == "all":
        raise UsageError("choose one of --sample and --points all: an estimate has no exact steps")
    traces = open_traces([path])
    sizes: list[int | None] = [*block_sizes] if block_sizes else [None]
    if window is not None:
        _only_with(window)
        rows = working_set(traces[0], window, sizes, semantics)
        output.facts(*window_facts(rows))
        output.table(rows, Style(columns=_columns(rows, WINDOWS_SHOWN), cells={"distinct_bytes": size}))
        return exit_code(traces)
    rows = curve(traces[0], policies, capacities, sizes, semantics, warmup, sample, points, seed)
    output.facts(*curve_facts(rows))
    cells = {"capacity_blocks": capacity, "block_hit_ratio_error": percent, "token_hit_ratio_error": percent}
    output.table(rows, Style(columns=_columns(rows, SHOWN), cells=cells))
    return exit_code(traces)


def _only_with(window: str) -> None:
    """Raise UsageError where an option was given that means nothing for working sets."""
    context = click.get_current_context()
    for name, option in (("policies", "--policy"), ("sample", "--sample"), ("capacities", "--capacity"),
                         ("points", "--points"), ("seed", "--seed"), ("warmup", "--warmup")):  # fmt: skip
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} has no meaning for --working-set {window}: leave it out")


def _columns(rows: pl.DataFrame, shown: tuple[str, ...]) -> list[str]:
    """Those of `shown` that tell something."""
    return [
        name
        for name in shown
        if name in rows.columns
        and rows[name].null_count() < rows.height
        and (name not in IF_VARIED or rows[name].n_unique() > 1)
    ] or list(rows.columns)


def curve_facts(rows: pl.DataFrame) -> list[str]:
    """What the ratios are shares of, and how they were found."""
    from kvtrace.people import percent

    bases = rows.select(
        "policy", "semantics", "block_size", "requests", "block_lookups", "token_lookups", "warmup"
    ).unique(subset=["semantics", "block_size", "requests", "block_lookups"], maintain_order=True)
    lines = [
        f"open loop, {base['semantics']} semantics, {base['block_size']} tokens a block; ratios are shares "
        f"of {base['block_lookups']:,} blocks and {base['token_lookups']:,} tokens looked up by "
        f"{base['requests']:,} requests"
        + (f" after a warm-up of {percent(base['warmup'])} of them" if base["warmup"] else "")
        for base in bases.iter_rows(named=True)
    ]
    if "sample_rate" in rows.columns:
        lines += [
            f"estimated from a sample of {base['sample_rate']:.3g}: {base['sampled_requests']:,} requests, "
            f"{base['sampled_block_lookups']:,} of {base['block_lookups']:,} blocks; errors are half of the 95 % "
            "confidence interval"
            for base in rows.unique(
                subset=["semantics", "block_size", "sampled_block_lookups"], maintain_order=True
            ).iter_rows(named=True)
        ]
    return lines + _reasons(rows)


def _reasons(rows: pl.DataFrame) -> list[str]:
    """Why points are missing; one of those that differ in their numbers alone."""
    import polars as pl

    why = rows.select("why", pl.col("why").str.replace_all(r"\d[\d.,]*", "#").alias("kind")).drop_nulls()
    groups = why.group_by("kind", maintain_order=True).agg(pl.col("why").first(), pl.len().alias("many"))
    return [
        row["why"] + (f" ({row['many']} points are so)" if row["many"] > 1 else "")
        for row in groups.iter_rows(named=True)
    ]


def window_facts(rows: pl.DataFrame) -> list[str]:
    """The largest working set."""
    if not rows.height:
        return ["no requests, no windows"]
    most = rows.sort("distinct_blocks", descending=True, maintain_order=True).row(0, named=True)
    return [
        f"{rows.height:,} windows; the largest working set is {most['distinct_blocks']:,} blocks, "
        f"{most['distinct_tokens']:,} tokens, in window {most['window']:,}"
    ]
