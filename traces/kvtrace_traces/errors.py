"""The two kinds of error that kvtrace shows a user. Every message is one line and names the fix."""

from __future__ import annotations


class KvtraceError(Exception):
    """The work could not be done (exit code 1): a file is not a trace, a run failed, content is damaged."""


class UsageError(KvtraceError):
    """The request itself is wrong (exit code 2): an unknown name, an option out of range, an output that exists."""
