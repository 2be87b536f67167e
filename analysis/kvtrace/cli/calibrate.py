"""`kvtrace calibrate`: what do an engine's steps cost, by its own trace, by measuring, or by arithmetic?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, note, output_options, refuse_to_overwrite, replacing
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    from kvtrace.api import Trace
    from kvtrace_replay.timing.profile import Profile

# Assumptions of the arithmetic: options, and the fields of `roofline.Efficiency` that they set.
ASSUMED = {
    "compute_efficiency": "compute", "attention_efficiency": "attention", "memory_efficiency": "memory",
    "overhead_us": "overhead_us", "copy_us": "copy_us", "pageable_efficiency": "pageable",
    "tensor_parallel": "tensor_parallel", "kv_element_bytes": "kv_element_bytes",
}  # fmt: skip
MEASURED = ("layers", "quick")


@click.command(
    "calibrate",
    epilog=examples(
        "kvtrace calibrate traces/samples/thrash.kvt -o profile.toml",
        "kvtrace calibrate --gpu a100-40gb --model llama-2-7b -o a100.toml",
    ),
)
@click.argument("path", type=TRACE, metavar="TRACE", required=False)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Measure this machine instead, with torch.")
@click.option("--gpu", metavar="NAME", help="Compute from a data sheet instead: a100-40gb, h100, l4, mi300x, ...")
@click.option("--model", metavar="NAME|FILE",
              help="With --gpu or --device: llama-3.1-8b, qwen2.5-7b, ..., or a config.json.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml",
              help="Write the profile, which `kvtrace simulate --timing` takes.")  # fmt: skip
@click.option("--link", metavar="GPU|PROFILE",
              help="With TRACE: whose link to the host it has; a trace does not tell.")  # fmt: skip
@click.option("--layers", type=click.IntRange(1), metavar="N",
              help="With --device: layers to measure; the others are scaled. [default: what fits]")  # fmt: skip
@click.option("--quick", is_flag=True, help="With --device: fewer points, fewer repeats.")
@click.option("--compute-efficiency", type=float, metavar="F", help="With --gpu, as all below: share of the bf16 rate"
              " that matrix products reach. [default: 0.6]")  # fmt: skip
@click.option("--attention-efficiency", type=float, metavar="F", help="Share that attention reaches. [default: 0.4]")
@click.option("--memory-efficiency", type=float, metavar="F", help="Share of the memory's bandwidth. [default: 0.8]")
@click.option("--pageable-efficiency", type=float, metavar="F",
              help="Share of the link with pageable host memory. [default: 0.4]")  # fmt: skip
@click.option("--overhead-us", type=float, metavar="US", help="Of a step beside the GPU's work. [default: 1000]")
@click.option("--copy-us", type=float, metavar="US", help="Of a copy over the link beside its bytes. [default: 6]")
@click.option("--tensor-parallel", type=click.IntRange(1, 1024), metavar="N", help="GPUs. [default: 1]")
@click.option("--kv-element-bytes", type=click.IntRange(1, 2), metavar="N",
              help="1 for a KV cache in fp8. [default: as the model]")  # fmt: skip
@output_options
def command(
    path: Path | None,
    device: str | None,
    gpu: str | None,
    model: str | None,
    out: Path | None,
    link: str | None,
    output: Output,
    **options: Any,
) -> int:
    """Learn what an engine's steps cost, by its trace or this machine.

    Exactly one of TRACE, --device and --gpu. The costs are fitted to the durations of the trace's own steps, or to what
    is measured here with random weights, or computed from data sheets; the errors are those on steps that the fit has
    not seen.
    """
    if sum(given is not None for given in (path, device, gpu)) != 1:
        raise UsageError("name exactly one of TRACE, --device and --gpu")
    _check(path, device, gpu, model, link, options)
    if out is not None:
        refuse_to_overwrite(out, output.force)
    traces: list[Trace] = []
    if path is not None:
        from kvtrace.calibrations import calibrate

        traces = open_traces([path])
        profile = calibrate(traces[0], link)
    elif device is not None:
        profile = _measured(device, model, options)
    else:
        profile = _computed(str(gpu), str(model), options)
    if out is not None:
        text = profile.toml()
        with replacing(out, output.force) as part:
            part.write_text(text, encoding="utf-8")
        note(f"wrote {out}")
    _print(profile, output)
    return exit_code(traces)


def _check(
    path: Path | None, device: str | None, gpu: str | None, model: str | None, link: str | None, options: dict[str, Any]
) -> None:
    """Raises UsageError for options that the chosen source does not take."""
    if gpu is not None and model is None:
        raise UsageError("--gpu needs --model: a name (llama-3.1-8b), or a config.json")
    if path is not None and model is not None:
        raise UsageError("--model goes with --gpu and --device: a trace knows its model")
    if path is None and link is not None:
        raise UsageError("--link goes with TRACE: --device measures the link, --gpu knows it")
    for names, source, taken in ((MEASURED, "--device", device), (ASSUMED, "--gpu", gpu)):
        wrong = next((name for name in names if options[name] not in (None, False)), None)
        if taken is None and wrong is not None:
            raise UsageError(f"--{wrong.replace('_', '-')} goes with {source}")


def _computed(gpu: str, model: str, options: dict[str, Any]) -> Profile:
    from kvtrace_replay.timing.roofline import Efficiency, roofline

    given = {field: options[name] for name, field in ASSUMED.items() if options[name] is not None}
    profile = roofline(gpu, model, Efficiency(**given))
    need, has = profile.facts["weight_bytes"], profile.facts["gpu_memory_bytes"]
    if float(need) > float(has):
        from kvtrace.people import size

        note(f"{profile.model.name} does not fit: {size(float(need))} of weights, {size(float(has))} of memory "
             "(--tensor-parallel N for several GPUs)")  # fmt: skip
    return profile


def _measured(device: str, model: str | None, options: dict[str, Any]) -> Profile:
    from kvtrace_replay.timing.device import measure

    shown = _show_progress if sys.stderr.isatty() else None
    profile = measure(device, model, layers=options["layers"], quick=options["quick"], progress=shown)
    if shown is not None:
        click.echo("\r\x1b[K", nl=False, err=True)
    for name in ("scaled", "pinned", "left_out"):
        if name in profile.facts:
            note(str(profile.facts[name]))
    return profile


def _show_progress(done: int, total: int, what: str) -> None:
    click.echo(f"\r\x1b[Kmeasuring {what} ({done} of {total})", nl=False, err=True)


def _print(profile: Profile, output: Output) -> None:
    from kvtrace.calibrations import table

    frame = table(profile)
    if output.kind != "people":
        output.table(frame)
        return
    for line in page(profile):
        click.echo(line)


def page(profile: Profile) -> Iterator[str]:
    """The lines that people see."""
    from kvtrace.calibrations import UNITS
    from kvtrace.people import Style, bold, number, percent, render, seconds, size

    def lines(rows: list[dict[str, Any]]) -> str:
        import polars as pl

        return render(pl.DataFrame(rows), Style())[0]

    facts = profile.facts
    yield bold(f"{profile.name}: {profile.model.name} on {profile.device}, from its {profile.source}")
    if "steps" in facts:
        yield (f"{facts['steps']:,} steps, {facts['warm_up_steps']:,} more of warm-up left out, "
               f"{facts['outlier_steps']:,} counted as outliers with less weight")  # fmt: skip
    yield ""
    costs = []
    for name, value in profile.costs.items():
        low, high = profile.spread.get(name, (None, None))
        unit = UNITS[name].partition("/")[2] or "step"
        row = {"cost": name, "per": unit, "time": _time(value)}
        if profile.spread:
            row |= {"from": _time(low), "to": _time(high)}
        costs.append(row)
    yield lines(costs)
    if abs(profile.stretch - 1) >= 0.0005:
        yield (f"With the pauses of the machine, steps took {percent(profile.stretch)} of this in all; simulations "
               "count them in")  # fmt: skip
    for name, why in profile.unidentified.items():
        yield f"{name} is not known, and counts 0: {why}"
    if profile.errors:
        yield ""
        yield "Error on steps that the fit has not seen:"
        yield lines([
            {"batch": e.batch, "steps": e.steps, "median": percent(e.median), "p95": percent(e.p95),
             "bias": f"{e.bias * 100:+.2f}%"} for e in profile.errors
        ])  # fmt: skip
    if profile.link:
        yield ""
        yield lines([
            {"link": way, "transfer": seconds(c.transfer_ns / 1e9), "copy": seconds(c.copy_ns / 1e9),
             "bandwidth": f"{number(c.bytes_per_s / 1e9)} GB/s"} for way, c in profile.link.items()
        ])  # fmt: skip
    if profile.model.kv_bytes_per_token:
        yield ""
        yield f"KV cache: {size(profile.model.kv_bytes_per_token)} a token"


def _time(value_ns: float | None) -> str:
    from kvtrace.people import seconds

    if value_ns is None:
        return "-"
    return f"{value_ns:.3g} ns" if value_ns < 1000 else seconds(value_ns / 1e9)
