"""`calibrate --device` end to end on the cpu with a tiny shape, and its parts; torch is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.timing import copies, device
from kvtrace_replay.timing.catalogue import find_model
from kvtrace_replay.timing.copies import Pools, link_from
from kvtrace_replay.timing.device import measure
from kvtrace_replay.timing.profile import Measured, Profile
from kvtrace_traces.errors import KvtraceError, UsageError

TINY: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 101,
}  # fmt: skip


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small points."""
    plan = device.Plan(
        tuple((n, c) for n in (4, 16, 40) for c in (0, 64)), ((1, 8), (4, 8), (16, 8), (4, 90)), 3, 4, 0.01
    )
    monkeypatch.setattr(device, "QUICK", plan)
    monkeypatch.setattr(copies, "QUICK_SIZES", (4096, 65536))
    monkeypatch.setattr(copies, "QUICK_COUNTS", (1, 16))


def test_the_whole_of_it(torch: Any, tiny: str, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    profile = measure("cpu", tiny, quick=True, progress=lambda *at: told.append(at))
    assert profile.source == "device"
    assert profile.device.startswith("cpu")
    assert (profile.model.name, profile.model.layers, profile.model.kv_bytes_per_token) == (
        "tiny",
        4,
        4 * 2 * 2 * 16 * 2,
    )
    assert [done for done, _, _ in told] == list(range(1, told[0][1] + 1))
    points = {(point.what, point.size, point.context): point for point in profile.measured}
    assert len(points) == len(profile.measured) == told[0][1] == 10 + 4 * 4
    assert all(0 < point.q1_ns <= point.median_ns <= point.q3_ns for point in profile.measured)
    assert sum(profile.costs.values()) > 0
    assert min(profile.costs.values()) >= 0
    assert {error.batch: error.steps for error in profile.errors} == {"all": 10, "prefill": 6, "decode": 4}
    assert set(profile.link) == {
        f"{d}-pageable-{layout}" for d in ("h2d", "d2h") for layout in ("scattered", "gathered")
    }
    assert "not measured on the cpu" in str(profile.facts["pinned"])
    assert "scaled" not in profile.facts
    with pytest.raises(KvtraceError, match="does not know h2d-pinned-scattered"):
        profile.step_costs(16, pinned=True)
    costs = profile.step_costs(16)
    assert np.isfinite(costs.array()).all()
    assert costs.block_in > 0
    profile.save(tmp_path / "p.toml")
    assert Profile.load(tmp_path / "p.toml") == profile


def test_layers_that_are_not_run_are_scaled(torch: Any, tiny: str) -> None:
    profile = measure("cpu", tiny, layers=1, quick=True)
    assert profile.facts["layers_measured"] == 1
    assert "1 of 4 layers were run" in str(profile.facts["scaled"])
    assert profile.model.layers == 4


def test_scaling_by_hand(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five measured with two of eight layers and one with none: four times four, and one."""
    model = find_model("smollm2-135m")
    plan = device.Plan(((4, 0),), (), 1, 1, 0.0)
    bench = device._Bench(torch, "cpu", model, 15, device._Timer(torch, "cpu", plan))
    times = iter([(5.0, 4.0, 9.0), (1.0, 0.5, 1.5)])
    monkeypatch.setattr(bench, "timer", lambda _action: next(times))
    (point,) = bench.points(plan)
    assert (point.median_ns, point.q1_ns, point.q3_ns) == (1 + 4 * 2, 1 + 3 * 2, 1 + 8 * 2)


def test_the_work_of_a_point_by_hand() -> None:
    """3 tokens after 10: pairs of 11 + 12 + 13; 4 rows after 10 tokens each look at 11."""
    assert device._work(Measured("prefill", 3, 10, 1, 1, 1)) == [1, 3, 36, 0, 0]
    assert device._work(Measured("decode", 4, 10, 1, 1, 1)) == [1, 0, 0, 4, 44]


def test_points_that_do_not_fit_are_left_out_and_named(torch: Any, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 2 * (find_model(tiny).token_matmul + find_model(tiny).head_matmul)
    monkeypatch.setattr(device, "_free_bytes", lambda *_: (2 * weights + 0) / device._SHARE)
    plan = device.Plan(((4, 0), (16, 0), (40, 0)), ((1, 8), (4, 8), (9_000, 90)), 3, 4, 0.01)
    monkeypatch.setattr(device, "QUICK", plan)
    profile = measure("cpu", tiny, quick=True)
    assert profile.facts["left_out"] == "too large for the free memory, left out: decode 9000 after 90"
    assert sum(point.what == "decode" for point in profile.measured) == 2
    monkeypatch.setattr(device, "_free_bytes", lambda *_: 10.0)
    with pytest.raises(KvtraceError, match="not one layer of tiny fits"):
        measure("cpu", tiny, quick=True)


def test_a_cache_continues_a_prefill(torch: Any, tiny: str) -> None:
    """The same tokens in one pass, in two, and the last one as a decode row: the same outputs."""
    from kvtrace_replay.timing.transformer import Transformer

    torch.manual_seed(3)
    net = Transformer(torch, find_model(tiny), 4, "cpu", torch.float32)
    for block in net.blocks:
        block["qkv"] *= 30  # so that attention looks at some tokens more than at others
    lower = torch.nn.attention.bias.causal_lower_right
    x = torch.randn((2, 20, 64))
    with torch.inference_mode():
        net.fill(2, 20)
        whole = net.run(x, 0, 4, lower(20, 20))
        net.fill(2, 20)
        first = net.run(x[:, :13], 0, 4, lower(13, 13))
        second = net.run(x[:, 13:19], 13, 4, lower(6, 19))
        last = net.run(x[:, 19:], 19, 4, None)
        assert torch.allclose(torch.cat([first, second, last], 1), whole, atol=1e-4)
        changed = net.run(x[:, :13].flip(1), 0, 4, lower(13, 13))
        assert not torch.allclose(changed[:, -1], first[:, -1], atol=1e-2)


def test_plain_feed_forward_layers_run(torch: Any, tmp_path: Path) -> None:
    config = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
              "vocab_size": 50, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert measure("cpu", str(tmp_path), quick=True).model.layers == 2


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_copies_move_what_they_say(torch: Any, direction: str) -> None:
    pools = Pools(torch, "cpu", False, 4096, 16)
    assert sorted(pools.places) != list(range(16))
    source, target = (pools.host, pools.device) if direction == "h2d" else (pools.device, pools.host)
    source.copy_(torch.arange(source.numel()).view_as(source))
    target.zero_()
    pools.scattered(direction)
    for place in range(32):
        assert torch.equal(target[place], source[place]) == (place in pools.places)
        assert bool(target[place].any()) == (place in pools.places)
    pools = Pools(torch, "cpu", False, 4096, 16)
    if direction == "h2d":
        pools.together.copy_(torch.arange(pools.together.numel()).view_as(pools.together))
        pools.gathered("h2d")
        assert all(torch.equal(pools.device[place], pools.together[n]) for n, place in enumerate(pools.places))
    else:
        pools.device.copy_(torch.arange(pools.device.numel()).view_as(pools.device))
        pools.gathered("d2h")
        assert all(torch.equal(pools.together[n], pools.device[place]) for n, place in enumerate(pools.places))


def test_the_link_is_found_in_its_times() -> None:
    cases = [(size, count) for size in copies.SIZES for count in copies.COUNTS]
    exact = [Measured("h2d-pinned-scattered", s * n, n, 9e3 + 6e3 * n + s * n / 25, 0, 0) for s, n in cases]
    exact += [Measured("d2h-pinned-gathered", s * n, n, 3e4 + s * n / 20, 0, 0) for s, n in cases]
    found = link_from(exact)
    cost = found["h2d-pinned-scattered"]
    assert (cost.transfer_ns, cost.copy_ns, cost.bytes_per_s) == pytest.approx((9e3, 6e3, 25e9), rel=1e-6)
    cost = found["d2h-pinned-gathered"]
    assert (cost.transfer_ns, cost.copy_ns, cost.bytes_per_s) == pytest.approx((3e4, 0, 20e9), rel=1e-6)
    latency = [Measured("h2d-pageable-gathered", s * n, n, 1e6 / (1 + n), 0, 0) for s, n in cases]
    assert link_from(latency)["h2d-pageable-gathered"].bytes_per_s > 0


def test_what_cannot_be_measured(torch: Any, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KvtraceError, match="deepseek-v3 has a mixture of experts, which --device does not run"):
        measure("cpu", "deepseek-v3")
    with pytest.raises(UsageError, match="there is no model"):
        measure("cpu", "none")
    if not torch.cuda.is_available():
        with pytest.raises(KvtraceError, match="torch sees no GPU here"):
            measure("cuda", tiny)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(KvtraceError, match=r"pip install 'kvtrace\[calibrate\]'"):
        measure("cpu", tiny)


def test_torch_is_imported_for_this_alone() -> None:
    import subprocess

    code = ("import sys, kvtrace.calibrations, kvtrace.cli.calibrate, kvtrace_replay.timing.models;"
            "import kvtrace_replay.timing.device; print('torch' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
