"""What a source file depends on: itself and all of the project's files that it imports, and those that they import.

Machine code that was compiled from a file stays right for as long as none of these changes, whatever becomes of others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache as once
from pathlib import Path

_OURS = ("kvtrace_traces", "kvtrace_replay", "kvtrace")
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n#]+))", re.MULTILINE
)
_COMMENT = re.compile(r"#[^\n]*")


@once
def sources_hash(file: str, package: str = "") -> str:
    """A short hash of the Python file `file` and of every file of ours, or of its own top-level `package`, that it
    imports, directly or not. A file that cannot be read counts by its name alone."""
    digest = hashlib.sha256()
    for source in sorted(_closure(Path(file), package)):
        digest.update(f"\0{source.name}\0".encode())
        digest.update(_read(source))
    return digest.hexdigest()[:16]


def _closure(file: Path, package: str) -> set[Path]:
    found: set[Path] = set()
    waiting = [file.absolute()]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += _imported(source, package)
    return found


@once
def _imported(source: Path, package: str) -> tuple[Path, ...]:
    files = []
    for origin, names, plain in _IMPORT.findall(_read(source).decode("utf-8", "replace")):
        if plain:
            modules = [part.split(" as ")[0].strip() for part in plain.split(",")]
        else:
            listed = _COMMENT.sub("", names).strip("() \n\t")
            modules = [origin, *(f"{origin}.{part.split(' as ')[0].strip()}" for part in listed.split(","))]
        files += [file for module in modules if (file := _file(module, package)) is not None]
    return tuple(files)


@once
def _file(module: str, package: str) -> Path | None:
    """The file of a module of ours; None for others, and for names that are no modules."""
    top, *rest = module.split(".")
    if top not in _OURS and top != package:
        return None
    for folder in _folders(top):
        base = folder.joinpath(*rest)
        for candidate in (base.with_suffix(".py") if rest else None, base / "__init__.py"):
            if candidate is not None and _exists(candidate):
                return candidate
    return None


@once
def _exists(file: Path) -> bool:
    return file.is_file()


@once
def _folders(top: str) -> tuple[Path, ...]:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return ()
    return tuple(Path(folder).absolute() for folder in (spec.submodule_search_locations or ())) if spec else ()


@once
def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
