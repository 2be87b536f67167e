"""vLLM's own scheduler with its SimpleCPUOffloadConnector as the judge of what is simulated and recorded of
it; see judge.py."""

from __future__ import annotations

from dataclasses import asdict

from .cases import Case
from .judge import Endless, JudgeError, JudgeProcess
from .twin_simple import Simple, SimpleRun


class SimpleJudgeProcess(JudgeProcess):
    """A process with the installed vLLM."""

    program = "judge_simple_engine.py"

    def offloaded(self, case: Case, offload: Simple, model: str, folder: str | None = None) -> SimpleRun:
        """Run `case` with a connector, recorded to `folder` if given. Raises as `run`."""
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
