"""kvtrace's tracer: records what vLLM's scheduler and block pool do, from inside the serving process.

Standard library only. vLLM loads :func:`register` as a ``vllm.general_plugins`` entry point in each of its processes;
it does nothing unless the environment variable ``KVTRACE_OUT`` names a folder.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("vllm.kvtrace")


def register() -> None:
    """Arm the tracer if ``KVTRACE_OUT`` asks for it. Never raises: vLLM calls plugins without a safety net."""
    try:
        from kvtrace_tracer.settings import from_environment

        if from_environment() is not None:
            from kvtrace_tracer.arm import arm

            arm()
    except Exception as error:
        _log.error("kvtrace: not recording: %s", error)
