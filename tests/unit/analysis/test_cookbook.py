"""Every query of the cookbook runs: on both samples, on imports, and in plain DuckDB on an export."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import duckdb
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace import samples
from kvtrace.views import docs, shipped
from kvtrace_traces import exporters

COOKBOOK = docs.DOCS / "sql-cookbook.md"
TITLES = re.findall(r"^## (.*)$", COOKBOOK.read_text(), flags=re.MULTILINE)
QUERIES = docs.queries(COOKBOOK.read_text())
NOTHING = ("What was copied", "Is anything missing")  # in these samples


def test_every_question_has_its_query() -> None:
    assert len(TITLES) == len(QUERIES) >= 15


@pytest.mark.parametrize("name", ["thrash", "chat"])
@pytest.mark.parametrize(("title", "query"), list(zip(TITLES, QUERIES, strict=True)), ids=TITLES)
def test_a_query_answers(name: str, title: str, query: str) -> None:
    found = kvtrace.open(samples.path(name)).sql(query)
    assert bool(found.height) != title.startswith(NOTHING)
    assert not any(found[column].is_null().all() for column in found.columns if found.height)


def test_queries_answer_imports_and_odd_traces(tmp_path: Path) -> None:
    for trace in (toys.imported(1, tmp_path), toys.toy(4, tmp_path), toys.toy(1, tmp_path, steps=1, arrivals=0, ids=0)):
        for query in QUERIES:
            trace.sql(query)
    offloaded = next(trace for trace in (toys.toy(seed, tmp_path, explicit=0.4) for seed in range(50, 80))
                     if trace.sql("SELECT count(*) FROM offloads").item())  # fmt: skip
    copies = offloaded.sql(QUERIES[[title.startswith("What was copied") for title in TITLES].index(True)])
    assert copies["blocks"].sum() == offloaded.reader.offloads["blocks"].sum() > 0
    assert copies["bytes"].sum() == offloaded.reader.offloads["bytes"].sum() > 0


def test_answers_in_the_documentation_are_true() -> None:
    for path, text in docs.wanted().items():
        assert path.read_text() == text, f"{path.name}: python -m kvtrace.views.docs --write"


@pytest.mark.parametrize("kind", ["sample", "toy", "import"])
def test_plain_duckdb_answers_the_same_on_an_export(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = (kvtrace.open(samples.path("thrash")) if kind == "sample" else toys.toy(5, tmp_path) if kind == "toy"
             else toys.imported(5, tmp_path))  # fmt: skip
    exporters.run("parquet", trace.reader, tmp_path / "out")
    shipped.write(trace, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    plain = duckdb.connect()
    plain.execute(Path("views.sql").read_text())
    for name in [*docs.views(), *docs.EXTRA, "requests", "block_events", "preemptions"]:
        there = plain.sql(f"SELECT * FROM {name}").fetchall()
        assert sorted(map(repr, there)) == sorted(map(repr, trace.sql(f"SELECT * FROM {name}").rows())), name
    for query in QUERIES:
        assert len(plain.sql(query).fetchall()) == trace.sql(query).height
