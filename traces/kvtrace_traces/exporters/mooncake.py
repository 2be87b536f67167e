"""Mooncake's JSONL: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``, and ``block_size`` where it
is not 512, as ``kvtrace import mooncake`` reads it. A request's name goes along as ``request_id``.

Of a recorded trace the ids are those of the whole blocks of a prompt, fewer than Mooncake's by a partial last one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvtrace_traces.exporters import exporter
from kvtrace_traces.exporters.references import references, summary, written

_REQUESTS = 4096  # written at a time
_BLOCK_TOKENS = 512


@exporter("mooncake", "Mooncake's JSONL: a request a line with its block ids")
def write(trace: Any, out: Path, force: bool) -> dict[str, Any]:
    """Write the requests of ``trace``, one a line; see the module."""
    found = references(trace)
    size = f', "block_size": {found.block_size}' if found.block_size != _BLOCK_TOKENS else ""
    bounds = found.indptr.tolist()
    with written(out, force) as file:
        for first in range(0, found.frame.height, _REQUESTS):
            part = found.frame.slice(first, _REQUESTS)
            columns = (part[name].to_list() for name in ("arrival_ns", "prompt_tokens", "output_tokens", "request_id"))
            ids = found.ids[bounds[first] : bounds[first + part.height]].tolist()
            lines = []
            for i, (arrival, prompt, output, name) in enumerate(zip(*columns, strict=True), first):
                mine = ids[bounds[i] - bounds[first] : bounds[i + 1] - bounds[first]]
                stamp = f'"timestamp": {_milliseconds(arrival)}, ' if arrival >= 0 else ""
                called = f', "request_id": {json.dumps(name)}' if name else ""
                lengths = f'"input_length": {prompt}, "output_length": {output or 0}'
                lines.append(f'{{{stamp}{lengths}, "hash_ids": {mine}{size}{called}}}\n')
            file.write("".join(lines).encode())
    return summary(out, found)


def _milliseconds(time_ns: int) -> str:
    """The time exactly: whole where it is, else with up to six decimals."""
    whole, rest = divmod(time_ns, 1_000_000)
    return f"{whole}.{rest:06d}".rstrip("0") if rest else str(whole)
