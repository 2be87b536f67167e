"""vLLM's own scheduler with its OffloadingConnector as the judge of a re-simulation; see judge.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .cases import Case
from .judge import Endless, JudgeError, JudgeProcess
from .twin_offload_words import Offload, OffloadRun


class OffloadJudgeProcess(JudgeProcess):
    """A process with the installed vLLM."""

    program = "judge_offload_engine.py"

    def offloaded(self, case: Case, offload: Offload, model: str, folder: str | None = None) -> OffloadRun:
        """Run `case` with a connector, recorded to `folder` if given. Raises as `run`."""
        order: dict[str, Any] = {
            "settings": {key: value for key, value in asdict(case.settings).items() if key != "rules"},
            "requests": [asdict(request) for request in case.requests],
            "tokens": case.tokens,
            "model": model,
            "offload": asdict(offload),
            "folder": folder,
        }
        result = self.ask(order)
        if result.get("error") == "endless":
            raise Endless
        if "error" in result:
            raise JudgeError(result["error"])
        return OffloadRun(**result)
