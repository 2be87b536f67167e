"""SQL over traces: what it sees, and what it must not be able to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace import overflow
from kvtrace.cli.sql import shell
from kvtrace.sql import Database, distinct_names
from kvtrace.views import every_table
from kvtrace_traces.schema import TABLES


def test_every_table_has_the_columns_of_the_schema(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    for table in every_table():
        frame = trace.sql(f"SELECT * FROM {table.name} LIMIT 3")
        assert frame.columns == [column.name for column in table.columns if not column.optional]


def test_tables_equal_the_frames(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    for name in TABLES:
        frame = getattr(trace, name)
        assert trace.sql(f"SELECT count(*) AS n FROM {name}")["n"][0] == frame.height
    order = ["engine_index", "step", "request"]
    base = trace.preemptions.columns
    assert (
        trace.sql("SELECT * FROM preemptions ORDER BY time_ns").select(base).equals(trace.preemptions.sort("time_ns"))
    )
    expanded = trace.sql("SELECT * FROM step_requests").sort(order)
    assert expanded.to_dicts() == trace.step_requests.sort(order).to_dicts()


def test_only_named_tables_are_decoded(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    trace.sql("SELECT count(*) FROM step_requests")
    assert "step_spans" in vars(trace.reader)
    assert not {"block_events", "requests", "step_requests"} & set(vars(trace.reader))


def test_sums_are_ordinary_integers(thrash: Path) -> None:
    frame = kvtrace.open(thrash).sql("SELECT sum(tokens) AS n, sum(tokens) * 10::HUGEINT ** 20 AS big FROM steps")
    assert frame.schema["n"] == pl.Int64


@pytest.mark.parametrize(
    "query",
    [
        "CREATE TABLE t AS SELECT 1", "DROP VIEW steps", "INSERT INTO steps VALUES (1)", "DELETE FROM steps",
        "COPY steps TO 'out.csv'", "ATTACH 'out.db'", "EXPORT DATABASE 'out'", "INSTALL httpfs", "LOAD httpfs",
        "SET enable_external_access = true", "RESET lock_configuration", "PRAGMA database_list",
        "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'", "SELECT * FROM glob('/*')",
        "SELECT 1; SELECT 2", "SELECT 1; DROP TABLE steps", "", "  ", "SELEC 1", "SELECT nope FROM steps",
        "SELECT 'a'::INTEGER", "SELECT * FROM trace",
    ],
)  # fmt: skip
def test_anything_but_reading_is_refused(
    query: str, thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = kvtrace.open(thrash)
    steps = trace.sql("SELECT count(*) FROM steps").item()
    with pytest.raises(kvtrace.UsageError) as error:
        trace.sql(query)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert trace.sql("SELECT count(*) FROM steps").item() == steps


@pytest.mark.parametrize(
    "query",
    [
        "FROM steps", "WITH s AS (FROM steps) SELECT * FROM s", "DESCRIBE steps", "SUMMARIZE steps", "SHOW TABLES",
        "EXPLAIN SELECT * FROM steps", "PIVOT block_events ON kind USING count(*) GROUP BY engine_index",
        "SELECT 1;", "SELECT * FROM information_schema.tables", "VALUES (1)", "-- a comment\nSELECT 1",
    ],
)  # fmt: skip
def test_all_ways_of_reading(query: str, thrash: Path) -> None:
    assert kvtrace.open(thrash).sql(query).height > 0


def test_an_unknown_table_is_answered_with_the_tables(thrash: Path) -> None:
    with pytest.raises(kvtrace.UsageError, match=r"no table 'block_event'.*block_events"):
        kvtrace.open(thrash).sql("SELECT * FROM block_event")


def test_several_traces_get_a_column(kvtrace_cli: Callable[..., Any], thrash: Path, cut: Path) -> None:
    query = "SELECT trace, count(*) AS n FROM step_requests GROUP BY trace ORDER BY trace"
    done = kvtrace_cli("sql", thrash, cut, query, "--json")
    rows = json.loads(done.out)
    assert [row["trace"] for row in rows] == sorted([thrash.stem, cut.stem])
    assert rows[0]["n"] > 0


def test_query_comes_from_stdin(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    assert kvtrace_cli("sql", thrash, "--csv", stdin="SELECT 42 AS a").out == "a\n42\n"


def test_a_mistyped_path_is_no_query(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("sql", thrash, "thrush.kvt")
    assert done.code == 2
    assert "no file or folder 'thrush.kvt'" in done.err
    assert kvtrace_cli("sql", "SELECT 1").code == 2
    assert kvtrace_cli("sql", thrash, "SELECT " + "1 + " * 900 + "1 AS n", "--csv").out == "n\n901\n"


def test_schema_lists_every_column(kvtrace_cli: Callable[..., Any]) -> None:
    rows = json.loads(kvtrace_cli("sql", "--schema", "--json").out)
    assert [(row["table"], row["column"]) for row in rows] == [
        (table.name, column.name) for table in every_table() for column in table.columns
    ]
    assert all(row["type"] and row["meaning"] for row in rows)
    assert {row["table"] for row in rows} >= {*TABLES, "block_lifetimes", "reads", "prefixes", "reuse", "occupancy"}


def test_declared_types_are_duckdbs(thrash: Path, kvtrace_cli: Callable[..., Any]) -> None:
    trace = kvtrace.open(thrash)
    rows = json.loads(kvtrace_cli("sql", "--schema", "--json").out)
    for table in every_table():
        name, optional = table.name, {column.name for column in table.columns if column.optional}
        found = dict(trace.sql(f"DESCRIBE {name}").select("column_name", "column_type").rows())
        declared = {
            row["column"]: row["type"] for row in rows if row["table"] == name and row["column"] not in optional
        }
        assert {key: "VARCHAR" if value.startswith("ENUM") else value for key, value in found.items()} == declared


def test_names_of_traces() -> None:
    assert distinct_names([Path("a/x.kvt"), Path("b/y.kvt")]) == ["x", "y"]
    assert distinct_names([Path("a/x.kvt"), Path("b/x.kvt")]) == ["a/x.kvt", "b/x.kvt"]
    assert len(set(distinct_names([Path("x"), Path("x")]))) == 2


def test_engines_stay_apart(two_engines: Path) -> None:
    frame = Database([kvtrace.open(two_engines)]).query("SELECT engine_index, count(*) FROM steps GROUP BY ALL")
    assert sorted(frame["engine_index"].to_list()) == [0, 1]


def test_unsafe_lifts_the_fence(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = "COPY (SELECT * FROM steps) TO 'steps.csv'"
    assert kvtrace_cli("sql", thrash, copy).code == 2
    assert list(tmp_path.iterdir()) == []
    assert kvtrace_cli("sql", thrash, copy, "--unsafe").code == 0
    assert len(Path("steps.csv").read_text().splitlines()) == 1246
    assert kvtrace_cli("sql", thrash, "SELECT count(*) AS n FROM 'steps.csv'", "--unsafe", "--csv").out == "n\n1245\n"
    assert kvtrace_cli("sql", thrash, "SELECT * FROM nope", "--unsafe").code == 2


def test_events_keep_their_order(tmp_path: Path) -> None:
    """The number of an event is its place in the log, also where DuckDB reads with several threads."""

    class Many:
        path = Path("many.kvt")
        block_events = pl.DataFrame({"engine_index": 0, "n": range(3_000_000)}, schema_overrides={"n": pl.Int64})

    database = Database([Many()])
    query = (
        "SELECT max(abs(i - 1 - n)) FROM (SELECT row_number() OVER () AS i, n FROM block_events WHERE engine_index = 0)"
    )
    assert database.query(query).item() == 0


def test_the_shell_is_duckdbs(
    thrash: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for the program `duckdb` says what it was asked, and reads the file as the real one would."""
    program = tmp_path / "duckdb"
    program.write_text(
        f"#!{sys.executable}\nimport sys, duckdb\nprint(sys.argv[1:-1])\n"
        "c = duckdb.connect(sys.argv[-1], read_only=True)\n"
        "print([c.sql(f'SELECT count(*) FROM {t}').fetchall()[0][0] for t in "
        "('steps', 'reads', 'reuse', 'preemptions', 'occupancy')])\n"
    )
    program.chmod(0o755)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(overflow, "folder", lambda: folder)
    one = kvtrace.open(thrash)
    counts = [
        one.sql(f"SELECT count(*) FROM {t}").item() for t in ("steps", "reads", "reuse", "preemptions", "occupancy")
    ]
    for traces, times in (([one], 1), ([one, kvtrace.open(cut)], 2)):
        for unsafe, options in ((False, ["-safe", "-readonly"]), (True, [])):
            shell(traces, str(program), unsafe)
            assert capfd.readouterr().out == f"{options}\n{[times * n for n in counts]}\n"
    assert list(folder.iterdir()) == []


def test_views_that_take_too_much_are_given_up_and_made_anew(thrash: Path) -> None:
    reader = kvtrace.open(thrash).reader
    queries = [f"SELECT count(*), max(request) FROM {view}" for view in ("reuse", "block_lifetimes", "misses", "reuse")]
    tight, ample = Database([reader], most_bytes=0), Database([reader])
    for query in queries:
        assert tight.query(query).equals(ample.query(query))
        assert len(tight._kept) == 1
    assert set(ample._kept) == {"reuse", "block_lifetimes", "misses"}
    joined = "SELECT count(*) FROM reads JOIN engines USING (engine_index)"  # needs read_spans, which stays
    assert tight.query(joined).equals(ample.query(joined))
    tight.query(queries[0])
    assert tight.query(joined).equals(ample.query(joined))
