"""A trace of 100 million block events: written by the simulator, exported, asked, reported on.

    python benchmarks/large_trace.py --folder DIR [--events 100000000] [--limit 120] [--only convert,queries,...]

The trace is a simulated run of an enlarged workload (`large_workload.py`), written as `kvtrace simulate -o` writes one.
Then, each in a process of its own, with the most memory that it held:

convert  the trace to a folder of Parquet, from opening it on: the tables alone, and then anew with what the views for
         plain DuckDB need, as `kvtrace export parquet` does.
queries  every query of docs/sql-cookbook.md with `kvtrace sql`'s database: the first time, and warm (the third time;
         what a database keeps, it keeps from the second on).
plain    the same in plain DuckDB, with the views that are shipped, on Parquet made by Polars with its own settings:
         warm, and how much longer or shorter kvtrace takes.
rows     the same, where the rows of the views are Parquet as well: somebody has spared DuckDB the work.
report   `kvtrace report`, where this version has it.

`--limit` ends a query after so many seconds. Needs some 25 bytes of disk an event in DIR; what is written there is
removed, but for the trace with `--keep`. The load of the machine stands beside each figure: on one that has other work
to do, CPU seconds tell more than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

sys.path.insert(0, str(Path(__file__).resolve().parent))

import large_workload

STAGES = ("convert", "queries", "plain", "rows", "report")
GOAL_EVENTS_PER_S, GOAL_QUERY_S, GOAL_RATIO = 10e6, 3.0, 1.5


def cookbook() -> list[tuple[str, str]]:
    """(question, query) of all of docs/sql-cookbook.md."""
    text = (Path(__file__).parents[1] / "docs" / "sql-cookbook.md").read_text()
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    return list(zip(titles, re.findall(r"```sql\n(.*?)```", text, flags=re.DOTALL), strict=True))


def timed(run: Callable[[], Any], interrupt: Callable[[], None], limit: float) -> tuple[float, float] | None:
    """Seconds that `run` takes, and CPU seconds; None where it took longer than `limit`, or failed."""
    timer = threading.Timer(limit, interrupt)
    timer.start()
    begin, work = time.perf_counter(), time.process_time()
    try:
        run()
    except Exception:
        return None
    finally:
        timer.cancel()
    return time.perf_counter() - begin, time.process_time() - work


def last(times: list[tuple[float, float] | None], wanted: int) -> dict[str, float | None]:
    """The last of `wanted` times as seconds, and CPU seconds."""
    done = times[-1] if len(times) == wanted else None
    return {"warm": done[0], "warm_cpu": done[1]} if done else {"warm": None, "warm_cpu": None}


# ------------------------------------------------------------------------------------------------------- the stages


def convert(trace: Path, folder: Path, limit: float) -> dict[str, Any]:
    import kvtrace
    from kvtrace import samples
    from kvtrace.views import shipped
    from kvtrace_traces import exporters

    small = folder / "small"
    exporters.run("parquet", kvtrace.open(samples.path("thrash")).reader, small, beside=shipped.write)  # compiles
    shutil.rmtree(small)
    found: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {"tables": {}, "whole": {"beside": shipped.write}}
    for what, options in kinds.items():
        begin, work = time.perf_counter(), time.process_time()
        told = exporters.run("parquet", kvtrace.open(trace).reader, folder / "exported", **options)
        found |= {f"{what}_s": time.perf_counter() - begin, f"{what}_cpu_s": time.process_time() - work}
        shutil.rmtree(folder / "exported")
    return {"events": told["tables"]["block_events"]["rows"], "bytes": told["bytes"], **found}


def queries(trace: Path, folder: Path, limit: float) -> list[dict[str, Any]]:
    import kvtrace
    from kvtrace.sql import Database

    database = Database([kvtrace.open(trace).reader])
    rows = []
    for title, query in cookbook():
        times = []
        for _ in range(3):
            times.append(
                timed(lambda query=query: database.query(query), lambda: database._connection.interrupt(), limit)
            )
            if times[-1] is None:
                break
        rows.append({"title": title, "first": times[0] and times[0][0], **last(times, 3)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def plain(trace: Path, folder: Path, limit: float) -> list[dict[str, Any]]:
    import kvtrace
    from kvtrace.views import EXTRA, extra, shipped, views
    from kvtrace_traces.schema import TABLES

    place = folder / "plain"
    place.mkdir(exist_ok=True)
    opened = kvtrace.open(trace)
    for table in TABLES:
        if table != "step_requests":  # a view
            getattr(opened, table).write_parquet(place / f"{table}.parquet")
    for table in EXTRA:
        extra.frame(table, opened.reader).write_parquet(place / f"{table}.parquet")
    for view in views().values():
        if view.make is not None:
            opened.sql(f"FROM {view.name}").write_parquet(place / f"{view.name}.parquet")
    del opened
    return answered(place, shipped.script(), limit)


def rows(trace: Path, folder: Path, limit: float) -> list[dict[str, Any]]:
    import kvtrace
    from kvtrace.views import every_table

    place = folder / "rows"
    place.mkdir(exist_ok=True)
    words = set(re.findall(r"\w+", " ".join(query for _, query in cookbook())))
    named = [table.name for table in every_table() if table.name in words]
    for name in named:  # each from a trace of its own: what one keeps takes memory
        kvtrace.open(trace).sql(f"FROM {name}").write_parquet(place / f"{name}.parquet")
    return answered(place, ";".join(f"CREATE VIEW {name} AS FROM '{name}.parquet'" for name in named), limit)


def answered(place: Path, script: str, limit: float) -> list[dict[str, Any]]:
    """What the queries take in plain DuckDB, after the script, on the files of a folder, which is then removed."""
    os.chdir(place)
    connection = duckdb.connect()
    connection.execute(script)
    connection.execute(f"SET temp_directory = '{place / 'overflow'}'")
    connection.execute("SET memory_limit = '8GB'; SET max_temp_directory_size = '2GB'")  # the machine is not ours alone
    found = []
    for title, query in cookbook():
        times = []
        for _ in range(2):
            times.append(timed(lambda query=query: connection.sql(query).arrow(), connection.interrupt, limit))
            if times[-1] is None:
                break
        found.append({"title": title, **last(times, 2)})
        print(found[-1], file=sys.stderr, flush=True)
    shutil.rmtree(place)
    return found


def report(trace: Path, folder: Path, limit: float) -> dict[str, Any] | None:
    from kvtrace.cli.main import COMMANDS

    if "report" not in COMMANDS:
        return None
    page = folder / "report.html"
    begin, work = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "kvtrace", "report", str(trace), "-o", str(page), "--force"], capture_output=True
    )
    seconds = time.perf_counter() - begin
    size = page.stat().st_size if page.exists() else None
    page.unlink(missing_ok=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - work.ru_utime - work.ru_stime
    return {"seconds": seconds, "cpu_s": cpu, "bytes": size, "code": done.returncode, "gib": used.ru_maxrss / 2**20,
            "said": done.stderr.decode()[-300:]}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the table


def generate(path: Path, events: int) -> None:
    from kvtrace_replay.schedulers.log import write_run

    begin = time.perf_counter()
    recorded, settings = large_workload.enlarged(max(100, events // large_workload.EVENTS_PER_REQUEST))
    made = time.perf_counter() - begin
    run = write_run(path, recorded, settings)
    print(
        f"generated: {recorded.n_requests:,} requests in {made:.0f} s, {run.steps:,} steps, {run.preemptions:,} "
        f"preemptions, simulated and written in {time.perf_counter() - begin - made:.0f} s, "
        f"{path.stat().st_size / 1e6:,.0f} MB  {load()}",
        flush=True,
    )


def stage(name: str, options: argparse.Namespace, trace: Path) -> Any:
    """The result of a stage, run in a process of its own, and the most memory that it held in GiB."""
    command = [sys.executable, __file__, "--folder", str(options.folder), "--limit", str(options.limit)]
    done = subprocess.run([*command, "--stage", name, "--trace", str(trace)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None, None
    told = json.loads(done.stdout.splitlines()[-1])
    return told["result"], told["gib"]


def load() -> str:
    return f"(load {os.getloadavg()[0]:.1f})"


def seconds(value: float | None, limit: float) -> str:
    return f"> {limit:.0f}" if value is None else f"{value:.2f}"


def compared(ours: dict[str, Any], other: dict[str, Any] | None, limit: float) -> str:
    """What another took, and how many times as long kvtrace took."""
    if other is None:
        return f"{'-':>9}{'-':>8}{'-':>7}"
    ratio = f"{ours['warm'] / other['warm']:.2f}" if ours["warm"] and other["warm"] else "-"
    return f"{seconds(other['warm'], limit):>9}{seconds(other['warm_cpu'], limit):>8}{ratio:>7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch space")
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a query")
    parser.add_argument("--only", default=",".join(STAGES))
    parser.add_argument("--keep", action="store_true", help="leave the trace, and take it again")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        result = globals()[options.stage](options.trace, options.folder, options.limit)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"result": result, "gib": most}))
        return
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    trace = options.folder / f"large-{options.events}.kvt"
    print(f"{os.cpu_count()} cores {load()}")
    if not trace.exists():
        generate(trace, options.events)
    wanted = options.only.split(",")
    if "convert" in wanted:
        found, most = stage("convert", options, trace)
        if found:
            print(f"{found['events']:,} block events, {trace.stat().st_size / found['events']:.2f} bytes each")
            for what in ("tables", "whole"):
                rate = found["events"] / found[f"{what}_s"]
                print(
                    f"to Parquet, {'the tables' if what == 'tables' else 'with what the views need'}: "
                    f"{found[f'{what}_s']:.1f} s ({found[f'{what}_cpu_s']:.1f} s of CPU), {rate / 1e6:.1f} M events/s "
                    f"(goal {GOAL_EVENTS_PER_S / 1e6:.0f}), {found['bytes'] / 1e6:,.0f} MB, {most:.1f} GiB at most  "
                    f"{load()}"
                )
    ours, ours_most = stage("queries", options, trace) if "queries" in wanted else (None, None)
    others = {name: stage(name, options, trace) for name in ("plain", "rows") if name in wanted}
    if ours:
        goals = f"goals: {GOAL_QUERY_S:.0f} s, {GOAL_RATIO} times"
        heads = "".join(f"{name + ' s':>9}{'CPU s':>8}{'ratio':>7}" for name in others)
        print(f"{'first s':>8}{'warm s':>8}{'CPU s':>7}{heads}  {goals}  {load()}")
        for nth, row in enumerate(ours):
            cells = "".join(compared(row, found and found[nth], options.limit) for found, _ in others.values())
            print(
                f"{seconds(row['first'], options.limit):>8}{seconds(row['warm'], options.limit):>8}"
                f"{seconds(row['warm_cpu'], options.limit):>7}{cells}  {row['title']}"
            )
        held_most = {"kvtrace": ours_most, **{name: held for name, (_, held) in others.items()}}
        print("at most " + ", ".join(f"{name} {held:.1f} GiB" for name, held in held_most.items() if held))
    if "report" in wanted:
        found, _ = stage("report", options, trace)
        if found is None:
            print("report: this version has no such command")
        else:
            print(
                f"report: {found['seconds']:.1f} s (goal 60), {found['cpu_s']:.1f} s of CPU, {found['gib']:.1f} GiB "
                f"(goal 4), exit {found['code']}, "
                f"{(found['bytes'] or 0) / 1e6:.1f} MB  {load()}"
            )
            if found["code"]:
                print(found["said"])
    if not options.keep:
        trace.unlink()


if __name__ == "__main__":
    main()
