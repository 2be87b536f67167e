"""What a finding is, and how one is declared: a function in a file of `findings/`, with a decorator."""

from __future__ import annotations

import ast
import importlib
import operator
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtrace.advice.case import Case

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A number that a command prints: with `--json`, in `column` of the row in which `where` holds.

    `name` is what the finding calls it; `value` is None where the command prints null.
    """

    name: str
    value: float | None
    unit: str
    command: str
    column: str
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One piece of advice, or of what cannot be told.

    `value` (in `unit`) is `formula` over the names of `figures`; None where there is none. `low` and `high` bound it as
    `uncertainty` says. `worth_tokens`: tokens of prefill that acting on it saves, by which findings are ranked; None
    where that is no number. `seconds`: those tokens in time, where the trace tells what a token costs.
    """

    kind: str
    text: str
    figures: tuple[Figure, ...]
    formula: str | None
    value: float | None
    unit: str
    low: float | None
    high: float | None
    uncertainty: str
    worth_tokens: float | None = None
    seconds: float | None = None

    @property
    def command(self) -> str:
        """What prints the first of its figures."""
        return self.figures[0].command


Adviser = Callable[["Case"], Iterator[Finding]]
_ADVISERS: dict[str, Adviser] = {}


def adviser(kind: str) -> Callable[[Adviser], Adviser]:
    """Register a function that looks for findings of `kind`; the file lies in `findings/`."""

    def register(function: Adviser) -> Adviser:
        _ADVISERS[kind] = function
        return function

    return register


def advisers() -> dict[str, Adviser]:
    """All of them, by the kind of what they find."""
    from kvtrace.advice import findings

    for module in pkgutil.iter_modules(findings.__path__):
        importlib.import_module(f"{findings.__name__}.{module.name}")
    return dict(sorted(_ADVISERS.items()))


def worked(formula: str, figures: Sequence[Figure]) -> float:
    """The value of a formula of sums, differences, products and quotients over the figures' names."""
    values = {figure.name: figure.value for figure in figures}

    def of(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Name):
            value = values[node.id]
            assert value is not None, f"{node.id} has no value"
            return value
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int | float)
        return node.value

    return of(ast.parse(formula, mode="eval").body)
