"""The project's one way of compiling with Numba: `njit`, and `warm` to compile ahead of a measurement.

Plain `numba.njit(cache=True)` has three habits that hurt here, and this module is the cure for each:

- it keeps stale machine code when a helper in *another* file changes: here the cache folder's name holds a
  hash of the sources of all kvtrace packages and of Numba's and Python's versions;
- it raises at import when no folder is writable: here the function is compiled at each start instead;
- it pickles every argument type into one index, so that a type which only one process knows (a user's own
  policy file) makes the index unreadable for all others: here the index holds the types' names.

The folder is `$KVTRACE_CACHE_DIR`, else `$NUMBA_CACHE_DIR`, else `$XDG_CACHE_HOME/kvtrace`, else
`~/.cache/kvtrace`. The first compilation in a process is announced on stderr, once.

Never import this from `kvtrace_traces/__init__.py`: the tracer imports that package and must stay free of Numba.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache as once
from pathlib import Path
from typing import Any, TypeVar, overload

import numba
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGES = ("kvtrace_traces", "kvtrace_tracer", "kvtrace_replay", "kvtrace")
_KEEP_DAYS = 30.0
_announced = threading.Event()


def _source_files() -> Iterable[Path]:
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).rglob("*.py"))


def sources_hash(files: Iterable[Path] | None = None) -> str:
    """A short hash of the contents of `files` (default: every source of the kvtrace packages) and of the
    versions that compiled code depends on. A file that cannot be read counts by its name alone."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version}".encode())
    for file in _source_files() if files is None else files:
        digest.update(f"\0{file.name}\0".encode())
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _root() -> Path:
    for variable, tail in (("KVTRACE_CACHE_DIR", ""), ("NUMBA_CACHE_DIR", ""), ("XDG_CACHE_HOME", "kvtrace")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).absolute() / tail
    return Path("~/.cache/kvtrace").expanduser()


@once
def cache_folder() -> Path | None:
    """The folder of this version's machine code, made when missing; None where none can be written."""
    try:
        folder = _root() / f"compiled-{sources_hash()}"
        # 0700: what lies here is loaded as code, so nobody else may write it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.utime(folder)  # marks it as in use for _prune
        _prune(folder)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    return folder


def _prune(current: Path) -> None:
    """Removes the folders of other versions that no process has opened for `_KEEP_DAYS`."""
    oldest = time.time() - _KEEP_DAYS * 86_400
    for folder in current.parent.glob("compiled-*"):
        with contextlib.suppress(OSError):
            if folder != current and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _announce() -> None:
    if not _announced.is_set():
        _announced.set()
        kept = "once" if cache_folder() else "at each start: no writable cache folder, set KVTRACE_CACHE_DIR"
        print(f"kvtrace: compiling for this machine ({kept}) ...", file=sys.stderr, flush=True)


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """Puts the cache of every function into `cache_folder()`, whatever the mtime of its source."""

    def __init__(self, py_file: str) -> None:
        self._py_file = py_file

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator | None:
        return cls(py_file) if cache_folder() else None

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return "by folder"

    def get_disambiguator(self) -> str:
        return hashlib.sha256(self._py_file.encode()).hexdigest()[:10]


class _Impl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, py_func: Callable[..., Any]) -> None:
        self._locator_classes = [_Locator]
        self._is_closure = False
        super().__init__(py_func)


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """Numba's function cache, except that no failure of it is ever the caller's failure."""

    _impl_class = _Impl

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # Numba's own key holds the types themselves; see the module's third point.
        names = str(sig)
        return (names, codegen.magic_tuple(), hashlib.sha256(self._py_func.__code__.co_code).hexdigest())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # a truncated or foreign file: compile as if it were not there
            found = None
            with contextlib.suppress(Exception):
                self.flush()
        if found is None:
            _announce()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):  # a full disk must not fail the run
            super().save_overload(sig, data)


class _NoCache(caching.NullCache):  # type: ignore[misc]
    """Where nothing can be written: compiles, and says so."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        _announce()


def _attach_cache(dispatcher: Any, function: Callable[..., Any]) -> None:
    if not hasattr(dispatcher, "_cache"):  # NUMBA_DISABLE_JIT: njit handed the plain function back
        return
    try:
        dispatcher._cache = _Cache(function) if cache_folder() else _NoCache()
    except (RuntimeError, OSError):  # e.g. a function without a source file
        dispatcher._cache = _NoCache()


@overload
def njit(function: F) -> F: ...
@overload
def njit(*, cache: bool = ..., **options: Any) -> Callable[[F], F]: ...
def njit(function: F | None = None, *, cache: bool = True, **options: Any) -> F | Callable[[F], F]:
    """`numba.njit` with the GIL released and with a disk cache that is neither stale nor fatal.

    Args:
        function: what to compile, when used as a bare decorator.
        cache: keep the machine code on disk. False for small helpers that other compiled functions call:
            they are compiled into their callers, and their own file would never be read.
        options: further options of `numba.njit`; `nogil=True` and `error_model="numpy"` are the defaults here.

    Returns the dispatcher, typed as the function it compiles.
    """

    def decorate(target: F) -> F:
        dispatcher = numba.njit(**{"nogil": True, "error_model": "numpy", **options})(target)
        if cache:
            _attach_cache(dispatcher, target)
        return dispatcher  # type: ignore[no-any-return]

    return decorate if function is None else decorate(function)


def warm(kernel: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Compiles `kernel`, or loads it from the cache, for the types of `args`, without running it."""
    if hasattr(kernel, "compile"):
        kernel.compile(tuple(numba.typeof(arg) for arg in args))
