"""What the user asked for, handed to the serving process through environment variables."""

from __future__ import annotations

import os
from typing import NamedTuple


class Settings(NamedTuple):
    """``out``: folder for the logs; ``granule``: tokens, None for the engine's hash block size; ``max_bytes``: bound
    of one engine's log, None for none; ``key``: secret of the identities, None to draw one."""

    out: str
    granule: int | None
    max_bytes: int | None
    key: bytes | None


def from_environment() -> Settings | None:
    """Read ``KVTRACE_OUT``, ``KVTRACE_GRANULE``, ``KVTRACE_MAX_BYTES`` and ``KVTRACE_KEY`` (hex).

    None without ``KVTRACE_OUT``. Raises :class:`ValueError` with a line for the user where a value is wrong.
    """
    out = os.environ.get("KVTRACE_OUT")
    if not out:
        return None
    key = os.environ.get("KVTRACE_KEY")
    return Settings(
        out=os.path.abspath(out),
        granule=_positive("KVTRACE_GRANULE"),
        max_bytes=_positive("KVTRACE_MAX_BYTES"),
        key=_key(key) if key else None,
    )


def _positive(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{name}={text!r} is not a positive whole number")
    return int(text)


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if not 16 <= len(key) <= 64:
        raise ValueError("KVTRACE_KEY must be 16 to 64 bytes in hexadecimal")
    return key
