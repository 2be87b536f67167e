"""The page of `kvtrace demo`, and the sentences on it. Every figure comes from the trace and its replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace import metrics
from kvtrace.people import Style, capacity, size
from kvtrace.people import percent as exact_percent
from kvtrace.replays import replay_engine
from kvtrace.reports.charts import hit_ratio_by_capacity, occupancy_by_step
from kvtrace.reports.page import Figure, Page, Panel, Section, build

if TYPE_CHECKING:
    from kvtrace.api import Trace

# As parts of the run's own cache; a trace that knows no cache gets them as parts of its distinct blocks.
FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
PARTS_OF_DISTINCT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
POLICIES = ("lru", "fifo", "opt")
REPLAY_COLUMNS = (
    "policy", "capacity_blocks", "block_hits", "block_hit_ratio", "token_hits", "token_hit_ratio",
    "evictions", "seconds",
)  # fmt: skip
REPLAY_STYLE = Style(columns=REPLAY_COLUMNS, cells={"capacity_blocks": capacity})


def capacities(header: dict[str, Any], distinct_blocks: int) -> list[int | str]:
    """The capacities to replay: parts and multiples of the run's own cache, and an unbounded one."""
    own = metrics.capacity_blocks(header)
    whole, parts = (distinct_blocks, PARTS_OF_DISTINCT) if own is None else (own, FRACTIONS)
    return [*sorted({max(1, round(whole * part)) for part in parts}), "inf"]


def percent(ratio: float | None) -> str:
    """A ratio as a sentence has it; tables carry more digits."""
    return exact_percent(ratio, 1)


def replay_grid(trace: Trace) -> pl.DataFrame:
    """The replay that a page is made of: first engine, prefix semantics, the trace's own block size."""
    rows = replay_engine(trace, trace.header, POLICIES, capacities(trace.header, trace.info["identities"]))
    return pl.DataFrame(rows, infer_schema_length=None)


def side_by_side(rows: pl.DataFrame) -> tuple[pl.DataFrame, Style]:
    """Token hit ratios with a line for each capacity and a column for each policy, and how to show them."""
    wide = rows.pivot("policy", index="capacity_blocks", values="token_hit_ratio")
    names = wide.columns[1:]
    return wide, Style(cells={"capacity_blocks": capacity} | dict.fromkeys(names, exact_percent))


@dataclass(frozen=True)
class Findings:
    """What the sentences are made of; ratios are token-weighted, None where the trace cannot tell."""

    capacity: int | None  # the run's own, or the middle one of the grid
    is_own: bool
    block_size: int
    engine: float | None  # what the engine itself found
    lru: float | None
    fifo: float | None
    opt: float | None
    unbounded: float | None
    doubled: float | None
    doubled_tokens: int | None  # more tokens found at twice the capacity


def find(trace: Trace, rows: pl.DataFrame) -> Findings:
    """Read the findings off the replay's rows (of the first engine)."""
    own = metrics.capacity_blocks(trace.header)
    finite = sorted(set(rows["capacity_blocks"].drop_nulls().to_list()))
    middle = own if own is not None else (finite[len(finite) // 2] if finite else None)

    def at(policy: str, blocks: int | None, column: str = "token_hit_ratio") -> Any:
        found = rows.filter((pl.col("policy") == policy) & pl.col("capacity_blocks").eq_missing(blocks))
        return found[column][0] if found.height else None

    twice = None if middle is None else next((b for b in finite if abs(b - 2 * middle) <= 1), None)
    hits = at("lru", middle, "token_hits"), at("lru", twice, "token_hits")
    recorded = metrics.own_hits(trace.reader, trace.header)
    return Findings(
        capacity=middle,
        is_own=own is not None,
        block_size=int(trace.header["block_size"]),
        engine=recorded["token_hit_ratio"] if recorded else None,
        lru=at("lru", middle),
        fifo=at("fifo", middle),
        opt=at("opt", middle),
        unbounded=at("lru", None),
        doubled=None if twice is None else at("lru", twice),
        doubled_tokens=None if twice is None or None in hits else hits[1] - hits[0],
    )


def doubling(found: Findings) -> str:
    """One true sentence on what twice the cache would return; empty where the grid does not tell."""
    if found.capacity is None or found.lru is None or found.doubled is None or found.doubled_tokens is None:
        return ""
    blocks = f"Twice the cache ({2 * found.capacity:,} blocks instead of {found.capacity:,})"
    if found.doubled - found.lru < 0.005:
        return (
            f"{blocks} would change little: it would find {percent(found.doubled)} of the prompt tokens instead "
            f"of {percent(found.lru)}."
        )
    return (
        f"{blocks} would find {percent(found.doubled)} of the prompt tokens instead of {percent(found.lru)}: "
        f"{found.doubled_tokens:,} tokens of prefill saved."
    )


def verdict(found: Findings) -> str:
    """The opening paragraph: what the run got, what the traffic held, what size and policy would change."""
    words = []
    if found.capacity is not None and found.lru is not None:
        tokens = f"{found.capacity:,} blocks ({found.capacity * found.block_size:,} tokens)"
        if found.engine is not None:
            replayed = f" (replayed with LRU: {percent(found.lru)})" if abs(found.engine - found.lru) >= 0.002 else ""
            words.append(
                f"With its cache of {tokens} the engine found {percent(found.engine)} of the prompt tokens{replayed}."
            )
        else:
            words.append(f"A cache of {tokens} finds {percent(found.lru)} of the prompt tokens under LRU.")
    if found.unbounded is not None:
        words.append(f"A cache without bound would have found {percent(found.unbounded)}.")
    words.append(doubling(found))
    words.append(_policies(found))
    return " ".join(word for word in words if word)


def _policies(found: Findings) -> str:
    if found.lru is None or found.fifo is None or found.opt is None:
        return ""
    gain = found.opt - found.lru
    lead = "At the run's own size" if found.is_own else f"At {found.capacity:,} blocks"
    text = f"{lead} FIFO finds {percent(found.fifo)} and Belady's rule, which knows the future, {percent(found.opt)}"
    if gain < 0.01:
        return f"{text}: another policy than LRU has next to nothing to give here."
    return f"{text}: there are {gain * 100:.1f} points between LRU and it for a better policy to win."


def page(trace: Trace, rows: pl.DataFrame, version: str) -> str:
    """The whole page as HTML. `rows` are replay rows of the first engine at one block size."""
    found = find(trace, rows)
    info, header = trace.info, trace.header
    own = metrics.capacity_blocks(header)
    used = metrics.occupancy(trace.reader, header)
    preemptions = trace.preemptions.filter(pl.col("engine_index") == header["engine_index"])
    semantics = rows["semantics"][0]
    sections = [
        _section(
            "What a cache of another size, or another policy, would have found",
            "Share of prompt tokens found in the cache, replayed from the recorded requests. "
            + ("The diamond is what the engine itself found. " if found.engine is not None else "")
            + "The dotted line is Belady's rule: a strong reference, not a bound that was proven.",
            hit_ratio_by_capacity(rows, own, found.engine),
            rows,
            REPLAY_STYLE,
        )
    ]
    if used.height:
        sections.append(_occupancy(used, preemptions))
    return build(
        Page(
            title=trace.path.stem,
            subtitle=_subtitle(info, header),
            verdict=[("", verdict(found))],
            tiles=_tiles(info, own, found, used, preemptions.height),
            sections=sections,
            footnotes=[
                f"Semantics: {semantics}. Block size {found.block_size} tokens. A ratio's denominator is all "
                f"prompt tokens of {info['requests']:,} requests; blocks and tokens are counted apart in the table.",
                f"Made by kvtrace {version} from {trace.path.name}. This page is one file and loads nothing.",
            ],
        )
    )


def _occupancy(used: pl.DataFrame, preemptions: pl.DataFrame) -> Section:
    blocks = used.select(pl.sum_horizontal(pl.exclude("step")).max()).item()
    mean = used.select(pl.col("used", "cached_idle", "free").mean() / blocks).row(0, named=True)
    prose = (
        f"On average {percent(mean['used'])} of the blocks were held by requests, {percent(mean['cached_idle'])} "
        f"kept a prefix that nobody was using, {percent(mean['free'])} held nothing. "
    )
    if preemptions.height:
        prose += f"{preemptions.height:,} preemptions threw away {preemptions['tokens_lost'].sum():,} computed tokens."
    else:
        prose += "No request was preempted."
    table = (
        used.with_columns(part=(pl.int_range(pl.len()) * 20 // pl.len()))
        .group_by("part", maintain_order=True)
        .agg(
            pl.col("step").first().alias("from_step"),
            pl.col("step").last().alias("to_step"),
            *(pl.col(name).mean().round(1).alias(f"mean_{name}") for name in ("used", "cached_idle", "free")),
        )
        .drop("part")
    )
    figure = occupancy_by_step(used, sorted(set(preemptions["step"].to_list())))
    return _section("What the blocks were doing", prose, figure, table)


def _section(title: str, prose: str, figure: Figure, table: pl.DataFrame, style: Style | None = None) -> Section:
    return Section(title, [Panel("", prose, figure, table, style or Style())])


def _subtitle(info: dict[str, Any], header: dict[str, Any]) -> str:
    engine = " ".join(str(part) for part in (info.get("engine"), info.get("engine_version")) if part)
    model = str(info.get("model") or "")
    when = str(info.get("created") or "")[:16].replace("T", " ")
    # A model given as a folder: its own name says enough.
    parts = [model.rsplit("/", 1)[-1] if model.startswith("/") else model, engine, info.get("device"), when]
    if header.get("bytes_per_block") and header.get("num_blocks"):
        parts.append(f"KV cache {size(header['bytes_per_block'] * header['num_blocks'])}")
    return " · ".join(str(part) for part in parts if part)


def _tiles(
    info: dict[str, Any], own: int | None, found: Findings, used: pl.DataFrame, preempted: int
) -> list[tuple[str, str]]:
    tiles = [("requests", f"{info['requests']:,}")]
    if used.height:
        tiles.append(("steps", f"{used.height:,}"))
    if own is not None:
        tiles.append(("usable blocks", f"{own:,}"))
    if found.engine is not None:
        tiles.append(("tokens found", percent(found.engine)))
    if found.unbounded is not None:
        tiles.append(("with no bound", percent(found.unbounded)))
    if used.height:
        tiles.append(("preemptions", f"{preempted:,}"))
    return tiles
