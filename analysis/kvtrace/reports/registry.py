"""The sections of a report: one file each in `sections/`, found by their decorator.

A section is a function that takes a `Run` and yields `Panel`s:

    @section("hits", title="Hits and misses", order=40, plots={"hits": "Where the looked-up tokens were found."})
    def hits(run):
        frame = run.sql("SELECT ... FROM misses WHERE engine_index = {engine}")
        yield Panel("hits", "In words.", figure, frame)

With `across=True` it takes the list of all runs. A function of one's own needs no decorator: `kvtrace report TRACE
--section ./mine.py:my_section`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from kvtrace.reports.page import Panel
from kvtrace_traces.errors import KvtraceError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
LAST = 1000
_FILE = re.compile(r"(?P<file>.*\.py)(?::(?P<name>\w+))?")


@dataclass(frozen=True)
class Entry:
    """A section: `order` places it on the page, `plots` names its charts with a line about each, `across`: it compares
    runs, and is there where there are several; `label`: what the list of sections calls it."""

    name: str
    title: str
    order: int
    plots: Mapping[str, str]
    make: Callable[[Any], Any]
    across: bool = False
    label: str = ""
    own: bool = False  # the user's

    def panels(self, runs: Any) -> Iterator[Panel]:
        """The panels of one run, or of all where the section goes across them.

        Raises KvtraceError where a section of the user's own fails.
        """
        try:
            made = self.make(runs)
            yield from _panels([made] if isinstance(made, Panel) else made)
        except KvtraceError:
            raise
        except Exception as error:
            if not self.own:
                raise
            raise KvtraceError(f"section {self.name!r} failed: {type(error).__name__}: {error}") from error


def _panels(made: Any) -> Iterator[Panel]:
    if not hasattr(made, "__iter__"):
        raise TypeError("a section returns a Panel, or several")
    for panel in made:
        if not isinstance(panel, Panel):
            raise TypeError(f"a section returns Panels, not {type(panel).__name__}")
        yield panel


_entries: dict[str, Entry] = {}


def section(
    name: str,
    *,
    title: str,
    order: int = LAST,
    plots: Mapping[str, str] | None = None,
    across: bool = False,
    label: str = "",
) -> Callable[[F], F]:
    """Registers the function below it as section `name`; see `Entry`."""

    def register(function: F) -> F:
        _entries[name] = Entry(name, title, order, dict(plots or {}), function, across, label)
        return function

    return register


@cache
def _load_all() -> None:
    import kvtrace.reports.sections as package

    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def sections() -> list[Entry]:
    """Every section that comes with kvtrace, in the order of the page."""
    _load_all()
    return sorted((entry for entry in _entries.values() if not entry.own), key=lambda entry: entry.order)


def plots() -> dict[str, str]:
    """Every plot by name, with a line about each, in the order of the page."""
    return {name: words for entry in sections() for name, words in entry.plots.items()}


def chosen(wanted: list[str]) -> list[Entry]:
    """The sections to show: all, or those that `wanted` names; files (`./mine.py:my_section`) add to them.

    Raises UsageError for a name that no section has, and for a file that cannot be used.
    """
    _load_all()
    own = [_from_file(text) for text in wanted if _FILE.fullmatch(text)]
    names = [text for text in wanted if not _FILE.fullmatch(text)]
    known = {entry.name: entry for entry in sections()}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no section {name!r}; {_near(name, list(known))} (your own: FILE.py:FUNCTION)")
    shown = [entry for entry in known.values() if not names or entry.name in names]
    replaced = {entry.name for entry in own}
    return [entry for entry in shown if entry.name not in replaced] + own


def with_plot(name: str) -> Entry:
    """The section that has a plot of that name. Raises UsageError, naming what there is, where none has."""
    for entry in sections():
        if name in entry.plots:
            return entry
    raise UsageError(f"there is no plot {name!r}; {_near(name, list(plots()))}")


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 2, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def _from_file(text: str) -> Entry:
    match = _FILE.fullmatch(text)
    assert match is not None
    path, wanted = Path(match["file"]), match["name"]
    if not path.is_file():
        raise UsageError(f"there is no file {path}: write FILE.py:FUNCTION for a section of your own")
    spec = importlib.util.spec_from_file_location(f"kvtrace_section_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    kept = dict(_entries)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:  # a section of a file is asked for by its file alone
        decorated = {entry.make: entry for name, entry in _entries.items() if kept.get(name) is not entry}
        _entries.clear()
        _entries.update(kept)
    functions = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if wanted is None:
        if len(functions) != 1:
            raise UsageError(f"write {path}:FUNCTION; {path} has {', '.join(functions) or 'no function'}")
        wanted = next(iter(functions))
    if wanted not in functions:
        raise UsageError(f"{path} has no function {wanted!r}; it has {', '.join(functions) or 'none'}")
    function = functions[wanted]
    if function in decorated:
        found = decorated[function]
        return replace(found, own=True)
    words = wanted.replace("_", " ")
    return Entry(wanted.replace("_", "-"), words[0].upper() + words[1:], LAST, {}, function, own=True)
