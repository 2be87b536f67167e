"""What does it cost when the KV cache overflows: recompute against swap, on a simulated vLLM 0.4.2.

    python examples/overflow_study/study.py -o study/

writes a page with all figures, each figure and its data, and prints which published shapes the data have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bound
import experiments
import figures
import polars as pl
import report
import shapes
from experiments import BIN_S, COARSE, EXPERIMENTS, FULL, SMALL, Size

from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError

README = Path(__file__).with_name("README.md")
COMMAND = "python examples/overflow_study/study.py -o study/"
#: Share of the bf16 rate, link in GB/s, us of a copy. The first is what the study assumes.
ASSUMED = (
    (0.6, 25, 6),
    (0.3, 25, 6),
    (0.5, 25, 6),
    (0.7, 25, 6),
    (0.3, 12, 6),
    (0.5, 12, 6),
    (0.7, 12, 6),
    (0.6, 25, 2),
)
X_TITLES = {
    "2a-block-size": ("block_size", "tokens in a block", True),
    "2b-tokens-evicted": ("tokens", "tokens of the victim", True),
    "3a-sequence-length": ("tokens", "tokens of a sequence", True),
    "3b-memory": ("memory_share", "share of the device's memory", False),
}


@dataclass(frozen=True)
class Found:
    """All data of a study, and the answers."""

    tables: dict[str, pl.DataFrame]
    shapes: list[shapes.Shape]


def measure(size: Size, timing: Profile) -> Found:
    """Run the experiments of the four figures, and ask for their shapes."""
    tables = {name: run(size, timing) for name, run in EXPERIMENTS.items()}
    calls = experiments.over_time(timing)
    bins = experiments.binned(calls)
    answers = [
        *shapes.of_block_size(tables["2a-block-size"]),
        *shapes.of_evicted(tables["2b-tokens-evicted"]),
        *shapes.of_length(tables["3a-sequence-length"]),
        *shapes.of_memory(tables["3b-memory"]),
        *shapes.of_time(calls, bins, BIN_S),
    ]
    return Found({**tables, "4-calls": calls, "4-seconds": bins}, answers)


def study(size: Size, out: Path) -> list[str]:
    """Run all, write all into `out`, and return what is to be printed."""
    out.mkdir(parents=True, exist_ok=True)
    timing = experiments.profile()
    found = measure(size, timing)
    small, large = bound.small(size, timing), bound.large(timing)
    found.tables.update({"5-choices-small": small, "5-choices-large": large, "shapes": report.answers(found.shapes)})
    text = [
        f"{experiments.MODEL} on {experiments.GPU}, simulated vLLM 0.4.2: which published shapes hold",
        *report.shapes_table(found.shapes),
        *report.reasons_text(found.shapes),
        *report.bounds_table(small, large),
    ]
    if size.sensitivity:
        assumed = {}
        for share, link, copy in ASSUMED:
            assumed[f"{share}/{link}/{copy}"] = measure(COARSE, experiments.profile(share, link, copy)).shapes
        text += report.sensitivity_table(assumed)
    drawn = {
        name: (
            f"({name.partition('-')[0]}) {report.TITLES[name.partition('-')[0]]}",
            " ".join((EXPERIMENTS[name].__doc__ or "").split()),
            figures.overheads(found.tables[name], x, title, log),
        )
        for name, (x, title, log) in X_TITLES.items()
    }
    drawn["4-over-time"] = (
        f"(4) {report.TITLES['4']}",
        "The calls of the runs of (3b) at 12 % of the memory.",
        figures.over_time(found.tables["4-calls"], found.tables["4-seconds"]),
    )
    drawn["5-choices"] = (
        "(5) choosing for each victim",
        "Left: small seeded cases, in which every way to choose for every victim was tried. Right: runs of (3b).",
        figures.bounds(small, large),
    )
    write(out, found.tables, drawn, text)
    return text


def write(
    out: Path, tables: dict[str, pl.DataFrame], drawn: dict[str, tuple[str, str, figures.Figure]], text: Sequence[str]
) -> None:
    from plotly.offline import get_plotlyjs

    for name, table in tables.items():
        table.write_csv(out / f"{name}.csv", float_precision=6)
    (out / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for name, (_, _, figure) in drawn.items():
        report.write_figure(out / f"{name}.html", figure, name)
    (out / "study.html").write_text(report.page(drawn, text), encoding="utf-8")
    (out / "study.txt").write_text("\n".join(text) + "\n", encoding="utf-8")


def write_readme(text: Sequence[str]) -> None:
    """Put the output into the README, where the last one stands."""
    head, _, rest = README.read_text(encoding="utf-8").partition(f"```console\n$ {COMMAND}\n")
    if not rest:
        raise KvtraceError(f"{README} has no console block of: {COMMAND}")
    _, _, tail = rest.partition("```\n")
    body = "\n".join(text)
    README.write_text(f"{head}```console\n$ {COMMAND}\n{body}\n```\n{tail}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("study"), help="folder for the page, figures and data")
    parser.add_argument("--small", action="store_true", help="fewer points, and no other assumptions")
    parser.add_argument("--write-readme", action="store_true", help="put what is printed into the README")
    given = parser.parse_args(arguments)
    try:
        text = study(SMALL if given.small else FULL, given.out)
        if given.write_readme:
            write_readme(text)
    except (KvtraceError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    print("\n".join(text))
    print(f"figures: {given.out / 'study.html'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
