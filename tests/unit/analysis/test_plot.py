"""`kvtrace plot`: one chart of the report, as a page or a picture."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import report_cases

from kvtrace.reports import image
from kvtrace.reports.compose import plot
from kvtrace.reports.page import HERE
from kvtrace.reports.registry import plots

Cli = Callable[..., Any]


def test_without_a_name_all_are_listed(kvtrace_cli: Cli) -> None:
    done = kvtrace_cli("plot")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == list(plots())
    assert max(map(len, done.out.splitlines())) <= 115


def test_every_plot_can_be_drawn_alone(thrash: Path) -> None:
    untold = set()
    for name, words in plots().items():
        assert words.endswith(".")
        if name.startswith("compare"):
            ((_, panel),) = plot(name, [thrash, thrash])
        else:
            ((_, panel),) = plot(name, thrash)
        assert panel.name == name
        if panel.why:
            untold.add(name)
        else:
            assert panel.figure is not None
    assert untold == {"offload", "reuse-by-turn"}


def test_a_page_of_one_chart(kvtrace_cli: Cli, thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / "hits.html"
    done = kvtrace_cli("plot", "hits", thrash, "-o", out)
    assert done.code == 0
    assert done.out == ""
    text = out.read_text("utf-8")
    assert text.count('class="chart"') == 1
    assert "<nav" not in text
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    ((_, panel),) = plot("hits", thrash)
    assert panel.figure is not None
    assert json.loads(data)["figure"]["data"] == json.loads(json.dumps(panel.figure["data"]))
    assert kvtrace_cli("plot", "hits", thrash, "-o", out).code == 2  # it exists
    assert kvtrace_cli("plot", "hits", thrash, "-o", out, "--force").code == 0


def test_the_name_is_the_default(
    kvtrace_cli: Cli, thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kvtrace_cli("plot", "step-mix", thrash).code == 0
    assert (tmp_path / "step-mix.html").exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("ocupancy", "{trace}"), 2, "did you mean occupancy?"),
        (("zzz",), 2, "there are compare-miss-ratio, "),
        (("occupancy",), 2, "of which trace?"),
        (("occupancy", "{trace}", "-o", "x.pdf"), 2, ".html, .png, .svg"),
        (("occupancy", "{trace}", "{trace}", "-o", "{folder}/x.html"), 2, "one run"),
        (("compare-hits", "{trace}", "-o", "{folder}/x.html"), 2, "give it two"),
        (("offload", "{trace}", "-o", "{folder}/x.html"), 1, "nothing to plot: no block was copied"),
        (("reuse-by-turn", "{trace}", "-o", "{folder}/x.html"), 1, "nothing to plot: "),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    args: tuple[str, ...], code: int, said: str, kvtrace_cli: Cli, thrash: Path, tmp_path: Path
) -> None:
    done = kvtrace_cli("plot", *(arg.format(trace=thrash, folder=tmp_path) for arg in args))
    assert done.code == code
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not list(tmp_path.glob("x.*"))


def test_an_import_says_why(kvtrace_cli: Cli, tmp_path: Path) -> None:
    trace = report_cases.case("no-steps", tmp_path)
    done = kvtrace_cli("plot", "occupancy", trace, "-o", tmp_path / "x.html")
    assert done.code == 1
    assert "nothing to plot: the trace has no steps" in done.err
    assert kvtrace_cli("plot", "miss-ratio", trace, "-o", tmp_path / "y.html").code == 0


def test_without_kaleido_the_extra_is_named(
    kvtrace_cli: Cli, thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "kaleido" else found(name))
    done = kvtrace_cli("plot", "hits", thrash, "-o", tmp_path / "x.png")
    assert done.code == 1
    assert "pip install 'kvtrace[plot]'" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="kaleido is not installed: the extra `plot`")
@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG\r\n"), ("svg", b"<svg ")])
def test_pictures(suffix: str, begin: bytes, kvtrace_cli: Cli, thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / f"x.{suffix}"
    done = kvtrace_cli("plot", "occupancy", thrash, "-o", out)
    if done.code and report_cases.CHROMIUM is None:
        assert done.code == 1
        assert "kaleido cannot draw" in done.err
        assert "Chrome" in done.err
        assert "(try .html)" in done.err
        assert not out.exists()
        pytest.skip("no browser to draw with; that this is said was checked")
    assert done.code == 0, done.err
    data = out.read_bytes()
    assert data.startswith(begin)
    if suffix == "svg":
        assert b"thrash: blocks in use" in data
        assert b"$" not in re.sub(rb"<style.*?</style>", b"", data)  # every colour was found


def test_pictures_have_the_colours_of_the_page() -> None:
    colours = image.palette()
    css = (HERE / "page.css").read_text("utf-8")
    assert colours["paper"] in css
    assert image.themed({"a": ["$used", "b", 1]}, colours) == {"a": [colours["used"], "b", 1]}
    dark = re.findall(r"--([\w-]+):", css.split("prefers-color-scheme: dark")[1].split("* {")[0])
    assert set(dark) | {"font"} == set(colours)  # each colour has both themes
