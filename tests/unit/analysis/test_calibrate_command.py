"""`kvtrace calibrate`: one source, a profile on disk, the figures as tables, and what is wrong in one line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kvtrace import samples
from kvtrace.calibrations import calibrate, table
from kvtrace_replay.timing.catalogue import GPUS, MODELS
from kvtrace_replay.timing.profile import Profile
from kvtrace_replay.timing.roofline import roofline
from kvtrace_replay.timing.work import COLUMNS
from kvtrace_traces.errors import KvtraceError
from unit.analysis import toys

ROOT = Path(__file__).parents[3]


def test_a_trace(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "profile.toml"
    done = kvtrace_cli("calibrate", samples.path("chat"), "-o", out)
    assert done.code == 0
    assert f"wrote {out}" in done.err
    for text in (*COLUMNS, "802 steps", "median", "p95", "bias", "decode", "mixed", "22.5 KiB a token"):
        assert text in done.out
    assert Profile.load(out) == calibrate(samples.path("chat"))
    again = kvtrace_cli("calibrate", samples.path("chat"), "-o", out)
    assert (again.code, again.out) == (2, "")
    assert "--force overwrites it" in again.err
    assert kvtrace_cli("calibrate", samples.path("chat"), "-o", out, "--force").code == 0


def test_tables_agree(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    rows = json.loads(kvtrace_cli("calibrate", thrash, "--json").out)
    assert rows == table(calibrate(thrash)).to_dicts()
    costs = [row for row in rows if row["part"] == "cost"]
    assert [row["metric"] for row in costs] == list(COLUMNS)
    assert all(row["low"] <= row["high"] and row["unit"].startswith("ns") for row in costs)
    steps = {row["at"]: row["value"] for row in rows if row["part"] == "error" and row["metric"] == "steps"}
    assert steps == {"all": 1245, "prefill": 3, "decode": 1116, "mixed": 126}
    text = kvtrace_cli("calibrate", thrash, "--csv").out
    assert [float(row["value"]) for row in csv.DictReader(io.StringIO(text))] == [row["value"] for row in rows]
    done = kvtrace_cli("calibrate", thrash, "--parquet", tmp_path / "t.parquet")
    assert (done.code, done.out) == (0, "")
    assert pl.read_parquet(tmp_path / "t.parquet").to_dicts() == rows


def test_a_gpu(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "a100.toml"
    options = ("--gpu", "a100-40gb", "--model", "llama-2-7b")
    done = kvtrace_cli("calibrate", *options, "-o", out)
    assert done.code == 0
    assert "h2d-pinned-scattered" in done.out
    assert "25.00 GB/s" in done.out
    assert "512.0 KiB a token" in done.out
    assert Profile.load(out) == roofline("a100-40gb", "llama-2-7b")
    slow = kvtrace_cli("calibrate", *options, "--compute-efficiency", "0.3", "--copy-us", "9", "--json")
    rows = {(row["at"], row["metric"]): row["value"] for row in json.loads(slow.out)}
    assert rows[None, "prefill_token"] == pytest.approx(2 * Profile.load(out).costs["prefill_token"])
    assert rows["d2h-pageable-scattered", "copy_ns"] == 9000
    large = kvtrace_cli("calibrate", "--gpu", "l4", "--model", "llama-2-70b")
    assert large.code == 0
    assert "llama-2-70b does not fit: 128.5 GiB of weights, 22.4 GiB of memory" in large.err
    assert "does not fit" not in kvtrace_cli("calibrate", "--gpu", "l4", "--model", "llama-2-70b",
                                             "--tensor-parallel", "8").err  # fmt: skip


def test_a_link_for_a_trace(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    assert kvtrace_cli("calibrate", thrash, "--link", "h100", "-o", first).code == 0
    assert Profile.load(first).swap_ns(10, 32) > 0
    assert kvtrace_cli("calibrate", samples.path("chat"), "--link", first, "-o", second).code == 0
    assert Profile.load(second).link == Profile.load(first).link
    kvtrace_cli("calibrate", thrash, "-o", first, "--force")
    done = kvtrace_cli("calibrate", thrash, "--link", first)
    assert (done.code, done.out) == (1, "")
    assert "does not know what moving blocks costs" in done.err


def test_a_device(kvtrace_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from kvtrace_replay.timing import copies, device

    monkeypatch.setattr(device, "QUICK", device.Plan(((4, 0), (16, 8)), ((1, 8), (4, 30), (8, 8)), 3, 3, 0.01))
    monkeypatch.setattr(copies, "QUICK_SIZES", (4096, 65536))
    monkeypatch.setattr(copies, "QUICK_COUNTS", (1, 4))
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "device.toml"
    done = kvtrace_cli("calibrate", "--device", "cpu", "--quick", "--layers", 1, "--model", tmp_path, "-o", out)
    assert done.code == 0, done.err
    assert "pinned memory is not measured on the cpu" in done.err
    assert "1 of 3 layers were run" in done.err
    assert "h2d-pageable-gathered" in done.out
    assert len(Profile.load(out).measured) == 5 + 4 * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name exactly one of TRACE, --device and --gpu"), (["--gpu", "h100"], "--gpu needs --model"),
        (["--gpu", "h100", "--device", "cpu", "--model", "llama-2-7b"], "name exactly one"),
        (["TRACE", "--gpu", "h100"], "name exactly one"), (["TRACE", "--model", "llama-2-7b"], "--model goes with"),
        (["TRACE", "--quick"], "--quick goes with --device"), (["TRACE", "--layers", "2"], "--layers goes with"),
        (["TRACE", "--copy-us", "2"], "--copy-us goes with --gpu"),
        (["--device", "cpu", "--tensor-parallel", "2"], "--tensor-parallel goes with --gpu"),
        (["--gpu", "h100", "--model", "llama-2-7b", "--link", "h100"], "--link goes with TRACE"),
        (["--gpu", "h10", "--model", "llama-2-7b"], "there is no GPU 'h10': did you mean h100"),
        (["--gpu", "h100", "--model", "llama-2-7"], "did you mean llama-2-7b"),
        (["--gpu", "h100", "--model", "llama-2-7b", "--memory-efficiency", "1.5"], "memory 1.5 must be a share"),
        (["--gpu", "h100", "--model", "llama-2-7b", "-o", "/no/folder/x.toml"], "there is no folder /no/folder"),
        (["--device", "tpu"], "'tpu' is not one of"),
    ],
)  # fmt: skip
def test_wrong_options(kvtrace_cli: Callable[..., Any], thrash: Path, options: list[str], said: str) -> None:
    done = kvtrace_cli("calibrate", *[thrash if option == "TRACE" else option for option in options])
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_simulated_trace_tells_the_costs_that_timed_it(
    kvtrace_cli: Callable[..., Any], tmp_path: Path, thrash: Path
) -> None:
    """The simulator counts the work of a step as the fit does: what went in comes out."""
    profile, again = tmp_path / "chat.toml", tmp_path / "again.kvt"
    calibrate(samples.path("chat")).save(profile)
    done = kvtrace_cli("simulate", thrash, "--num-blocks", "150", "--timing", profile, "-o", again)
    assert done.code == 0, done.err
    found = calibrate(again)
    assert found.costs == pytest.approx(Profile.load(profile).mean_costs, rel=1e-4)
    assert found.stretch == pytest.approx(1, abs=1e-4)
    assert found.errors[0].p95 < 1e-5


def test_traces_that_cannot_tell(
    kvtrace_cli: Callable[..., Any], tmp_path: Path, damaged: Path, two_engines: Path, thrash: Path
) -> None:
    done = kvtrace_cli("calibrate", toys.imported(1, tmp_path).path)
    assert (done.code, done.out) == (1, "")
    assert "is an import" in done.err
    assert "--gpu h100 --model llama-3.1-8b" in done.err
    untimed = tmp_path / "untimed.kvt"
    assert kvtrace_cli("simulate", thrash, "--timing", "none", "-o", untimed).code == 0
    done = kvtrace_cli("calibrate", untimed)
    assert (done.code, done.out) == (1, "")
    assert "simulated without a clock" in done.err
    done = kvtrace_cli("calibrate", damaged)
    assert done.code == 3
    assert "call" in done.out
    both = calibrate(two_engines)
    assert both.facts["steps"] == 2 * 1245
    with pytest.raises(KvtraceError):
        calibrate(tmp_path / "none.kvt")


def test_the_page_shows_what_is_printed(kvtrace_cli: Callable[..., Any]) -> None:
    """The examples of docs/timing.md, and the names that it lists."""
    page = (ROOT / "docs/timing.md").read_text()
    shown = re.findall(r"^```\n\$ kvtrace (calibrate \S+)\n(.*?)^```", page, re.S | re.M)
    assert len(shown) == 2
    for command, lines in shown:
        name, trace = command.split()
        done = kvtrace_cli(name, ROOT / trace)
        assert done.out == lines
    gpus, models = re.findall(r"^GPUs: (.*?)\. Models: (.*?), or any", page, re.S | re.M)[0]
    assert gpus.strip("`").split() == list(GPUS)
    assert models.strip("`").split() == list(MODELS)


def test_the_example_of_swap_and_recompute() -> None:
    """The figures of docs/timing.md for a request of 2,524 tokens, in milliseconds."""
    page = " ".join((ROOT / "docs/timing.md").read_text().split())
    profile = roofline("a100-40gb", "yarn-llama-2-7b-64k")
    ms = {size: profile.swap_ns(-(-2524 // size), size) / 1e6 for size in (8, 16, 32, 128)}
    together = [profile.swap_ns(-(-2524 // size), size, copies="gathered") / 1e6 for size in (8, 16, 32, 128)]
    assert f"costs {profile.recompute_ns(2524) / 1e6:.0f} ms by recomputing it" in page
    assert (
        f"{ms[8]:.0f} ms at a block size of 8, {ms[16]:.0f} ms at 16, {ms[32]:.0f} ms at 32 and {ms[128]:.0f} ms at 128"
    ) in page
    assert f"gathered, {min(together):.0f} to {max(together):.0f} ms at any" in page
