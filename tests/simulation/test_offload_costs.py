"""What a transfer between device and host costs by a profile."""

from __future__ import annotations

import pytest

from kvtrace_replay.timing.link import WAYS, LinkCost
from kvtrace_replay.timing.models import link_named, with_link
from kvtrace_replay.timing.profile import Model, Profile
from kvtrace_replay.timing.roofline import roofline
from kvtrace_traces.errors import KvtraceError, UsageError

COSTS = {"call": 1e6, "prefill_token": 1.0, "prefill_pair": 1.0, "decode_row": 1.0, "decode_context": 1.0}


def profile(link: dict[str, LinkCost], tokens: int | None = 1000) -> Profile:
    return Profile("p", "trace", "cpu", Model("m", 3, 2, tokens), COSTS, link=link)


def test_each_way_costs_what_its_bytes_and_copies_do() -> None:
    """By hand: 16 tokens of 1,000 bytes; a copy for each of three layers, whose keys and values lie together."""
    told = profile({
        "h2d-pinned-scattered": LinkCost(10, 5, 1e9), "d2h-pinned-scattered": LinkCost(20, 7, 0.5e9),
        "h2d-pageable-scattered": LinkCost(0, 1, 1e6), "h2d-pinned-gathered": LinkCost(100, 0, 2e9),
        "d2h-pinned-gathered": LinkCost(200, 0, 2e9),
    })  # fmt: skip
    assert told.transfer_costs(16).array().tolist() == [20, 3 * 7 + 32_000, 10, 3 * 5 + 16_000]
    assert told.transfer_costs(32).array().tolist() == [20, 3 * 7 + 64_000, 10, 3 * 5 + 32_000]
    gathered = told.transfer_costs(16, copies="gathered")
    assert gathered.array().tolist() == [200, 8_000, 100, 8_000]
    old = told.transfer_costs(16, copies="per-block-layer-tensor")
    assert old.array().tolist() == [20, 6 * 7 + 32_000, 10, 6 * 5 + 16_000]
    with pytest.raises(KvtraceError, match="d2h-pageable-scattered"):
        told.transfer_costs(16, pinned=False)


def test_a_transfer_of_many_blocks_is_that_of_its_bytes() -> None:
    """Equal to what the profile says of one transfer of so many bytes and copies."""
    gpu = roofline("h100", "llama-3.1-8b")
    costs = gpu.transfer_costs(16)
    for blocks in (1, 7, 100):
        size, copies = blocks * gpu.block_bytes(16), blocks * gpu.model.layers
        assert costs.out + blocks * costs.block_out == pytest.approx(gpu.transfer_ns(size, copies, "d2h"))
        assert costs.in_ + blocks * costs.block_in == pytest.approx(gpu.transfer_ns(size, copies, "h2d"))


def test_links_by_name_and_by_bandwidth() -> None:
    assert link_named("25GB/s") == dict.fromkeys(WAYS, LinkCost(0.0, 0.0, 25e9))
    assert link_named("1.5 mb/s")["h2d-pinned-gathered"].bytes_per_s == 1.5e6
    bare = profile({})
    assert with_link(bare, None) is bare
    assert with_link(bare, "2GB/s").transfer_costs(16).array().tolist() == [0, 8_000, 0, 8_000]
    assert with_link(bare, "h100").link == roofline("h100", "llama-3.1-8b").link
    for wrong, words in (("0GB/s", "more than 0"), ("0.0MB/s", "more than 0"), ("25", "no GPU"), ("-1GB/s", "no GPU")):
        with pytest.raises(UsageError, match=words):
            link_named(wrong)


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(KvtraceError, match="--link GPU"):
        profile({}).transfer_costs(16)
    with pytest.raises(KvtraceError, match="KV bytes of a token"):
        with_link(profile({}, None), "1GB/s").transfer_costs(16)
    with pytest.raises(UsageError, match="copies"):
        with_link(profile({}), "1GB/s").transfer_costs(16, copies="by hand")
