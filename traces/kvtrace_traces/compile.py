"""The project's one way of compiling with Numba: `njit`, and `warm` to compile ahead of a measurement.

Plain `numba.njit(cache=True)` has three habits that hurt here, and this module is the cure for each:

- it keeps stale machine code when a helper in *another* file changes: here the code is stamped with a hash of
  every source of ours that the function's file imports, directly or not (`sources`);
- it raises at import when no folder is writable: here the function is compiled at each start instead;
- it pickles every argument type into one index, so that a type which only one process knows (a user's own
  policy file) makes the index unreadable for all others: here the index holds the types' names.

The folder is `$KVTRACE_CACHE_DIR`, else `$NUMBA_CACHE_DIR`, else `$XDG_CACHE_HOME/kvtrace`, else
`~/.cache/kvtrace`. The first compilation in a process is announced on stderr, once.

Never import this from `kvtrace_traces/__init__.py`: the tracer imports that package, without Numba.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any, TypeVar, overload

import numba
from numba.core import caching
from numba.core.runtime import rtsys

from kvtrace_traces.sources import sources_hash

F = TypeVar("F", bound=Callable[..., Any])

_VERSIONS = hashlib.sha256(f"{numba.__version__} {sys.version}".encode()).hexdigest()[:12]
_KEEP_DAYS = 30.0
_announced = threading.Event()


def _root() -> Path:
    for variable, tail in (("KVTRACE_CACHE_DIR", ""), ("NUMBA_CACHE_DIR", ""), ("XDG_CACHE_HOME", "kvtrace")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).absolute() / tail
    return Path("~/.cache/kvtrace").expanduser()


@once
def cache_folder() -> Path | None:
    """The folder of the machine code that this Numba and this Python make, made when missing; None where none can be
    written."""
    try:
        folder = _root() / f"compiled-{_VERSIONS}"
        # 0700: what lies here is loaded as code, so nobody else may write it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.utime(folder)  # marks it as in use for _prune
        _prune(folder)
    except (OSError, RuntimeError):  # no home folder
        return None
    return folder


def _prune(current: Path) -> None:
    """Removes the folders of other versions that no process has opened for `_KEEP_DAYS`."""
    oldest = time.time() - _KEEP_DAYS * 86_400
    for folder in current.parent.glob("compiled-*"):
        with contextlib.suppress(OSError):
            if folder != current and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _package(function: Callable[..., Any]) -> str:
    return function.__module__.partition(".")[0]


def _announce(kept_on_disk: bool) -> None:
    if not _announced.is_set():
        _announced.set()
        kept = "once" if kept_on_disk else "at each start: no writable cache folder, set KVTRACE_CACHE_DIR"
        print(f"kvtrace: compiling for this machine ({kept}) ...", file=sys.stderr, flush=True)


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """Puts the cache of every function into `cache_folder()`, whatever the mtime of its source. Code whose stamp is
    another is taken for missing, and replaced."""

    def __init__(self, folder: Path, py_file: str, package: str) -> None:
        self._folder = folder
        self._py_file = py_file
        self._package = package

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator | None:
        folder = cache_folder()
        return cls(folder, py_file, _package(py_func)) if folder else None

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return sources_hash(self._py_file, self._package)

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
            # Numba would first make itself ready to compile, for a third of a second: machine code needs only the
            # runtime that it calls.
            rtsys.initialize(target_context)
            with self._guard_against_spurious_io_errors():
                found = self._load_overload(sig, target_context)
        except Exception:  # a truncated or foreign file: compile as if it were not there
            found = None
            with contextlib.suppress(Exception):
                self.flush()
        if found is None:
            _announce(True)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):  # a full disk must not fail the run
            super().save_overload(sig, data)


class _NoCache(caching.NullCache):  # type: ignore[misc]
    """Where nothing can be written: compiles, and says so."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        _announce(False)


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
        options: further options of `numba.njit`; the defaults here are `nogil=True`, `error_model="numpy"`.

    Returns the dispatcher, typed as the function it compiles.
    """

    def decorate(target: F) -> F:
        dispatcher = numba.njit(**{"nogil": True, "error_model": "numpy", **options})(target)
        if cache:
            _attach_cache(dispatcher, target)
        return dispatcher

    return decorate if function is None else decorate(function)


def warm(kernel: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Compiles `kernel`, or loads it from the cache, for the types of `args`, without running it."""
    if hasattr(kernel, "compile"):
        kernel.compile(tuple(numba.typeof(arg) for arg in args))
