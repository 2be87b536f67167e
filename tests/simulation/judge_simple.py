"""vLLM's own scheduler with its SimpleCPUOffloadConnector as the judge of what is recorded of it; see judge.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .cases import Case
from .judge import Endless, JudgeError, JudgeProcess
from .twin_offload_words import OffloadRun


@dataclass(frozen=True)
class Simple:
    """The connector's settings: room for `chunks` blocks, `lazy` or eager; `polls` of the worker; steps before which
    all that is cached on the host is forgotten, and in the engine too if no block is in use."""

    chunks: int
    lazy: bool
    polls: int = 0
    resets: tuple[int, ...] = ()


@dataclass
class SimpleRun(OffloadRun):
    """`OffloadRun`, of whose transfers a request may be None; blocks forgotten on the host; `kinds` of stores."""

    evicted: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


class SimpleJudgeProcess(JudgeProcess):
    """A process with the installed vLLM."""

    program = "judge_simple_engine.py"

    def offloaded(self, case: Case, offload: Simple, model: str, folder: str) -> SimpleRun:
        """Run `case` with a connector, recorded to `folder`. Raises as `run`."""
        result = self.ask(
            {
                "settings": {key: value for key, value in asdict(case.settings).items() if key != "rules"},
                "requests": [asdict(request) for request in case.requests],
                "tokens": case.tokens,
                "model": model,
                "offload": asdict(offload),
                "folder": folder,
            }
        )
        if result.get("error") == "endless":
            raise Endless
        if "error" in result:
            raise JudgeError(result["error"])
        return SimpleRun(**result)
