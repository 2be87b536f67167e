"""Hostile logs: what `mutants` yields checks out byte by byte and makes no sense. Run as a script it opens them all.

python mutate.py FIRST LAST FOLDER
"""

from __future__ import annotations

import random
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import generate

from kvtrace_traces import wire

NASTY = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
MEMORY_BYTES = 6 << 30  # of address space, most of it Python's libraries and the compiler's


def log_of(header: bytes, commits: list[tuple[int, int, bytes]]) -> bytes:
    """A file of these commits with right checksums and sequence numbers."""
    data = bytearray(wire.prefix())
    for seq, (kind, flags, body) in enumerate([(wire.HEADER, 0, header), *commits]):
        data += wire.head(kind, flags, seq, body) + body
    return bytes(data)


def header_of(settings: generate.Settings, **more: object) -> bytes:
    import json

    text = json.dumps(generate.header(settings, **more)).encode()
    return text + b" " * (-len(text) % 4)


def mutant(seed: int) -> bytes:
    """One hostile log."""
    rng = random.Random(seed)
    settings = generate.random_settings(rng.randrange(1000))
    settings.steps = rng.randrange(1, 30)
    bodies = generate.play(settings)[0]
    for _ in range(rng.choice([1, 1, 2, 10])):
        i = rng.randrange(len(bodies))
        flags, body = bodies[i]
        words = list(struct.unpack(f"<{len(body) // 4}I", body))
        if not words:
            continue
        at = rng.randrange(len(words))
        kind = rng.randrange(7)
        if kind == 0:
            words[at] = rng.choice(NASTY)
        elif kind == 1:
            words[at] ^= 1 << rng.randrange(32)
        elif kind == 2:
            words[at] = words[at] & 15 | rng.choice(NASTY) << 4 & 0xFFFFFFF0
        elif kind == 3:
            del words[at : at + rng.randrange(1, 5)]
        elif kind == 4:
            words[at:at] = [rng.getrandbits(32) for _ in range(rng.randrange(1, 6))]
        elif kind == 5:
            words[at:at] = words[max(0, at - rng.randrange(20)) : at + rng.randrange(20)]
        else:
            words = [rng.getrandbits(32) for _ in range(rng.randrange(200))]
        bodies[i] = (flags ^ (rng.random() < 0.1), struct.pack(f"<{len(words)}I", *words))
    if rng.random() < 0.2:
        rng.shuffle(bodies)
    return log_of(header_of(settings), [(wire.OPS, flags, body) for flags, body in bodies])


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small logs that claim much."""
    settings = generate.Settings()
    key = (1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    crowd = [word for request in range(10_000) for word in (request, 1, 0)]
    claims = {
        "requests": [(*key[:4], 0xFFFFFFFF, *key[5:])],
        "many requests": [(*key[:4], 1 << 20, *key[5:])],
        "scheduled": [(1 | 0xFFFFFFF << 4, *key[1:])],
        "held": [(*key[:10], 0xFFFFFFFF)],
        "events": [(*key[:5], 0xFFFFFFFF, 0x7FFFFFFF, *key[7:])],
        "negative events": [(*key[:5], 0xFFFFFFFF, 0xFFFFFFFF, *key[7:])],
        "step": [(*key[:3], 0xFFFFFFFF, *key[4:]), (13, 14 | 1 << 8, 0, 0, 5, 0)],
        "chain": [key, (3, 0xFFFFFFFF)],
        "fill": [key, (9, 0xFFFFFFFF)],
        "free": [key, (10, 0xFFFFFFFF)],
        "big": [key, (14 | 8 << 4, 0xFFFFFFFF, 0xFFFFFFFF, 0)],
        "alloc": [key, (7 | 0xFFFFFFF << 4,)],
        "block": [key, (6 | 0xFFFFFFF << 4,)],
        "begins": [key, (13,) * 2_000_000],
        "own": [key, (13, 15 | (3 | 0xFFFFF << 8) << 4, *(0,) * 0xFFFFF)],
        "keys": [key, *[(*key,)] * 20_000],
        "steps": [key, (13, 14 | 4 << 4, 0) * 300_000],
        "set": [
            key,
            (15 | (12 | 20_000 << 8) << 4, *range(20_000)),
            (13, 14 | 8 << 4, 10_000, 0, 0, *crowd),
            (13, 14, 0) * 300_000,
        ],
    }
    for name, commits in claims.items():
        bodies = [(wire.OPS, int(c[0] & 15 == 1), struct.pack(f"<{len(c)}I", *c)) for c in commits]
        yield name, log_of(header_of(settings), bodies)
    for field, value in {
        "num_blocks": 1 << 40, "block_size": 1 << 62, "granule": 0, "segment": -1, "engine_index": 1 << 70,
        "clock_wall_ns": "now", "inexact": 7, "run_id": [1], "log_format": {},
    }.items():  # fmt: skip
        yield f"header {field}", log_of(header_of(settings, **{field: value}), [])
    yield "header list", log_of(b"[1,2,3] ", [])
    yield "header depth", log_of(b"[" * 400_000, [])
    yield "heads", wire.prefix() + wire.HEAD.pack(wire.tag(wire.OPS, 0, 0), 1 << 20, 0) * 300_000
    yield "zeros", wire.prefix() + bytes(30_000_000)


def read_all(path: Path) -> str:
    """Open and read everything; what came of it. Anything but a `KvtraceError` is the reader's fault."""
    from compare import TABLES

    from kvtrace_traces import KvtraceError, open_trace

    told = ""
    for recover in ("strict", "tail", "skip"):
        try:
            trace = open_trace(path, recover=recover)
            for table in (*TABLES, "offloads", "step_spans", "losses"):
                getattr(trace, table)
            told += f"{trace.info['events']} "
        except KvtraceError as error:
            if "\n" in str(error):
                raise RuntimeError("more than one line") from error
            told += "refused "
    return told


def main() -> None:
    first, last, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    path = folder / "mutant.kvt"
    for seed in range(first, last):
        path.write_bytes(mutant(seed))
        print(seed, end=" ", flush=True)
        read_all(path)
    if first == 0:
        for name, data in bombs():
            path.write_bytes(data)
            print(name, read_all(path), flush=True)
    print("done")


if __name__ == "__main__":
    main()
