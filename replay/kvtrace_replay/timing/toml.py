"""A profile as TOML: written so that every figure reads back exactly, read so that a wrong file says what is wrong."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtrace_replay.timing.link import WAYS, LinkCost
from kvtrace_replay.timing.work import COLUMNS, KINDS
from kvtrace_traces.errors import KvtraceError

if TYPE_CHECKING:
    from kvtrace_replay.timing.profile import Profile

MOST_BYTES = 16 << 20
_TOP = (
    "format", "name", "source", "device", "stretch", "model", "costs_ns", "spread_ns", "unidentified", "link", "facts",
    "errors", "measured",
)  # fmt: skip


# ------------------------------------------------------------------ writing


def written(profile: Profile) -> str:
    """The profile as TOML."""
    from kvtrace_replay.timing.profile import FORMAT

    model = {
        "name": profile.model.name, "layers": profile.model.layers, "kv_tensors": profile.model.kv_tensors,
        "kv_bytes_per_token": profile.model.kv_bytes_per_token,
    }  # fmt: skip
    parts = [
        "# What steps and moves of KV blocks cost, in nanoseconds for a unit of work. docs/timing.md tells more.",
        *_lines({"format": FORMAT, "name": profile.name, "source": profile.source, "device": profile.device}),
        *_lines({"stretch": profile.stretch} if profile.stretch != 1 else {}),
        *_table("model", model),
        *_table("costs_ns", profile.costs),
        *_table("spread_ns", {name: list(pair) for name, pair in profile.spread.items()}),
        *_table("unidentified", profile.unidentified),
        *_table("facts", profile.facts),
    ]
    for name, cost in profile.link.items():
        parts += _table(f"link.{name}", vars(cost))
    for error in profile.errors:
        parts += ["", "[[errors]]", *_lines(vars(error))]
    if profile.measured:
        rows = (f"  [{', '.join(map(_value, vars(point).values()))}]," for point in profile.measured)
        head = "# what, size (tokens, rows, bytes), context (tokens, copies), median, first and third quartile in ns"
        parts += ["", "[measured]", head, "points = [", *rows, "]"]
    return "\n".join(parts) + "\n"


def _table(name: str, values: dict[str, Any]) -> list[str]:
    return ["", f"[{name}]", *_lines(values)] if values else []


def _lines(values: dict[str, Any]) -> Iterable[str]:
    return [f"{name} = {_value(value)}" for name, value in values.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
        text = json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=False)
        return text.replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        raise KvtraceError(f"a profile cannot hold {value}: a cost must be a finite number")
    return repr(float(value)) if isinstance(value, float) else str(int(value))


# ------------------------------------------------------------------ reading


def profile_of(path: Path) -> Profile:
    """The profile in a TOML file. Raises KvtraceError, one line, where it is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise KvtraceError(f"{path} is no profile: it is larger than {MOST_BYTES >> 20} MiB")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KvtraceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # wrong TOML, wrong UTF-8, numbers or nesting beyond reason
        raise KvtraceError(f"{path} is no TOML: {' '.join(str(error).split())}") from None
    return _Reader(path).profile(data)


class _Reader:
    """Turns tables of a file into a profile; every complaint names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, text: str) -> KvtraceError:
        return KvtraceError(f"{self.path} is no profile: {text}")

    def profile(self, data: dict[str, Any]) -> Profile:
        from kvtrace_replay.timing.profile import FORMAT, SOURCES, Profile

        if data.get("format") != FORMAT or isinstance(data["format"], bool):
            raise self.wrong(f"its format is {data.get('format')!r}, and this kvtrace reads format {FORMAT}")
        self.known("", data, _TOP)
        source = self.text(data, "source")
        if source not in SOURCES:
            raise self.wrong(f"source {source!r} is none of {', '.join(SOURCES)}")
        return Profile(
            self.text(data, "name"),
            source,
            self.text(data, "device"),
            self.model(self.table(data, "model", required=True)),
            self.costs(self.table(data, "costs_ns", required=True)),
            self.spread(self.table(data, "spread_ns")),
            self.unidentified(self.table(data, "unidentified")),
            self.link(self.table(data, "link")),
            tuple(self.rows(data, "errors", self.error)),
            self.facts(self.table(data, "facts")),
            tuple(self.points(self.table(data, "measured"))),
            self.stretch(data),
        )

    def stretch(self, data: dict[str, Any]) -> float:
        found = self.number(data, "stretch") if "stretch" in data else 1.0
        if found <= 0:
            raise self.wrong("stretch must be above 0")
        return found

    def model(self, table: dict[str, Any]) -> Any:
        from kvtrace_replay.timing.profile import Model

        self.known("model.", table, ("name", "layers", "kv_tensors", "kv_bytes_per_token"))
        whole = {name: self.whole(table, name, "model.") for name in ("layers", "kv_tensors")}
        size = self.whole(table, "kv_bytes_per_token", "model.") if "kv_bytes_per_token" in table else None
        return Model(self.text(table, "name", "model."), **whole, kv_bytes_per_token=size)

    def costs(self, table: dict[str, Any]) -> dict[str, float]:
        self.known("costs_ns.", table, COLUMNS)
        return {name: self.number(table, name, "costs_ns.") for name in COLUMNS}

    def spread(self, table: dict[str, Any]) -> dict[str, tuple[float, float]]:
        self.known("spread_ns.", table, COLUMNS)
        found = {}
        for name, pair in table.items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.wrong(f"spread_ns.{name} must be two numbers")
            low, high = (self.number({name: value}, name, "spread_ns.") for value in pair)
            found[name] = (low, high)
        return found

    def unidentified(self, table: dict[str, Any]) -> dict[str, str]:
        self.known("unidentified.", table, COLUMNS)
        return {name: self.text(table, name, "unidentified.") for name in table}

    def link(self, table: dict[str, Any]) -> dict[str, LinkCost]:
        self.known("link.", table, WAYS)
        found = {}
        for name in table:
            one, at = self.table(table, name), f"link.{name}."
            self.known(at, one, ("transfer_ns", "copy_ns", "bytes_per_s"))
            rate = self.number(one, "bytes_per_s", at)
            if rate <= 0:
                raise self.wrong(f"{at}bytes_per_s must be above 0")
            found[name] = LinkCost(self.number(one, "transfer_ns", at), self.number(one, "copy_ns", at), rate)
        return found

    def error(self, table: dict[str, Any]) -> Any:
        from kvtrace_replay.timing.fit import FitError

        self.known("errors.", table, ("batch", "steps", "median", "p95", "bias"))
        batch = self.text(table, "batch", "errors.")
        if batch not in ("all", *KINDS):
            raise self.wrong(f"errors.batch {batch!r} is none of all, {', '.join(KINDS)}")
        return FitError(
            batch, self.whole(table, "steps", "errors."), self.number(table, "median", "errors."),
            self.number(table, "p95", "errors."), self.number(table, "bias", "errors.", least=-1),
        )  # fmt: skip

    def points(self, table: dict[str, Any]) -> Iterable[Any]:
        from kvtrace_replay.timing.profile import Measured

        self.known("measured.", table, ("points",))
        points = table.get("points", [])
        if not isinstance(points, list):
            raise self.wrong("measured.points must be a list")
        for point in points:
            if not isinstance(point, list) or len(point) != 6:
                raise self.wrong("each of measured.points must be [what, size, context, median, q1, q3]")
            named = dict(zip(("what", "size", "context", "median", "q1", "q3"), point, strict=True))
            at = "measured.points."
            yield Measured(
                self.text(named, "what", at), self.whole(named, "size", at, 0), self.whole(named, "context", at, 0),
                *(self.number(named, name, at) for name in ("median", "q1", "q3")),
            )  # fmt: skip

    def facts(self, table: dict[str, Any]) -> dict[str, str | int | float]:
        for name, value in table.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise self.wrong(f"facts.{name} must be a text or a number")
            if isinstance(value, int | float):
                self.number(table, name, "facts.", least=-math.inf)
        return table

    # -------------------------------------------------------------- values

    def known(self, at: str, table: dict[str, Any], names: Iterable[str]) -> None:
        names = list(names)
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                raise self.wrong(f"{at}{key} is unknown" + (f": did you mean {near[0]}?" if near else ""))

    def value(self, table: dict[str, Any], name: str, at: str) -> Any:
        if name not in table:
            raise self.wrong(f"{at}{name} is missing")
        return table[name]

    def text(self, table: dict[str, Any], name: str, at: str = "") -> str:
        value = self.value(table, name, at)
        if not isinstance(value, str):
            raise self.wrong(f"{at}{name} must be a text")
        return value

    def table(self, table: dict[str, Any], name: str, required: bool = False) -> dict[str, Any]:
        value = self.value(table, name, "") if required else table.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(f"{name} must be a table")
        return value

    def rows(self, table: dict[str, Any], name: str, read: Callable[[dict[str, Any]], Any]) -> Iterable[Any]:
        value = table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self.wrong(f"{name} must be a list of tables")
        return (read(row) for row in value)

    def number(self, table: dict[str, Any], name: str, at: str = "", least: float = 0) -> float:
        value = self.value(table, name, at)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300 or value < least:
            raise self.wrong(f"{at}{name} must be a finite number" + (f" from {least:g} on" if least > -1e9 else ""))
        return float(value)

    def whole(self, table: dict[str, Any], name: str, at: str = "", least: int = 1) -> int:
        value = self.value(table, name, at)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise self.wrong(f"{at}{name} must be a whole number from {least} on")
        return value
