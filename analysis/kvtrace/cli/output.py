"""The output options that every command with a table shares: a table for people, JSON, CSV or Parquet."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.files import refuse_input

if TYPE_CHECKING:
    import polars as pl

    from kvtrace.people import Style

F = TypeVar("F", bound=Callable[..., Any])

CSV_ROWS = 100_000  # written at a time


@dataclass(frozen=True)
class Output:
    """What the user asked for; `kind` is people, json, csv or parquet."""

    kind: str = "people"
    parquet: Path | None = None
    force: bool = False

    def table(self, frame: pl.DataFrame, style: Style | None = None) -> None:
        """Write a frame the way the user asked: on stdout, or to the Parquet file."""
        if self.kind == "json":
            write_json(frame, sys.stdout)
        elif self.kind == "csv":
            # Through Python's own stdout: Polars tells of a closed pipe in words of its own.
            for start in range(0, max(frame.height, 1), CSV_ROWS):
                piece = flat_lists(frame.slice(start, CSV_ROWS))
                sys.stdout.write(piece.write_csv(include_header=start == 0))
        elif self.parquet is not None:
            with replacing(self.parquet, self.force) as part:
                frame.write_parquet(part)
            note(f"wrote {frame.height:,} rows to {self.parquet}")
        else:
            from kvtrace.people import Style, render

            text, hidden = render(frame, style or Style())
            click.echo(text)
            if hidden:
                note(f"the first {frame.height - hidden:,} of {frame.height:,} rows; --csv gives them all")

    def facts(self, *lines: str) -> None:
        """Say, on stderr, what a table's figures rest on."""
        for line in lines:
            note(line)


SUFFIXES = (".csv", ".parquet", ".json")


def table_suffix(path: Path) -> str:
    """The format that a file's name asks for. Raises UsageError where it asks for none of SUFFIXES."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(SUFFIXES)}: name the format by the suffix")
    return path.suffix


def write_table(frame: pl.DataFrame, path: Path, force: bool) -> None:
    """Write a frame to a file in the format of its suffix. Raises UsageError where it exists and not `force`."""
    suffix = table_suffix(path)
    with replacing(path, force) as part:
        if suffix == ".parquet":
            frame.write_parquet(part)
        elif suffix == ".csv":
            flat_lists(frame).write_csv(part)
        else:
            with part.open("w") as out:
                write_json(frame, out)
    note(f"wrote {frame.height:,} rows to {path}")


def output_options(function: F) -> F:
    """Add --json, --csv, --parquet and --force; the command receives them as one `output: Output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
    @click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
    @click.option("--parquet", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write Parquet.")
    @click.option("--force", is_flag=True, help="Overwrite files that exist.")
    def wrapped(*args: Any, as_json: bool, as_csv: bool, parquet: Path | None, force: bool, **rest: Any) -> Any:
        if as_json + as_csv + (parquet is not None) > 1:
            raise UsageError("choose one of --json, --csv and --parquet")
        kind = "json" if as_json else "csv" if as_csv else "parquet" if parquet else "people"
        if parquet is not None:
            refuse_to_overwrite(parquet, force)  # before the work, not after it
        return function(*args, output=Output(kind, parquet, force), **rest)

    return in_place_of(function, wrapped)


def in_place_of(function: F, wrapped: Callable[..., Any]) -> F:
    """`wrapped`, which has options of its own and calls `function`, with the options and the help of `function`."""
    wrapped.__name__ = function.__name__
    wrapped.__doc__ = function.__doc__
    # The options that the function already carries show first in --help: click lists the last added first.
    carried: Any = wrapped
    carried.__click_params__ = carried.__click_params__ + getattr(function, "__click_params__", [])
    found: F = carried
    return found


def note(text: str) -> None:
    """One line for people, on stderr."""
    click.echo(f"kvtrace: {text}", err=True)


def print_object(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False, default=str))


def write_json(frame: pl.DataFrame, out: IO[str]) -> None:
    """Write a list of objects, one a line; NaN and infinities become null."""
    opener = "["
    for row in frame.iter_rows(named=True):
        out.write(opener + "\n" + json.dumps(plain(row), ensure_ascii=False, default=str))
        opener = ","
    out.write("[]\n" if opener == "[" else "\n]\n")


def plain(value: Any) -> Any:
    """The value as JSON can carry it: no NaN, no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def flat_lists(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with lists and structs as JSON text: CSV has no place for them."""
    import polars as pl

    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]

    def text(name: str) -> pl.Series:
        values = [
            None if item is None else json.dumps(plain(item), ensure_ascii=False, default=str)
            for item in frame[name].to_list()
        ]
        return pl.Series(name, values, dtype=pl.String)

    return frame.with_columns([text(name) for name in nested])


def refuse_to_overwrite(path: Path, force: bool) -> None:
    """Raise UsageError where `path` is taken and --force was not given, is an argument of the command that is run, or
    cannot be written at all."""
    refuse_input(path, _arguments())
    if path.is_dir():
        raise UsageError(f"{path} is a folder")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force overwrites it")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}")


def _arguments() -> Iterator[Path]:
    """The files, and folders of traces, among the arguments of the command that is run: what it reads."""
    from kvtrace.cli.traces import TRACE  # which imports this module

    context = click.get_current_context(silent=True)
    if context is None:
        return
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(parameter, click.Argument) and value is not None:
            for one in value if isinstance(value, tuple) else (value,):
                if os.path.isfile(one) or (parameter.type is TRACE and os.path.isdir(one)):
                    yield Path(one)


@contextmanager
def replacing(path: Path, force: bool) -> Iterator[Path]:
    """A file beside `path` to write into; it takes the name of `path` once the block ended well.

    Raises UsageError where `path` exists and not `force`, KvtraceError where the folder cannot be written.
    """
    refuse_to_overwrite(path, force)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise KvtraceError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # mkstemp's 0600 would surprise whoever shares the folder
        part.replace(path)
    except OSError as error:
        raise KvtraceError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
