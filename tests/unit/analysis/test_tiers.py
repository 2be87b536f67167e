"""`kvtrace replay --tier` and `kvtrace.tiers.replay_tiers`: a cache in tiers over a recorded trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import kvtrace
from kvtrace.cli.output import Output, output_options
from kvtrace.cli.tier_options import Tiers, tier_options
from kvtrace.tiers import replay_tiers
from kvtrace_replay.tiers import Tier

TIERS = ["hbm:150", "dram:60:mode=exclusive,bandwidth=25GB/s"]


@click.command()
@click.argument("paths", nargs=-1, type=Path)
@tier_options
@output_options
def command(paths: tuple[Path, ...], tiers: Tiers | None, output: Output) -> int:
    assert tiers is not None
    return tiers.run(paths, ["lru"], None, None, ["prefix"], 0.0, output)


def run(*words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False, standalone_mode=False)


def options(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--tier", text)]


def test_command_and_call_agree(thrash: Path) -> None:
    done = run(thrash, *options(*TIERS), "--prefill-tokens-per-s", "8000", "--bytes-per-token", "1000", "--json")
    rows = json.loads(done.stdout)
    called = replay_tiers(thrash, TIERS, bytes_per_token=1000, prefill_tokens_per_s=8000)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in called.to_dicts()]
    assert [row["tier"] for row in rows] == ["hbm", "dram", "total"]
    dram = rows[1]
    assert dram["block_hits"] > 0
    assert dram["bytes_up"] == dram["blocks_up"] * 1000 * dram["block_size"]
    assert dram["load_seconds"] == pytest.approx(dram["bytes_up"] / 25e9)
    assert dram["recompute_seconds"] == pytest.approx(dram["token_hits"] / 8000)
    assert dram["seconds_saved"] == pytest.approx(dram["recompute_seconds"] - dram["load_seconds"])
    assert rows[-1]["seconds_saved"] == pytest.approx(rows[0]["recompute_seconds"] + dram["seconds_saved"])


def test_the_top_tier_alone_is_the_plain_replay(thrash: Path) -> None:
    (plain,) = kvtrace.replay(thrash, "fifo", 150).to_dicts()
    top = replay_tiers(thrash, "hbm:150", "fifo").to_dicts()[0]
    assert {name: top[name] for name in ("policy", "block_hits", "token_hits", "evictions")} == {
        name: plain[name] for name in ("policy", "block_hits", "token_hits", "evictions")
    }


def test_the_table_for_people(thrash: Path) -> None:
    done = run(thrash, *options(*TIERS))
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ["hbm", "dram", "total"]
    assert "seconds" not in done.stdout
    assert "dram: exclusive, stored when evicted above; a hit moves up" in done.stderr


def test_several_block_sizes_and_semantics(thrash: Path) -> None:
    size = kvtrace.open(thrash).header["granule"]
    frame = replay_tiers(thrash, [Tier("hbm", "inf")], block_size=[size, 2 * size], semantics=["prefix", "object"])
    assert frame["block_size"].to_list() == [size] * 4 + [2 * size] * 4
    assert frame["semantics"].to_list() == ["prefix", "prefix", "object", "object"] * 2


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--bytes-per-token", "1"], "need a --tier"),
        (options("dram"), "NAME:CAPACITY"),
        (options("hbm:10:mode=exclusive"), "top tier"),
        (options("hbm:150", "hbm:2"), "name of its own"),
        ([*options("hbm:150"), "--prefill-tokens-per-s", "0"], "above 0"),
    ],
)
def test_wrong_usage_names_the_fix(thrash: Path, words: list[str], fix: str) -> None:
    with pytest.raises(kvtrace.UsageError, match=fix):
        run(thrash, *words)


def test_other_options_that_do_not_go_with_tiers(thrash: Path) -> None:
    tiers = Tiers(("hbm:150",))
    with pytest.raises(kvtrace.UsageError, match="exclude each other"):
        tiers.run([thrash], ["lru"], ["10"], None, ["prefix"], 0.0, Output())
    with pytest.raises(kvtrace.UsageError, match="each tier its own"):
        tiers.run([thrash], ["lru", "fifo"], None, None, ["prefix"], 0.0, Output())
