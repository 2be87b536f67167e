"""Speed of caches in tiers on a Zipf stream: `python benchmarks/tier_speed.py [--refs 4000000]`.

Prints one line a run: references a second in the driver alone, one thread, best of five, and the time of the
first compilation where the cache folder had none. In `prefix` semantics the stream is cut into requests
of 16 references.
"""

from __future__ import annotations

import argparse
import re
import time

from replay_speed import as_workload, zipf_stream

from kvtrace_replay.tiers import replay_tiers

HIERARCHIES = (
    ("hbm:1%",),
    ("hbm:1%", "dram:10%"),
    ("hbm:1%", "dram:10%:mode=exclusive"),
    ("hbm:1%", "dram:10%", "ssd:50%:write=demote"),
    ("hbm:1%", "dram:10%:mode=inclusive", "ssd:50%:mode=inclusive"),
    ("hbm:1%", "dram:10%:policy=fifo,mode=exclusive"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=4_000_000)
    parser.add_argument("--objects", type=int, default=400_000)
    parser.add_argument("--alpha", type=float, default=1.0)
    options = parser.parse_args()
    workload = as_workload(zipf_stream(options.refs, options.objects, options.alpha), 16)
    small = as_workload(zipf_stream(1000, 100, 1.0), 16)
    print(f"{workload.n_refs} references, {workload.n_identities} objects")
    for tiers in HIERARCHIES:
        begin = time.perf_counter()
        replay_tiers(small, [re.sub(r"\d+%", "40%", tier) for tier in tiers])
        compiling = time.perf_counter() - begin
        for semantics in ("object", "prefix"):
            rows = [replay_tiers(workload, tiers, semantics)[-1] for _ in range(5)]
            speed = workload.n_refs / min(row["seconds"] for row in rows) / 1e6
            ratio = rows[0]["block_hit_ratio"]
            what = f"{' '.join(tiers):58} {semantics:7}"
            print(
                f"{what} {speed:6.1f} M/s  hit ratio {ratio:.4f}  compiled or loaded in {compiling:.1f} s", flush=True
            )


if __name__ == "__main__":
    main()
