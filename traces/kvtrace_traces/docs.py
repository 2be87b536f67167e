"""Writes the tables of ``docs/format.md`` and all of ``docs/tables.md`` from the schema, or checks them.

python -m kvtrace_traces.docs --check | --write
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from kvtrace_traces.schema import ENUMS, EXT_OPS, INEXACT, OPS, TABLES, Op

DOCS = Path(__file__).parents[2] / "docs"
_TYPES = {
    "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64", "u64": "uint64", "f64": "float64", "bool": "bool",
    "str": "string",
}  # fmt: skip


def operations(ops: dict[str, Op], first: str) -> str:
    """A Markdown table of operations; ``first`` heads the column of operands, "" leaves it out."""
    names = ["code", "name", *([first] if first else []), "words that follow", "meaning"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for op in sorted(ops.values(), key=lambda o: o.code):
        operand = [op.operand] if first else []
        cells = [str(op.code), f"`{op.name}`", *operand, op.words or "none", op.doc]
        lines.append("| " + " | ".join(cell.replace("*", "\\*") for cell in cells) + " |")
    return "\n".join(lines)


def generated() -> dict[str, str]:
    """What stands between the markers of ``docs/format.md``, by name of the marker."""
    return {
        "operations": operations(OPS, "operand"),
        "extended": operations(EXT_OPS, ""),
        "reasons": "\n".join(
            f"- {name.replace('_', ' ')}s: " + ", ".join(f"{i} `{value}`" for i, value in enumerate(values))
            for name, values in ENUMS.items()
            if name != "block_event"
        ),
        "inexact": "| index | name | meaning |\n|---|---|---|\n"
        + "\n".join(f"| {i} | `{name}` | {why} |" for i, (name, why) in enumerate(INEXACT.items())),
    }


def tables() -> str:
    """All of ``docs/tables.md``."""
    parts = [
        "# Tables of a trace\n",
        "Made from `traces/kvtrace_traces/schema.py` by `python -m kvtrace_traces.docs --write`. Columns in *italics*",
        "may be null. Times in nanoseconds count from the header's clock reading: the wall's is `clock_wall_ns` more.",
    ]
    for table in TABLES.values():
        parts.append(f"\n## {table.name}\n\n{table.doc[0].upper()}{table.doc[1:]}.\n")
        parts.append("| column | type | unit | meaning |\n|---|---|---|---|")
        for column in table.columns:
            name = f"*{column.name}*" if column.nullable else column.name
            kind = column.dtype
            if kind.startswith("enum:"):
                kind = "one of " + " ".join(f"`{value}`" for value in ENUMS[kind[5:]])
            parts.append(f"| {name} | {_TYPES.get(kind, kind)} | {column.unit} | {column.doc} |")
    return "\n".join(parts) + "\n"


def filled(text: str) -> str:
    """``docs/format.md`` with its generated parts renewed. Raises :class:`KeyError` for a marker that is not known."""
    parts = generated()

    def renew(match: re.Match[str]) -> str:
        return f"{match[1]}\n{parts[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- begin (\w+) -->)\n.*?\n?(<!-- end \2 -->)", renew, text, flags=re.DOTALL)


def main() -> int:
    """Check or write both files. Exit code 1 where a check finds one out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", action="store_true", help="fail if a file is out of date")
    choice.add_argument("--write", action="store_true", help="renew the files")
    write = parser.parse_args().write
    reference = DOCS / "format.md"
    stale = []
    wanted = {reference: filled(reference.read_text()), DOCS / "tables.md": tables()}
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if write:
                path.write_text(text)
    if stale and not write:
        print(f"out of date: {', '.join(stale)}; run `python -m kvtrace_traces.docs --write`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
