"""Waits for vLLM's scheduler to be imported, then attaches a recorder to every scheduler that is made."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from kvtrace_tracer.settings import from_environment

SCHEDULER_MODULE = "vllm.v1.core.sched.scheduler"
_log = logging.getLogger("vllm.kvtrace")


def arm() -> None:
    """Attach to schedulers made from now on, as the environment says when each is made.

    Idempotent: vLLM may load a plugin several times in a process.
    """
    module = sys.modules.get(SCHEDULER_MODULE)
    if module is not None and hasattr(module, "Scheduler"):
        _patch(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import system do its work and patches the scheduler's module right after it ran.

    The plugin is loaded before the scheduler is imported, and importing it here would change vLLM's import order.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SCHEDULER_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            try:
                _patch(module)
            except Exception as error:
                _log.error("kvtrace: not recording: %s", error)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: Any) -> None:
    scheduler_class = module.Scheduler
    original = scheduler_class.__init__
    if getattr(original, "kvtrace_armed", False):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        try:
            settings = from_environment()
            if settings is not None:
                from kvtrace_tracer.attach import attach

                attach(self, settings)
        except Exception as error:
            _log.error("kvtrace: not recording this engine: %s: %s", type(error).__name__, error)

    __init__.kvtrace_armed = True  # type: ignore[attr-defined]
    scheduler_class.__init__ = __init__
