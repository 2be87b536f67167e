"""`kvtrace simulate`: what would the recorded requests have met at other settings of their scheduler?"""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, output_options, refuse_to_overwrite, replacing, table_suffix, write_table
from kvtrace.cli.replay import Items, Policies
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    from kvtrace.api import Trace
    from kvtrace.simulations import Simulated
    from kvtrace.simulations_v0 import SimulatedV0
    from kvtrace_replay.timing.profile import Profile

# What people see besides the settings that vary.
SHOWN = ("steps", "preemptions", "evictions", "hit_tokens", "token_hit_ratio", "exact", "seconds")
SHOWN_OFFLOAD = (
    "steps", "preemptions", "evictions", "hit_tokens", "loaded_tokens", "stored_blocks", "loaded_blocks", "exact",
)  # fmt: skip
SHOWN_OFFLOAD_TIMED = (
    "steps", "preemptions", "loaded_tokens", "stored_blocks", "loaded_blocks", "ttft_p50_s", "ttft_p99_s", "itl_p99_s",
    "output_tokens_per_s", "exact",
)  # fmt: skip
SHOWN_TIMED = (
    "steps", "preemptions", "evictions", "token_hit_ratio", "ttft_p50_s", "ttft_p99_s", "itl_p99_s",
    "output_tokens_per_s", "exact",
)  # fmt: skip
SOURCES = {
    "trace": "learnt from the trace's own steps",
    "device": "measured on the device",
    "roofline": "by arithmetic from published rates",
}
SHOWN_V0 = (
    "steps", "prefill_steps", "recomputes", "swaps", "blocks_swapped_out", "recomputed_tokens", "finished", "dropped",
    "ended", "seconds",
)  # fmt: skip
SHOWN_V0_TIMED = (
    "steps", "recomputes", "swaps", "blocks_swapped_out", "recomputed_tokens", "ended", "duration_s", "ttft_p99_s",
    "itl_p99_s", "output_tokens_per_s",
)  # fmt: skip
# vLLM's own spellings; it takes underscores, too.
ALIASES = {
    "num-gpu-blocks-override": "num-blocks",
    "enable-prefix-caching": "prefix-caching",
    "no-enable-prefix-caching": "no-prefix-caching",
    "enable-chunked-prefill": "chunked-prefill",
    "no-enable-chunked-prefill": "no-chunked-prefill",
}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1000, "m": 1000_000}


class Counts(Items):
    """A list of whole numbers: 1000, 10k, 2M."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[object]:
        return [self._one(str(text), param, ctx) for text in super().convert(value, param, ctx)]

    def _one(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _COUNT.fullmatch(text)
        number = Fraction(match[1]) * _UNITS[match[2].lower()] if match else Fraction(1, 2)
        if number.denominator != 1:
            self.fail(f"{text!r} is no whole number; write 1000 or 10k", param, ctx)
        return int(number)


def spelling(name: str) -> str:
    """An option's name as we have it, for vLLM's spelling of it."""
    dashed = name.replace("_", "-")
    return ALIASES.get(dashed, dashed)


@click.command(
    "simulate",
    epilog=examples(
        "kvtrace simulate traces/samples/thrash.kvt --num-blocks 200,400 --max-num-seqs 16,32",
        "kvtrace simulate traces/samples/thrash.kvt --arrivals time --rate x1,x2,x4",
    ),
    context_settings={"token_normalize_func": spelling},
)
@click.argument("path", type=TRACE, metavar="TRACE")
@click.option("--engine", default="vllm-v1", show_default=True, metavar="NAME",
              help="The scheduler to simulate: vllm-v1, or vllm-v0 (0.4.2).")  # fmt: skip
@click.option("--num-blocks", type=Items(), metavar="A,B",
              help="Blocks, vLLM's null block among them (1000, 10k); or 8GiB, 65536tok.")  # fmt: skip
@click.option("--block-size", type=Counts(), metavar="A,B",
              help="Tokens in a block, multiples of the granule. Without --num-blocks the bytes stay.")  # fmt: skip
@click.option("--max-num-seqs", type=Counts(), metavar="A,B", help="Most requests running at once.")
@click.option("--max-num-batched-tokens", type=Counts(), metavar="A,B", help="Most tokens in a step.")
@click.option("--prefix-caching", is_flag=True, help="With prefix caching.")
@click.option("--no-prefix-caching", is_flag=True, help="Without. Both: one row each; so for the next two pairs.")
@click.option("--chunked-prefill", is_flag=True, help="With prompts cut where a step's tokens end.")
@click.option("--no-chunked-prefill", is_flag=True, help="Without.")
@click.option("--async-scheduling", is_flag=True, help="With the next step scheduled before the last one's output.")
@click.option("--no-async-scheduling", is_flag=True, help="Without.")
@click.option("--long-prefill-token-threshold", type=Counts(), metavar="A,B",
              help="Most tokens of one prompt in a step; 0 for no limit.")  # fmt: skip
@click.option("--scheduling-policy", type=Items(), metavar="A,B", help="fcfs, priority.")
@click.option("--watermark", type=Items(float), metavar="A,B",
              help="Share of the blocks that admissions leave free, from 0 to below 1.")  # fmt: skip
@click.option("--policy", type=Policies(), metavar="A,B",
              help="Who is evicted: vllm (its own free queue) or a policy; `kvtrace policies` lists them.")  # fmt: skip
@click.option("--preemption", type=Items(), metavar="A,B",
              help="What becomes of a victim: recompute, or offload (a connector of vLLM's to host memory); vllm-v0: "
                   "also swap, or hybrid, the cheaper.")  # fmt: skip
@click.option("--cpu-offload", type=Items(), metavar="A,B",
              help="With --preemption offload: host memory, 40GiB, 65536tok or blocks.")  # fmt: skip
@click.option("--offload-policy", type=Items(), metavar="A,B",
              help="With --preemption offload: who is dropped there, lru or arc. [default: lru]")  # fmt: skip
@click.option("--offload-connector", type=Items(), metavar="A,B",
              help="With --preemption offload: vLLM's OffloadingConnector (offloading) or SimpleCPUOffloadConnector "
                   "(simple). [default: the first that stores as asked]")  # fmt: skip
@click.option("--offload-store", type=Items(), metavar="A,B",
              help="With --preemption offload: when blocks are stored, fill or eviction. [default: fill]")  # fmt: skip
@click.option("--swap-space", type=Items(float), metavar="A,B",
              help="vllm-v0: GiB of host memory to swap to. [default: 4]")  # fmt: skip
@click.option("--victim", type=Items(), metavar="A,B",
              help="Who is preempted: vllm (its rule), last, first, fewest-blocks, most-blocks, lowest-priority, "
                   "cheapest; vllm-v0: last (its rule), most-blocks, fewest-blocks.")  # fmt: skip
@click.option("--mend", type=Items(), metavar="A,B",
              help="vllm-v0: defects that the engine is not to have (docs/vllm-v0-semantics.md).")  # fmt: skip
@click.option("--arrivals", metavar="HOW",
              help="step (at the recorded steps), all (before the first) or time. "
                   "[default: step; time with --rate; vllm-v0 and imports: all]")  # fmt: skip
@click.option("--timing", metavar="PROFILE",
              help="What steps cost: a profile (a file or a name), GPU:MODEL, or none. [default: as the trace's own "
                   "steps tell]")  # fmt: skip
@click.option("--link", metavar="GPU|PROFILE|25GB/s",
              help="What copies to and from host memory cost, where the profile does not know: whose link, or its "
                   "bandwidth.")  # fmt: skip
@click.option("--rate", type=Items(), metavar="A,B",
              help="Other times of arrival: x2 (twice as fast as recorded), or 8 (a second, Poisson).")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of --rate's Poisson process.")
@click.option("--pageable", is_flag=True, help="vllm-v0: CPU blocks are not page-locked.")
@click.option("--swap-overlap", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE",
              help="vllm-v0: how much of the copying runs beside computing, 0 (none, as 0.4.2) to 1.")  # fmt: skip
@click.option("--per-request", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write a row per request (.csv, .parquet or .json).")  # fmt: skip
@click.option("--per-step", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write a row per step (.csv, .parquet or .json).")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="OUT.kvt",
              help="Write the simulated run as a trace, which every command reads.")  # fmt: skip
@click.option("--allow-lossy", is_flag=True, help="Simulate what is left of a trace with missing content.")
@output_options
def command(
    path: Path,
    engine: str,
    arrivals: str | None,
    timing: str | None,
    link: str | None,
    rate: list[str] | None,
    seed: int,
    pageable: bool,
    swap_overlap: float,
    mend: list[str] | None,
    per_request: Path | None,
    per_step: Path | None,
    out: Path | None,
    allow_lossy: bool,
    output: Output,
    **options: Any,
) -> int:
    """Run a trace's requests again at other settings of their engine.

    Closed loop: the engine's scheduler and block pool are simulated, and decide anew in every step. Settings take
    lists and make a grid; what is not given is the trace's own. vLLM's spellings (--num-gpu-blocks-override,
    --enable-prefix-caching, underscores) are taken, too.
    """
    from kvtrace.people import Style
    from kvtrace.simulations import check_single, linked, simulate_trace, write_trace
    from kvtrace.simulations_v0 import simulate_v0_trace

    for file in (per_request, per_step):
        if file is not None:
            table_suffix(file)
            refuse_to_overwrite(file, output.force)
    if out is not None:
        refuse_to_overwrite(out, output.force)
    (trace,) = open_traces([path])
    settings, old = chosen(options), engine == "vllm-v0"
    if out is not None and old:
        raise UsageError("-o writes runs of vLLM V1 only: leave it out, or take --per-step")
    if out is not None:
        check_single(trace, {**settings, "rate": rate or []})
    shared: dict[str, Any] = {
        "arrivals": arrivals, "timing": linked(trace, timing, link), "rate": rate, "seed": seed, "mend": mend or (),
        "allow_lossy": allow_lossy, "step_rows": per_step is not None,
        "progress": _show_progress if sys.stderr.isatty() else None,
    }  # fmt: skip
    found: Simulated | SimulatedV0
    if old:
        found = simulate_v0_trace(trace, settings, pinned=False if pageable else None, overlap=swap_overlap, **shared)
        output.facts(*facts_v0(found))
    else:
        if pageable or swap_overlap:
            raise UsageError("--pageable and --swap-overlap are of --engine vllm-v0, the engine that swaps")
        found = simulate_trace(trace, settings, engine=engine, **shared)
        output.facts(*facts(trace, found, "block_size" in settings and "num_blocks" not in settings))
    bare, timed = (SHOWN_V0, SHOWN_V0_TIMED) if old else (SHOWN, SHOWN_TIMED)
    shown: tuple[str, ...] = bare if found.timing is None else timed
    if "offload" in settings.get("preemption", ()):
        shown = SHOWN_OFFLOAD if untimed(found) else SHOWN_OFFLOAD_TIMED
    output.table(found.frame(), Style(columns=(*found.varied(), *shown)))
    if per_request is not None:
        write_table(found.per_request(), per_request, output.force)
    if per_step is not None:
        write_table(found.per_step(), per_step, output.force)
    if out is not None and not old:
        with replacing(out, output.force) as part:
            part.unlink()
            write_trace(found, part)  # type: ignore[arg-type]
        output.facts(f"wrote {out}", f"next: kvtrace info {out}")
    return exit_code([trace])


def untimed(found: Simulated | SimulatedV0) -> bool:
    """Whether runs with a tier have no times."""
    from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun

    runs = [cell.run for _, cell in found.cells]
    return found.timing is None or any(isinstance(run, OffloadRun) and run.clock is None for run in runs)


def facts_v0(found: SimulatedV0) -> list[str]:
    """What was simulated, and the engine's own defects that it met."""
    from kvtrace_replay.schedulers.recorded import ARRIVALS
    from kvtrace_replay.schedulers.vllm_v0.settings import DEFECTS
    from kvtrace_replay.schedulers.vllm_v0.sweep import WHY_MEANS

    cells = [cell for _, cell in found.cells]
    met = dict.fromkeys(name for cell in cells if cell.run is not None for name in cell.run.defects)
    how = cells[0].arrivals
    return [
        f"{cells[0].requests:,} requests; {WHY_MEANS}",
        f"arrivals {how}: {ARRIVALS[how]}",
        *timed_by(found.timing),
        *(f"defect {name}: {DEFECTS[name]} (--mend {name})" for name in met),
        *dict.fromkeys(f"not run: {cell.failed}" for cell in cells if cell.failed),
    ]


def timed_by(timing: Profile | None) -> list[str]:
    """A line of what steps cost, and how far that is off where it was learnt."""
    if timing is None:
        return []
    errors = {error.batch: error for error in timing.errors}
    off = ""
    if "all" in errors:
        one = errors["all"]
        off = f"; predicted steps are off by {one.median:.1%} (median), {one.p95:.1%} (95th percentile)"
    return [f"times: {timing.name}, {SOURCES[timing.source]}{off}"]


def chosen(options: dict[str, Any]) -> dict[str, list[Any]]:
    """The settings that were given, as lists; of a switch and its opposite, what was said of them."""
    settings: dict[str, list[Any]] = {}
    for name, value in options.items():
        if isinstance(value, bool):
            switch, on = name.removeprefix("no_"), not name.startswith("no_")
            if value:
                settings.setdefault(switch, []).append(on)
        elif value is not None:
            settings[name] = value
    return settings


def facts(trace: Trace, found: Simulated, same_bytes: bool) -> list[str]:
    """What was simulated, beside what the engine itself did; how requests arrived; and how exact it is."""
    from kvtrace_replay.schedulers.recorded import ARRIVALS
    from kvtrace_replay.schedulers.sweep import WHY

    lines = []
    for header in trace.engines:
        which = f"engine {header['engine_index']}: " if found.several else ""
        version = header.get("engine_version") or found.cells[0][1].recorded.header["engine_version"]
        lines.append(f"{which}the scheduler of vLLM {version}, {recorded_run(trace, header)}")
        if same_bytes:
            lines += [f"{which}{line}" for line in scaled(found, header)]
    cells = [cell for _, cell in found.cells]
    lines.append(f"arrivals {cells[0].arrivals}: {ARRIVALS[cells[0].arrivals]}")
    lines += timed_by(found.timing)
    if found.timing is not None and untimed(found):
        lines.append("runs with host memory have no times: a trace does not tell what its link costs, --link GPU does")
    ran = [cell for cell in cells if cell.run is not None]
    for name, meaning in WHY.items():
        if many := sum(name in cell.why for cell in ran):
            lines.append(f"{_of(many, len(ran))} not bound to be exact, {name}: {meaning}")
    if exact := sum(not cell.why for cell in ran):
        lines.append(f"{_of(exact, len(ran))} exact given equal tokens")
    failed = [cell.failed for cell in cells if cell.failed]
    lines += [f"not run: {why}" for why in dict.fromkeys(failed)]
    return lines


def recorded_run(trace: Trace, header: dict[str, Any]) -> str:
    """What the engine did when it was recorded, in the words of the table; of an import, that nobody ran it."""
    import polars as pl

    if header.get("source") == "import":
        return f"{trace.requests.height:,} requests of an import; what is not given is vLLM's default"
    mine = pl.col("engine_index") == header["engine_index"]
    evicted = trace.block_events.filter(mine & (pl.col("kind") == "evict")).height
    hit = int(trace.lookups.filter(mine)["tokens_hit"].sum())
    return (
        f"{trace.requests.filter(mine).height:,} requests; recorded with {header['num_blocks']:,} blocks of "
        f"{header['block_size']} tokens: "
        f"{trace.steps.filter(mine).height:,} steps, {trace.preemptions.filter(mine).height:,} preemptions, "
        f"{evicted:,} evictions, {hit:,} tokens hit"
    )


def scaled(found: Simulated, header: dict[str, Any]) -> list[str]:
    """A line for each block size that the number of blocks was changed for."""
    lines = [
        f"{cell.settings.block_size} tokens a block with the bytes unchanged: {cell.settings.num_blocks:,} blocks"
        for index, cell in found.cells
        if index == header["engine_index"] and cell.settings.block_size != header["block_size"]
    ]
    return list(dict.fromkeys(lines))


def _of(many: int, total: int) -> str:
    if total == 1:
        return "the row is"
    return "all rows are" if many == total else f"{many:,} of {total:,} rows {'is' if many == 1 else 'are'}"


def _show_progress(done: int, total: int) -> None:
    if total > 1:
        click.echo(f"\rkvtrace: {done:,} of {total:,} runs", err=True, nl=done >= total)
