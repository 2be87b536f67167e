"""The report: every section for every odd trace, tables that are the charts' own figures, numbers that are those of
`stats`, `curve` and `replay`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import report_cases

import kvtrace
from kvtrace.metrics import own_hits
from kvtrace.reports import charts
from kvtrace.reports.compose import compose, opened, subtitle, tiles
from kvtrace.reports.page import Figure, Page, Panel, build
from kvtrace.reports.registry import chosen, plots, sections
from kvtrace.reports.run import POLICIES, Run, curve_sizes
from kvtrace.reports.verdict import verdict

MOST_POINTS = 2000


@pytest.fixture(scope="module", params=report_cases.NAMES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run, Page]:
    """The name of an odd trace, its run and its page."""
    runs = opened(report_cases.case(request.param, tmp_path_factory.mktemp("cases")))
    return request.param, runs[0], compose(runs, chosen([]), lambda _: None)


def drawn(page: Page) -> Iterator[Panel]:
    return (panel for section in page.sections for panel in section.panels if panel.figure is not None)


def series(figure: Figure) -> Iterator[list[Any]]:
    """The numbers of a figure; marks, which only point at something, left out."""
    for trace in figure["data"]:
        if trace.get("meta") == "mark":
            continue
        if trace["type"] == "heatmap":
            yield [value for row in trace["z"] for value in row]
        elif trace["type"] == "icicle":
            yield trace["values"][1:]  # the root is no node
        else:
            yield trace["x" if trace.get("orientation") == "h" else "y"]


def test_every_section_is_there_and_says_something(page: tuple[str, Run, Page]) -> None:
    _, _, made = page
    alone = [entry.name for entry in sections() if not entry.across]
    assert [section.name for section in made.sections] == alone
    for section in made.sections:
        assert section.panels
        for panel in section.panels:
            assert panel.why or panel.facts or (panel.table is not None and panel.table.height)
            if panel.why:
                assert panel.why[0].isupper()
                assert panel.why.endswith(".")
                assert not panel.why.endswith("..")


def test_charts_are_small_and_named(page: tuple[str, Run, Page]) -> None:
    _, _, made = page
    known = plots()
    for panel in drawn(made):
        assert panel.figure is not None
        assert panel.name in known
        assert panel.figure["label"]
        for values in series(panel.figure):
            assert 0 < len(values) <= (6000 if panel.name == "accesses" else MOST_POINTS)
            assert all(value is None or math.isfinite(value) for value in values)


def test_the_table_behind_a_chart_is_the_chart(page: tuple[str, Run, Page]) -> None:
    _, _, made = page
    for panel in drawn(made):
        assert panel.figure is not None
        assert panel.table is not None
        told = {
            f"{value:.7g}"
            for column in panel.table.select(pl.selectors.numeric()).iter_columns()
            for value in column.drop_nulls().to_list()
        }
        for values in series(panel.figure):
            assert {f"{value:.7g}" for value in values if value is not None} <= told, panel.name


def test_the_page_is_one_closed_file(page: tuple[str, Run, Page]) -> None:
    _, _, made = page
    text = build(made)
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'\bsrc=|href="(?!#)|url\(|@import|https?:', outside)
    assert "default-src 'none'" in text
    assert "connect-src" not in text
    assert "NaN" not in outside
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL):
        parts = json.loads(data)
        assert len({len(column) for column in parts["columns"]}) == 1
        assert len(parts["head"]) == len(parts["columns"]) == len(parts["numeric"])
        for colour in set(re.findall(r'"\$([\w-]+)"', data)):
            assert f"--{colour}:" in text, colour
    links = re.findall(r'href="#([^"]+)"', text)
    assert links
    for anchor in links:
        assert text.count(f'id="{anchor}"') == 1
    assert len(re.findall(r'class="chart"[^>]* role="img" aria-label="[^"]+', text)) == sum(1 for _ in drawn(made))
    assert text.count("<details>") == sum(1 for _ in drawn(made))


def test_the_verdict_has_five_sentences(page: tuple[str, Run, Page]) -> None:
    name, run, made = page
    said = verdict(run)
    assert len(said) == 5
    assert all(re.fullmatch(r"[A-Z].*\.", sentence) and "None" not in sentence for sentence in said)
    assert made.verdict == [("", " ".join(said))]
    if run.imported:
        assert "imported" in said[0]
    if name == "no-clock":
        assert "without a clock" in said[0]


def panel(page: Page, name: str) -> Panel:
    return next(panel for section in page.sections for panel in section.panels if panel.name == name)


def table(page: Page, name: str) -> pl.DataFrame:
    found = panel(page, name).table
    assert found is not None
    return found


@pytest.fixture(scope="module")
def thrash_page() -> Page:
    return compose(opened(report_cases.case("thrash", Path())), chosen([]), lambda _: None)


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str | None], float]:
    """The values of `kvtrace stats`, by metric and part."""
    frame = kvtrace.stats(report_cases.case("thrash", Path()))
    return {(row["metric"], row["at"]): row["value"] for row in frame.iter_rows(named=True)}


def test_curves_are_those_of_curve_and_replay(thrash_page: Page, thrash: Path) -> None:
    frame = table(thrash_page, "miss-ratio")
    trace = kvtrace.open(thrash)
    sizes = sorted(set(frame["capacity_blocks"].to_list()))
    assert {99, 199, 398, 912} <= set(sizes)
    again = kvtrace.replay(trace, list(POLICIES), sizes).select("policy", "capacity_blocks", "token_hit_ratio")
    both = frame.join(again, on=["policy", "capacity_blocks"], suffix="_replayed")
    assert both.height == frame.height == again.height
    assert both["token_hit_ratio"].equals(both["token_hit_ratio_replayed"], check_names=False)
    assert (both["token_miss_ratio"] + both["token_hit_ratio_replayed"] - 1).abs().max() == 0
    figure = panel(thrash_page, "miss-ratio").figure
    assert figure is not None
    (diamond,) = (trace for trace in figure["data"] if trace["name"] == "the engine itself")
    own = own_hits(trace.reader, trace.header)
    assert own is not None
    assert (diamond["x"], diamond["y"]) == ([199], [1 - own["token_hit_ratio"]])


def test_figures_are_those_of_stats(thrash_page: Page, known: dict[tuple[str, str | None], float]) -> None:
    def one(name: str) -> float:
        return known[name, None]

    tokens = table(thrash_page, "throughput")
    assert tokens["prefill_tokens"].sum() == one("prefill_tokens")
    assert tokens["decode_tokens"].sum() == one("decode_tokens")
    assert table(thrash_page, "step-mix")["steps"].sum() == one("steps")
    outcomes = dict(table(thrash_page, "hits").select("outcome", "share").iter_rows())
    for outcome, metric in (
        ("hit", "token_hit_ratio_all"), ("capacity", "capacity_miss_ratio"), ("cold", "cold_miss_ratio"),
        ("preemption", "preemption_miss_ratio"), ("too short", "short_miss_ratio"),
    ):  # fmt: skip
        assert outcomes[outcome] == pytest.approx(one(metric), abs=1e-12)
    over_time = table(thrash_page, "hits-over-time")
    assert over_time["tokens_hit"].sum() == table(thrash_page, "hits")["tokens"][0]
    lost = table(thrash_page, "preemptions")
    assert lost["preemptions"].sum() == one("preemptions")
    assert lost["tokens_recomputed"].sum() == one("recomputed_tokens")
    assert table(thrash_page, "occupancy")["preemptions"].sum() == one("preemptions")
    for name, part, metric in (
        ("hits-by-depth", "part", "block_hit_ratio_at_depth"), ("hits-by-turn", "part", "token_hit_ratio_at_turn"),
        ("reuse-distance", "distance", "reuses_at_distance"), ("reuse-time", "time", "reuses_after_time"),
        ("lifetimes", "time", "lifetimes_of_time"), ("lifetimes", "time", "idle_of_time"),
    ):  # fmt: skip
        rows = table(thrash_page, name)
        assert rows.height > 2
        for at, value in rows.select(part, metric).iter_rows():
            assert known[metric, at] == pytest.approx(value)
    shown = dict(tiles(opened(report_cases.case("thrash", Path()))[0]))
    assert shown["tokens found"] == f"{one('token_hit_ratio'):.1%}"
    assert shown["preemptions"] == "26"


def test_bands_show_their_own_columns(thrash_page: Page) -> None:
    from kvtrace.reports.sections.hits import OUTCOMES
    from kvtrace.reports.sections.preemptions import LOST

    for name, bands in (("occupancy", charts.OCCUPANCY), ("hits-over-time", OUTCOMES), ("preemptions", LOST)):
        figure, frame = panel(thrash_page, name).figure, table(thrash_page, name)
        assert figure is not None
        columns = {label: column for label, column, _ in bands}
        shown = [trace for trace in figure["data"] if trace.get("meta") != "mark"]
        assert len(shown) >= 2
        for trace in shown:
            assert trace["y"] == charts.numbers(frame[columns[trace["name"]]])
            assert trace["x"] == charts.numbers(frame["time_s"])


def test_sentences_carry_the_figures_of_stats(known: dict[tuple[str, str | None], float], thrash: Path) -> None:
    said = " ".join(verdict(opened(thrash)[0]))
    for name in ("token_hit_ratio", "capacity_miss_ratio", "block_utilisation_mean", "recomputed_token_ratio"):
        assert f"{known[name, None]:.1%}" in said
    again = kvtrace.replay(thrash, ["lru", "opt"], [199, 398, 912])
    for ratio in again["token_hit_ratio"].to_list()[:4]:
        assert f"{ratio:.1%}" in said
    assert f"{known['preempted_tokens', None]:,.0f} tokens" in said


def test_occupancy_keeps_its_mean_and_its_sum(thrash: Path) -> None:
    run = opened(thrash)[0]
    assert run.capacity == 199
    from kvtrace.reports.sections import occupancy

    frame = occupancy.timeline(run)
    assert set(frame.select(pl.sum_horizontal("used", "cached_idle", "free").round(1)).to_series()) == {199.0}
    exact = kvtrace.open(thrash).sql("SELECT step, used, cached_idle, free FROM occupancy ORDER BY step")
    assert frame.height == occupancy.SLICES  # the run has more steps than are drawn one by one
    assert frame["used"].max() == exact["used"].max()
    assert frame["used"][0] == exact["used"][0]


def test_reads_in_the_heat_map_are_the_reads_of_the_trace(thrash_page: Page, thrash: Path) -> None:
    reads = kvtrace.open(thrash).sql("SELECT count(*) FROM reads").item()
    assert table(thrash_page, "accesses")["reads"].sum() == reads


def test_large_traces_count_blocks_taken(thrash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtrace.reports.sections import heatmap

    monkeypatch.setattr(heatmap, "TAKEN", 10)
    (made,) = heatmap.accesses(opened(thrash)[0])
    assert made.table is not None
    taken = kvtrace.open(thrash).sql("SELECT count(*) FROM block_events WHERE kind IN ('allocate', 'hit')").item()
    assert made.table["taken"].sum() == taken
    assert f"{taken:,} blocks taken" in made.prose


def test_the_tree_has_parents_before_children(thrash_page: Page) -> None:
    nodes = table(thrash_page, "prefixes")
    seen: set[int] = set()
    for node, parent in nodes.select("node", "parent").iter_rows():
        assert parent is None or parent in seen
        seen.add(node)
    requests = dict(nodes.select("node", "requests").iter_rows())
    for parent, below in nodes.drop_nulls("parent").group_by("parent").agg(pl.col("requests").sum()).iter_rows():
        assert below <= requests[parent]


def test_the_slowest_are_the_slowest(thrash_page: Page, thrash: Path) -> None:
    frame = table(thrash_page, "slowest")
    latencies = kvtrace.open(thrash).sql("SELECT request, e2e_ns FROM latencies ORDER BY e2e_ns DESC, request LIMIT 30")
    assert frame["request"].to_list() == latencies["request"].to_list()
    sums = frame.select((pl.col("queue_s") + pl.col("prefill_s") + pl.col("decode_s") - pl.col("e2e_s")).abs().max())
    assert sums.item() < 1e-9


def test_few_points_where_uses_are_many() -> None:
    few, many = curve_sizes([1000], 100_000, 30_000_000), curve_sizes([1000], 100_000, 1000)
    assert {500, 1000, 2000, 100_000} <= set(few) & set(many)
    assert len(few) < 10 < len(many)
    assert curve_sizes([], 1, 1) == [1]
    assert max(curve_sizes([5000], 10, 20)) == 10_000


def test_side_by_side(two_engines: Path, thrash: Path, tmp_path: Path) -> None:
    frame = kvtrace.report([thrash, two_engines], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert 'id="compare"' in text
    names = ["thrash", "two · engine 0", "two · engine 1"]
    assert frame.filter(pl.col("plot") == "occupancy")["run"].to_list() == names
    made = compose(opened([thrash, two_engines]), chosen(["compare"]), lambda _: None)
    figures = table(made, "compare")
    assert figures.columns == ["figure", *names]
    assert figures.row(0) == ("requests", "192", "192", "192")
    for name in ("compare-miss-ratio", "compare-hits", "compare-ttft"):
        shown = panel(made, name).figure
        assert shown is not None
        assert [trace["name"] for trace in shown["data"]][:3] == names
    ttft = table(made, "compare-ttft").filter((pl.col("run") == "thrash") & (pl.col("quantile") == 0.5))["ttft_s"][0]
    stats = kvtrace.stats(thrash)
    assert ttft == pytest.approx(stats.filter(pl.col("metric") == "ttft_p50_s")["value"][0])


def test_long_names_leave_room(thrash: Path, tmp_path: Path) -> None:
    name = "a-run-with-a-name-that-goes-on-and-on-and-says-everything-about-the-server-it-was-made-on"
    (tmp_path / f"{name}.kvt").symlink_to(thrash)
    made = compose(opened([tmp_path / f"{name}.kvt", thrash]), chosen(["compare"]), lambda _: None)
    figure = panel(made, "compare-hits").figure
    assert figure is not None
    assert figure["data"][0]["name"] == f"{name[: charts.LEGEND - 1]}…"
    assert name in figure["data"][0]["hovertemplate"]
    assert f'title="{name}"' in build(made)  # whole, where it is cut


def test_losses_are_told(tmp_path: Path) -> None:
    runs = opened(report_cases.case("losses", tmp_path))
    made = compose(runs, chosen(["setup"]), lambda _: None)
    assert dict(panel(made, "setup").facts)["whole"].startswith("no: ")
    assert table(made, "losses").height == 1


def test_an_import_is_not_given_an_engine(tmp_path: Path) -> None:
    run = opened(report_cases.case("no-steps", tmp_path))[0]
    made = compose([run], chosen(["setup", "accesses"]), lambda _: None)
    facts = dict(panel(made, "setup").facts)
    assert "engine" not in facts
    assert facts["origin"] == "imported: requests only, no engine"
    assert facts["cache"].startswith("not known")
    assert table(made, "accesses")["uses"].sum() == run.sql("SELECT count(*) FROM reuse").item()
    assert "preemptions" not in dict(made.tiles)
    assert subtitle(run)[:2] == "20"  # a date is all there is


def test_numbers_of_figures_are_plain() -> None:
    values = charts.numbers(pl.Series([1.0, math.nan, math.inf, None, 1 / 3]))
    assert values == [1.0, None, None, None, 0.3333333]
    assert charts.numbers(pl.Series([1, None])) == [1, None]


Cli = Callable[..., Any]


def test_command_writes_a_page(kvtrace_cli: Cli, thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = kvtrace_cli("report", thrash, "-o", out)
    assert done.code == 0
    assert done.out == ""
    assert "What the blocks were doing" in done.err  # progress
    assert f"wrote {out}" in done.err
    assert 'data-plot="occupancy"' in out.read_text("utf-8")
    again = kvtrace_cli("report", thrash, "-o", out)
    assert again.code == 2
    assert "--force" in again.err
    assert kvtrace_cli("report", thrash, "-o", out, "--force", "--section", "setup").code == 0
    assert 'data-plot="occupancy"' not in out.read_text("utf-8")


def test_damaged_input_is_exit_3(kvtrace_cli: Cli, damaged: Path, tmp_path: Path) -> None:
    assert kvtrace_cli("report", damaged, "-o", tmp_path / "page.html", "--section", "setup").code == 3


@pytest.mark.parametrize(
    "args", [("--section", "nope"), ("--section", "nofile.py:f"), ("-o", "no/such/folder.html"), ("-o", ".")]
)
def test_wrong_values_are_usage_errors(args: tuple[str, ...], kvtrace_cli: Cli, thrash: Path) -> None:
    done = kvtrace_cli("report", thrash, *args)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_no_trace_no_page(kvtrace_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.kvt").write_text("not a trace")
    done = kvtrace_cli("report", tmp_path / "text.kvt", "-o", tmp_path / "page.html")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()
    assert kvtrace_cli("report").code == 2
    with pytest.raises(kvtrace.UsageError):
        kvtrace.report([])


def test_command_and_call_agree(kvtrace_cli: Cli, thrash: Path, tmp_path: Path) -> None:
    frame = kvtrace.report(kvtrace.open(thrash), tmp_path / "call.html", ["setup", "hits"])
    assert frame["plot"].to_list() == ["setup", "hits", "hits-over-time", "hits-by-depth", "hits-by-turn"]
    assert frame["why"].null_count() == frame.height
    kvtrace_cli("report", thrash, "-o", tmp_path / "command.html", "--section", "setup", "--section", "hits")
    assert (tmp_path / "call.html").read_text() == (tmp_path / "command.html").read_text()
