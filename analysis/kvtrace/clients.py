"""The client's own name in the engine's name of a request.

vLLM's front end (0.32.0) makes a request's name of what the client sent as `X-Request-Id`, or of a random one, with a
prefix for the endpoint (`chatcmpl-` in `entrypoints/openai/chat_completion/serving.py`, `cmpl-` in
`completion/serving.py`, which also appends the place of the prompt among several, `-0`); the engine appends eight
random hexadecimal digits (`v1/engine/input_processor.py`, `assign_request_id`). What the client sent is what is left
without them.
"""

from __future__ import annotations

import re

import polars as pl

from kvtrace_traces.errors import UsageError

PATTERN = r"^(?:cmpl-(.+?)-\d+|chatcmpl-(.+?)|(.+?))(?:-[0-9a-f]{8})?$"
"""The client's part is the first group that matches something."""


def client_ids(names: pl.Series, pattern: str | None = None) -> pl.Series:
    """The client's part of each request id (strings, nulls stay): of the first place where `pattern` (default: PATTERN)
    matches, the first of its groups that took part, or all of it where it has none; the id itself where it does not
    match. Raises UsageError for a pattern that is no regular expression."""
    try:
        made = re.compile(PATTERN if pattern is None else pattern)
    except re.error as error:
        raise UsageError(f"--client-pattern {pattern} is no regular expression: {error}") from None

    def client(name: str) -> str:
        found = made.search(name)
        if found is None:
            return name
        return next((group for group in found.groups() if group is not None), found[0])

    known = {name: client(name) for name in names.unique().to_list() if name is not None}
    return pl.Series(names.name, [None if name is None else known[name] for name in names.to_list()], dtype=pl.String)
