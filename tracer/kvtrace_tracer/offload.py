"""Which blocks go to a slower tier and back, for whom, and when that ended: the connectors that are followed.

One module for each of vLLM's connectors (0.32.0): ``offload_jobs`` for OffloadingConnector, ``offload_events`` for
SimpleCPUOffloadConnector. Where none is configured, or another one, nothing is hooked.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvtrace_tracer import offload_events, offload_jobs

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

FOLLOWED = (offload_jobs, offload_events)


def install(hooks: Hooks) -> None:
    """Put the hooks on the connectors of ``hooks``' scheduler that are followed, if it has any."""
    for connector, module in followed(hooks.scheduler):
        module.install(hooks, connector)


def describe(scheduler: Any) -> dict[str, Any] | None:
    """What the header tells of the slower tier; None without a connector that is followed."""
    for connector, module in followed(scheduler):
        return {"connector": type(connector).__name__, **module.describe(connector)}
    return None


def followed(scheduler: Any) -> Iterator[tuple[Any, ModuleType]]:
    """The connectors of a scheduler that are followed, with their modules; several may stand in one."""
    connector = getattr(scheduler, "connector", None)
    for one in getattr(connector, "_connectors", None) or (() if connector is None else (connector,)):
        for module in FOLLOWED:
            if module.plans(one):
                yield one, module
