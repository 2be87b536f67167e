"""Why Numba would not compile a policy, in a line."""

from __future__ import annotations

import re
from pathlib import Path

_FUNCTION = re.compile(r"CPUDispatcher\(<function (?:\w+\.)+(\w+) at ")  # of a class
_LINE = re.compile(r'File "([^"<>]+)", line (\d+)')
_CAUSE = re.compile(
    r"(?:\w+Error: (?!Failed in)|Cannot |Can't |Invalid use|No (?:conversion|implementation)|Unknown attribute"
    r"|Unsupported|Use of unsupported|Type of variable|Variable .* referenced before).+"
)
_OURS = Path(__file__).resolve().parents[1]


def reason(error: Exception) -> str:
    """The cause among the many lines of a Numba error, with the policy's function and the line, where it tells them.

    Numba tells the outermost failure first: what could not be compiled for want of the policy's function. The cause is
    what it names last.
    """
    text = str(error)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    causes = [match[0] for line in lines if (match := _CAUSE.match(line)) and "<function " not in line]
    found = causes[-1] if causes else next((line for line in lines[1:] if "Error" in line or ": " in line), lines[0])
    functions = _FUNCTION.findall(text)
    theirs = [(file, line) for file, line in _LINE.findall(text) if "/numba/" not in file]
    places = [(file, line) for file, line in theirs if _OURS not in Path(file).resolve().parents]
    where = f", in {functions[-1]}" if functions else ""
    if places:
        where += f", {Path(places[-1][0]).name}:{places[-1][1]}"
    return f"{found.rstrip('.')}{where or ' (KVTRACE_DEBUG=1 shows where)'}"
