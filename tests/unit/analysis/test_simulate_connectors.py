"""Which tiers the options ask for, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvtrace.simulations_offload import host_tiers
from kvtrace_replay.schedulers.sweep import HostTier
from kvtrace_traces.errors import UsageError

ROOM: dict[str, Any] = {"preemption": "offload", "cpu_offload": 100}


def asked(**more: Any) -> list[tuple[str, str, str]]:
    tiers = host_tiers({**ROOM, **more})
    assert all(isinstance(tier, HostTier) and tier.room == 100 for tier in tiers)
    return [(tier.connector, tier.store, tier.policy) for tier in tiers if tier is not None]


def test_each_connector_gets_what_it_has() -> None:
    assert asked() == [("offloading", "fill", "lru")]
    assert asked(offload_store="eviction") == [("simple", "eviction", "lru")]
    assert asked(offload_connector="simple") == [("simple", "fill", "lru")]
    assert asked(offload_connector=["offloading", "simple"], offload_store=["fill", "eviction"],
                 offload_policy=["lru", "arc"]) == [
        ("offloading", "fill", "lru"), ("offloading", "fill", "arc"), ("simple", "fill", "lru"),
        ("simple", "eviction", "lru"),
    ]  # fmt: skip
    assert host_tiers({"preemption": ["recompute", "offload"], "cpu_offload": [1, 2]}) == [
        None, HostTier(1), HostTier(2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**ROOM, "offload_connector": "disk"}, "--offload-connector disk is none of offloading, simple"),
        ({**ROOM, "offload_store": "never"}, "--offload-store never is none of fill, eviction"),
        ({**ROOM, "offload_policy": "fifo"}, "--offload-policy fifo is none of lru, arc"),
        ({**ROOM, "offload_store": "eviction", "offload_connector": "offloading"}, "is of --offload-connector simple"),
        ({**ROOM, "offload_store": "eviction", "offload_policy": "arc"}, "is of --offload-connector offloading"),
        ({**ROOM, "offload_store": "eviction", "offload_connector": ["simple", "offloading"]},
         "--offload-connector offloading does none"),
        ({"offload_store": "eviction"}, "are of --preemption offload"),
    ],
)  # fmt: skip
def test_what_no_connector_has(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        host_tiers(settings)


def test_from_the_command_line(kvtrace_cli: Any, thrash: Path, tmp_path: Path) -> None:
    """Rows name connector and store; what is told of requests, steps and transfers adds up to the row."""
    import polars as pl

    import kvtrace

    requests, steps, out = tmp_path / "r.parquet", tmp_path / "s.parquet", tmp_path / "out.kvt"
    done = kvtrace_cli(
        "simulate", thrash, "--preemption", "offload", "--cpu-offload", "2000", "--offload-store",
        "eviction", "--link", "25GB/s", "--arrivals", "time", "--per-request", requests, "--per-step", steps, "-o", out,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    (row,) = json.loads(done.out) if done.out.startswith("[") else [json.loads(done.out)]
    assert (row["offload_connector"], row["offload_store"], row["offload_policy"]) == ("simple", "eviction", "lru")
    assert min(row["stored_blocks"], row["loaded_blocks"], row["ttft_p50_s"]) > 0
    told, each = pl.read_parquet(requests), pl.read_parquet(steps)
    assert told["loaded_blocks"].sum() == each["loaded_blocks"].sum() == row["loaded_blocks"]
    assert told["stored_blocks"].sum() == 0
    assert each["stored_blocks"].sum() == row["stored_blocks"]
    assert each["tier_blocks"].max() <= 1999
    moved = kvtrace.open(out).offloads.group_by(pl.col("kind").cast(str)).agg(pl.col("blocks", "bytes").sum())
    assert {kind: (blocks, size) for kind, blocks, size in moved.rows()} == {
        kind: (row[f"{name}_blocks"], row[f"{name}_bytes"]) for kind, name in (("store", "stored"), ("load", "loaded"))
    }
    stores = kvtrace.open(out).offloads.filter(pl.col("kind").cast(str) == "store")
    assert stores["request"].is_null().all()


def test_the_page_shows_what_is_printed(kvtrace_cli: Any) -> None:
    """The examples of docs/offload.md."""
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs/offload.md").read_text()
    shown = re.findall(r"^```console\n\$ kvtrace ([^\n]*)\n(.*?)^```", page, re.S | re.M)
    assert len(shown) == 2
    for command, lines in shown:
        done = kvtrace_cli(*(root / word if word.startswith("traces/") else word for word in command.split()))
        assert done.out == lines
