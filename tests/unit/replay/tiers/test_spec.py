"""How tiers are written, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvtrace_replay.tiers import Tier, parse_bandwidth, parse_tier, replay_tiers
from kvtrace_traces.errors import UsageError
from unit.replay.twins import make_workload

WORKLOAD = make_workload([[0, 1, 2]])


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        ("hbm:2000", Tier("hbm", "2000")),
        ("dram:20k:write=demote", Tier("dram", "20k", write="demote")),
        ("ssd:1TiB:mode=exclusive,promote=no,uses=2", Tier("ssd", "1TiB", mode="exclusive", promote=False, uses=2)),
        ("dram:50%:bandwidth=25GB/s", Tier("dram", "50%", bandwidth=25e9)),
        (
            "ssd:inf:policy=s3fifo:small=0.2,ghost=1,write=through",
            Tier("ssd", "inf", policy="s3fifo:small=0.2,ghost=1", write="through"),
        ),
        ("a:1:uses=3,policy=lru+second-touch:uses=4", Tier("a", "1", policy="lru+second-touch:uses=4", uses=3)),
        (" b:65536tok:policy=./mine.py:Mine ", Tier("b", "65536tok", policy="./mine.py:Mine")),
    ],
)
def test_what_is_written_is_read(text: str, tier: Tier) -> None:
    assert parse_tier(text) == tier


def test_the_policy_of_a_tier_that_names_none() -> None:
    assert parse_tier("hbm:1", "fifo").policy == "fifo"
    assert parse_tier("hbm:1:policy=opt", "fifo").policy == "opt"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("dram", "NAME:CAPACITY"),
        ("dram:", "NAME:CAPACITY"),
        ("dram:1:write", "KEY=VALUE"),
        ("dram:1:write=", "KEY=VALUE"),
        ("dram:1:speed=1", "KEY one of policy"),
        ("dram:1:policy=lru,small=0.2", "KEY one of policy"),
        ("dram:1:write=back", "through, demote"),
        ("dram:1:mode=both", "nine, inclusive, exclusive"),
        ("dram:1:promote=maybe", "yes, no"),
        ("dram:1:uses=two", "1 to 255"),
        ("dram:1:uses=1,uses=2", "given twice"),
        ("dram:1:bandwidth=fast", "25GB/s"),
    ],
)
def test_texts_that_cannot_be(text: str, fix: str) -> None:
    with pytest.raises(UsageError, match=fix):
        parse_tier(text)


@pytest.mark.parametrize(
    ("texts", "fix"),
    [
        (["a:1", "b:1", "c:1", "d:1", "e:1"], "name 1 to 4"),
        (["a:1", "a:2"], "name of its own"),
        (["total:1"], "cannot be called"),
        (["1 2:1"], "cannot be called"),
        (["hbm:1:write=through"], "top tier"),
        (["hbm:1:mode=exclusive"], "top tier"),
        (["hbm:1:promote=no"], "top tier"),
        (["hbm:1:bandwidth=1GB/s"], "top tier"),
        (["hbm:1:uses=0"], "between 1 and 255"),
        (["hbm:1", "dram:2:uses=256"], "between 1 and 255"),
        (["hbm:1", "dram:2:policy=lru+second-touch,uses=2"], "leave one out"),
        (["hbm:1", "dram:2:mode=exclusive,write=through"], "mode=nine"),
        (["hbm:1", "dram:2:mode=inclusive,write=demote"], "leave out write=demote"),
        (["hbm:1", "dram:2:mode=inclusive,uses=2"], "leave out write=demote"),
        (["hbm:2", "dram:1:mode=inclusive"], "fewer than the 2 of 'hbm'"),
        (["hbm:1", "dram:none"], "is not a size"),
        (["hbm:1", "dram:2:policy=lruu"], "did you mean"),
        (["hbm:1", "dram:2:policy=two_handed"], "no policy is called"),
    ],
)
def test_tiers_that_cannot_stand_together(texts: list[str], fix: str) -> None:
    with pytest.raises(UsageError, match=fix):
        replay_tiers(WORKLOAD, texts, "object")


def test_tiers_made_by_hand_are_checked_too() -> None:
    for tier in (Tier("dram", 2, mode="both"), Tier("dram", 2, write="back"), Tier("dram", 2, bandwidth=-1)):
        with pytest.raises(UsageError):
            replay_tiers(WORKLOAD, [Tier("hbm", 1), tier], "object")


def test_a_policy_that_cannot_give_up_a_block_is_refused_where_it_must(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from kvtrace_replay.policies import policy\n"
        "from kvtrace_replay.policies.lru import Lru\n"
        "@policy('rigid', summary='as lru', paper='none')\n"
        "class Rigid:\n"
        "    setup, insert, hit, evict = Lru.setup, Lru.insert, Lru.hit, Lru.evict\n"
    )
    mine = f"policy={tmp_path}/mine.py:Rigid"
    for texts in (["hbm:1", f"dram:2:{mine},mode=exclusive"], [f"hbm:1:{mine}", "dram:2:mode=inclusive"]):
        with pytest.raises(UsageError, match=r"has no remove\(\).* or one of .*arc.*wtinylfu") as caught:
            replay_tiers(WORKLOAD, texts, "object")
        assert "\n" not in str(caught.value)
    assert "sglang" not in str(caught.value)


def test_a_policy_of_the_tree_has_no_tiers() -> None:
    with pytest.raises(UsageError, match="no meaning in object semantics"):
        replay_tiers(WORKLOAD, ["hbm:1", "dram:2:policy=sglang-lru,mode=exclusive"], "object")


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("25GB/s", 25e9),
        ("0.5 GiB/s", 2**29),
        ("900MB/s", 9e8),
        ("1TiB/s", 2**40),
        ("100Gbit/s", 12.5e9),
        ("64B/s", 64),
        ("25", 25),
        ("2e9", 2e9),
        (3.5, 3.5),
        (1e21, 1e21),
    ],
)
def test_bandwidths(text: str | float, bytes_per_s: float) -> None:
    assert parse_bandwidth(text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "0", "0GB/s", "-1GB/s", "25GB", "25Gb/s", "nan", math.inf])
def test_bandwidths_that_cannot_be(text: str | float) -> None:
    with pytest.raises(UsageError, match="25GB/s"):
        parse_bandwidth(text)
