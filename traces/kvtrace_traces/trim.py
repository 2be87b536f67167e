"""Cuts off what a killed engine allocated and never used. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvtrace_traces import wire


def trim(path: Path) -> int:
    """Cut the unused end off a log whose writer is gone, and return how many bytes went.

    Nothing is cut while the process that wrote it lives, on another host than it ran on, or where anything but zeros
    follows the last commit.
    """
    with path.open("r+b") as file:
        if file.read(len(wire.MAGIC)) != wire.MAGIC:
            return 0
        at = wire.PREFIX.size
        while True:
            file.seek(at)
            head = file.read(wire.HEAD_BYTES)
            if len(head) < wire.HEAD_BYTES:
                return 0
            tag, length, _ = wire.HEAD.unpack(head)
            if tag == 0:
                break
            if tag >> 24 != wire.TAG_BYTE or length > wire.MAX_BODY_BYTES:
                return 0
            if at == wire.PREFIX.size and not _writer_is_gone(file.read(min(length, wire.MAX_HEADER_BYTES))):
                return 0
            at += wire.HEAD_BYTES + length
        file.seek(at)
        while chunk := file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                return 0
        size = file.tell()
        file.truncate(at)
        return size - at


def _writer_is_gone(header: bytes) -> bool:
    try:
        fields = json.loads(header)
        pid, host = int(fields["pid"]), fields["host"]
    except (ValueError, KeyError, TypeError):
        return False
    if host != wire.host_id():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
