"""Sections of one's own: one function in a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtrace.reports.registry import chosen, plots, sections

PLAIN = '''
from kvtrace.reports import charts
from kvtrace.reports.page import Panel

def tokens_by_request(run):
    """Prompt lengths."""
    frame = run.sql("SELECT request, prompt_tokens FROM requests WHERE engine_index = {engine} ORDER BY request")
    figure = charts.bars(frame, "request", [("prompt", "prompt_tokens", "$used")], "request", "tokens", label="Prompts")
    return Panel("prompts", "How long they were.", figure, frame)
'''
DECORATED = """
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section

@section("mine", title="My own section", order=15)
def first(run):
    yield Panel("one", facts=[("engine", str(run.engine))])
    yield Panel("two", why="No luck.")

@section("hits", title="Hits, my way")
def hits(run):
    yield Panel("mine", facts=[("hits", "some")])
"""
Cli = Callable[..., Any]


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_plain_function(kvtrace_cli: Cli, thrash: Path, tmp_path: Path) -> None:
    mine, out = written(tmp_path, PLAIN), tmp_path / "page.html"
    done = kvtrace_cli("report", thrash, "-o", out, "--section", "setup", "--section", f"{mine}:tokens_by_request")
    assert done.code == 0, done.err
    text = out.read_text("utf-8")
    assert "<h2>Tokens by request</h2>" in text
    assert 'data-plot="prompts"' in text
    assert 'id="occupancy"' not in text
    # The only function need not be named, and comes on top of all others.
    assert [entry.name for entry in chosen([str(mine)])] == [*(e.name for e in sections()), "tokens-by-request"]


def test_decorated_ones(tmp_path: Path) -> None:
    mine = written(tmp_path, DECORATED)
    before = [entry.name for entry in sections()]
    found = chosen([f"{mine}:first", f"{mine}:hits"])
    assert [(entry.name, entry.title) for entry in found[-2:]] == [("mine", "My own section"), ("hits", "Hits, my way")]
    assert [entry.name for entry in found].count("hits") == 1  # it takes the place of ours
    assert [entry.name for entry in sections()] == before  # for this page alone


@pytest.mark.parametrize(
    ("text", "name", "code", "said"),
    [
        ("def f(run): return 1", ":f", 1, "TypeError: a section returns a Panel"),
        ("def f(run): return [1]", ":f", 1, "not int"),
        ("def f(run): 1 / 0", ":f", 1, "ZeroDivisionError"),
        ("def f(run): return run.sql('SELECT nope FROM requests')", ":f", 2, "nope"),
        ("1 / 0", ":f", 2, "cannot be run: ZeroDivisionError"),
        ("def f(run): pass\ndef g(run): pass", "", 2, "it has f, g".replace("it has", "has")),
        ("def f(run): pass", ":g", 2, "it has f"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    text: str, name: str, code: int, said: str, kvtrace_cli: Cli, thrash: Path, tmp_path: Path
) -> None:
    mine = written(tmp_path, text)
    done = kvtrace_cli(
        "report", thrash, "-o", tmp_path / "page.html", "--section", f"{mine}{name}", "--section", "setup"
    )
    assert done.code == code
    assert said in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not (tmp_path / "page.html").exists()


def test_the_docs_name_every_section_and_their_example_works(kvtrace_cli: Cli, thrash: Path, tmp_path: Path) -> None:
    docs = Path(__file__).parents[3] / "docs" / "report.md"
    text = docs.read_text("utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == [entry.name for entry in sections()]
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    mine = written(tmp_path, first)
    done = kvtrace_cli(
        "report", thrash, "-o", tmp_path / "page.html", "--section", "setup", "--section", f"{mine}:prompts"
    )
    assert done.code == 0, done.err
    assert "192 prompts, by their arrival." in (tmp_path / "page.html").read_text("utf-8")
    assert chosen([f"{written(tmp_path, second)}:prompts"])[-1].title == "How long prompts are"


def test_names_are_told_apart() -> None:
    entries = sections()
    assert len({entry.name for entry in entries}) == len(entries)
    assert sum(len(entry.plots) for entry in entries) == len(plots())
    assert [entry.order for entry in entries] == sorted(entry.order for entry in entries)
