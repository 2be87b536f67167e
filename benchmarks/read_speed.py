"""Speed of the reader: `python benchmarks/read_speed.py [--events 24000000] [--profile]`.

Writes the log of a busy engine (256 requests decoding, a new one with a 2,048-token prompt for each that finishes, half
of each prompt in the cache) and reads it back as a Polars frame of block events. Prints block events a second,
best of three, everything between the file and the frame included; compilation is not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from kvtrace_traces import open_trace
from kvtrace_traces.schema import EXT_OPS, OPS
from kvtrace_traces.writer import write_file

BLOCKS, BLOCK, RUNNING, PROMPT, SHARED, OUTPUT = 40_000, 16, 256, 128, 64, 16
CODE = {name: op.code for name, op in OPS.items()}


def bodies(events: int) -> Iterator[tuple[int, bytes]]:
    """OPS commits of a run with about so many block events, one step each; PROMPT and OUTPUT are in blocks."""
    free = deque(range(1, BLOCKS))
    shared: list[list[int]] = [[] for _ in range(64)]
    requests = done = step = 0
    running: list[tuple[int, list[int], int]] = []  # number, table, step of admission
    words = array("I", [CODE["KEY"], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    flags = 1
    while done < events:
        opening = [CODE["BEGIN"] | 1000 << 4]
        ending: list[int] = []
        owners, entries, keep = [], [], []
        while len(running) < RUNNING and len(entries) < 24:
            number, prefix = requests, requests % 64
            requests += 1
            words.append(CODE["EXT"] | (EXT_OPS["REQ"].code | 12 << 8) << 4)
            words.extend((0, 0, 0, 0, PROMPT * BLOCK, OUTPUT * BLOCK, 0, 0, 0, 0, 0, 0))
            words.extend((number << 4 | CODE["CHAIN"], PROMPT))
            for i in range(PROMPT):
                words.extend((i, prefix + 1) if i < SHARED else (i, number + 1000))
            hit = shared[prefix]
            fresh = [free.popleft() for _ in range(PROMPT - len(hit))]
            ending += [number << 4 | CODE["LOOKUP"], PROMPT * BLOCK, len(hit) * BLOCK + 1]
            if hit:
                ending += [len(hit) << 4 | CODE["HIT"], *hit]
            ending += [len(fresh) << 4 | CODE["ALLOCN"], *fresh, number << 4 | CODE["FILL"], len(fresh)]
            table = hit + fresh
            shared[prefix] = table[:SHARED]
            done += len(hit) + 2 * len(fresh)
            running.append((number, table, step))
            entries += [number, (PROMPT - len(hit)) * BLOCK, len(hit) * BLOCK]
        for number, table, begun in running:
            age = step - begun
            if age and age % BLOCK == 0:  # the block before is full, the next one begins
                opening.append(free[0] << 4 | CODE["ALLOC"])
                owners.append(number)
                if age > BLOCK:
                    opening += [number << 4 | CODE["FILL1"], number, age]
                    done += 1
                table.append(free.popleft())
                done += 1
        words.extend(opening)
        words.extend(ending)
        words.append(CODE["SCHED"] | (1 | len(entries) // 3 << 4 | len(owners) << 16) << 4)
        words.extend((len(free), len(running), 0, *entries))
        if owners:
            halves = [owner - owners[0] for owner in owners] + [0] * (len(owners) % 2)
            words.append(owners[0])
            words.extend([low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)])
        words.append(CODE["OUTPUT"] | 1000 << 4)
        step += 1
        for number, table, begun in running:
            if step - begun >= OUTPUT * BLOCK:
                words.extend((number << 4 | CODE["FINISH"], 1, OUTPUT * BLOCK, number << 4 | CODE["FREE"], len(table)))
                done += len(table)
                own = table if table[0] not in shared[number % 64] else table[SHARED:]
                free.extend(reversed(own))
            else:
                keep.append((number, table, begun))
        running = keep
        yield flags, words.tobytes()
        flags = 0
        del words[:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=24_000_000)
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    args = parser.parse_args()
    header = {"block_size": BLOCK, "granule": BLOCK, "num_blocks": BLOCKS, "run_id": "speed", "source": "vllm"}
    with tempfile.TemporaryDirectory() as folder:
        small, path = Path(folder) / "small.kvt", Path(folder) / "large.kvt"
        write_file(str(small), header, lambda: bodies(10_000), dict)
        assert open_trace(small).block_events.height  # compiles
        size = write_file(str(path), header, lambda: bodies(args.events), dict)
        best, rows = float("inf"), 0
        for _ in range(3):
            begun = time.perf_counter()
            trace = open_trace(path)
            rows = trace.block_events.height
            best = min(best, time.perf_counter() - begun)
        assert trace.complete, trace.losses
        print(f"{rows:,} block events, {size / 1e6:,.0f} MB: {best:.2f} s, {rows / best / 1e6:.1f} M events/s")
        if args.profile:
            import cProfile

            with cProfile.Profile() as profile:
                assert open_trace(path).block_events.height
            profile.print_stats("tottime")


if __name__ == "__main__":
    main()
