"""Profiles: what they cost, their TOML, and every way in which a file can be wrong."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrace_replay.timing import profile as profiles
from kvtrace_replay.timing.fit import FitError
from kvtrace_replay.timing.learn import learn
from kvtrace_replay.timing.link import WAYS, LinkCost
from kvtrace_replay.timing.models import link_named, timing_for
from kvtrace_replay.timing.profile import Measured, Model, Profile
from kvtrace_replay.timing.work import COLUMNS
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.trace import open_trace
from unit.analysis import toys

SAMPLES = Path(__file__).parents[4] / "traces" / "samples"
YARN = Model("yarn", 32, 2, 524288)
PLAIN = Profile(
    "plain", "device", "a device", YARN,
    {"call": 1e7, "prefill_token": 7e4, "prefill_pair": 4.0, "decode_row": 7.5e4, "decode_context": 400.0},
    link={"h2d-pinned-scattered": LinkCost(1e4, 6e3, 25e9), "d2h-pinned-scattered": LinkCost(2e4, 5e3, 20e9),
          "h2d-pageable-scattered": LinkCost(1e4, 9e3, 5e9), "h2d-pinned-gathered": LinkCost(3e4, 0, 24e9),
          "d2h-pinned-gathered": LinkCost(4e4, 0, 16e9)},
)  # fmt: skip

finite = st.floats(0, 1e200, allow_nan=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@st.composite
def random_profile(draw: st.DrawFn) -> Profile:
    names = st.sampled_from(COLUMNS)
    cost = st.builds(LinkCost, finite, finite, st.floats(1e-9, 1e200))
    error = st.builds(FitError, st.sampled_from(["all", "prefill", "decode", "mixed"]), st.integers(1, 2**60), finite,
                      finite, st.floats(-1, 1e9))  # fmt: skip
    point = st.builds(Measured, texts, st.integers(0, 2**60), st.integers(0, 2**60), finite, finite, finite)
    model = st.builds(Model, texts, st.integers(1, 2**40), st.integers(1, 2), st.none() | st.integers(1, 2**60))
    return Profile(
        draw(texts), draw(st.sampled_from(profiles.SOURCES)), draw(texts), draw(model),
        {name: draw(finite) for name in COLUMNS}, draw(st.dictionaries(names, st.tuples(finite, finite))),
        draw(st.dictionaries(names, texts)), draw(st.dictionaries(st.sampled_from(WAYS), cost)),
        tuple(draw(st.lists(error, max_size=3))),
        draw(st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True),
                             texts | st.integers(-(2**60), 2**60) | st.floats(-1e99, 1e99))),
        tuple(draw(st.lists(point, max_size=3))), draw(st.just(1.0) | st.floats(1e-9, 1e9)),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(random_profile())
def test_toml_gives_back_an_equal_profile(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> None:
    path = tmp_path_factory.getbasetemp() / "round.toml"
    profile.save(path, force=True)
    assert Profile.load(path) == profile
    assert Profile.load(path).toml() == profile.toml()


@pytest.mark.parametrize("name", ["", "\x7f", "\x00\x1f\n\r\t\"\\'", "𝄞 Ω", "\ud800", "a = 3\n[model]", "\u2028"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "odd.toml"
    dataclasses.replace(PLAIN, name=name).save(path)
    assert Profile.load(path).name == name.encode("utf-8", "replace").decode()


def test_step_costs_by_hand() -> None:
    """At block size 16 one block of this model is 8 MiB in 64 copies of 128 KiB."""
    assert YARN.copies_per_block == 64
    assert PLAIN.block_bytes(16) == 8 << 20
    costs = PLAIN.step_costs(16)
    assert costs.block_in == pytest.approx(64 * 6e3 + (8 << 20) / 25)
    assert costs.block_out == pytest.approx(64 * 5e3 + (8 << 20) / 20)
    assert (costs.call, costs.decode_context, costs.overlap) == (1e7, 400, 0)
    assert PLAIN.step_costs(16, copies="gathered", overlap=0.5).block_in == pytest.approx((8 << 20) / 24)
    assert PLAIN.step_costs(16, copies="gathered", overlap=0.5).overlap == 0.5
    assert np.isfinite(costs.array()).all()
    # Twice the block: as many copies for twice the tokens.
    assert PLAIN.step_costs(32).block_in - costs.block_in == pytest.approx((8 << 20) / 25)


def test_swap_and_recompute_by_hand() -> None:
    """A request of 1500 + 1024 tokens: 158 blocks, 10,112 copies, 1.23 GiB."""
    blocks, size = math.ceil(2524 / 16), 158 * (8 << 20)
    out = 2e4 + 10_112 * 5e3 + size / 20
    back = 1e4 + 10_112 * 6e3 + size / 25
    assert blocks == 158
    assert size / 2**30 == pytest.approx(1.234, abs=1e-3)
    assert PLAIN.swap_ns(blocks, 16, direction="d2h") == pytest.approx(out)
    assert PLAIN.swap_ns(blocks, 16) == pytest.approx(out + back)
    assert PLAIN.swap_ns(blocks, 16, copies="gathered") == pytest.approx(3e4 + size / 24 + 4e4 + size / 16)
    assert PLAIN.swap_ns(blocks, 16, direction="h2d", pinned=False) == pytest.approx(1e4 + 10_112 * 9e3 + size / 5)
    assert PLAIN.swap_ns(0, 16) == 0
    assert PLAIN.transfer_ns(size, 10_112, "d2h") == pytest.approx(out)
    assert PLAIN.recompute_ns(2524) == pytest.approx(1e7 + 2524 * 7e4 + 4 * 2524 * 2525 / 2)
    pairs = 24 * 2500 + 24 * 25 / 2
    assert PLAIN.recompute_ns(24, 2500, calls=0) == pytest.approx(24 * 7e4 + 4 * pairs)
    # In pieces the pairs are the same: only the calls are more.
    assert PLAIN.recompute_ns(2500) + PLAIN.recompute_ns(24, 2500) == pytest.approx(PLAIN.recompute_ns(2524, calls=2))


def test_costs_that_are_not_known() -> None:
    bare = dataclasses.replace(PLAIN, link={})
    assert (bare.step_costs(16).block_in, bare.step_costs(16).block_out) == (0, 0)
    with pytest.raises(KvtraceError, match="calibrate with --link GPU"):
        bare.swap_ns(1, 16)
    with pytest.raises(KvtraceError, match="does not know d2h-pageable-scattered"):
        PLAIN.swap_ns(1, 16, pinned=False)
    with pytest.raises(UsageError, match="'sideways'"):
        PLAIN.transfer_ns(1, 1, "sideways")
    with pytest.raises(UsageError, match="copies 'one' is none of per-block-layer-tensor, gathered"):
        PLAIN.step_costs(16, copies="one")
    unknown = dataclasses.replace(PLAIN, model=Model("m", 2))
    with pytest.raises(KvtraceError, match="does not know the KV bytes of a token"):
        unknown.step_costs(16)
    only = dataclasses.replace(PLAIN, link={name: cost for name, cost in PLAIN.link.items() if "h2d-pageable" in name})
    assert only.way("h2d", None, "scattered").bytes_per_s == 5e9  # no pinned memory: what there is


def test_a_call_takes_at_least_a_nanosecond() -> None:
    assert dataclasses.replace(PLAIN, costs={**PLAIN.costs, "call": 0.0}).step_costs(16).array()[0] == 1


def test_pauses_lengthen_steps_and_no_copy() -> None:
    slow = dataclasses.replace(PLAIN, stretch=1.25)
    costs, usual = slow.step_costs(16), PLAIN.step_costs(16)
    assert [getattr(costs, name) for name in COLUMNS] == pytest.approx([1.25 * PLAIN.costs[name] for name in COLUMNS])
    assert (costs.block_in, costs.block_out) == (usual.block_in, usual.block_out)
    assert slow.recompute_ns(2500, 24) == pytest.approx(1.25 * PLAIN.recompute_ns(2500, 24))
    assert slow.swap_ns(9, 16) == PLAIN.swap_ns(9, 16)


# ------------------------------------------------------------------ files


GOOD = PLAIN.toml()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("format = 1", "format = 2"), "its format is 2, and this kvtrace reads format 1"),
        (("format = 1", ""), "its format is None"),
        (("format = 1", "format = true"), "its format is True"),
        (('name = "plain"', ""), "name is missing"),
        (('name = "plain"', "name = 3"), "name must be a text"),
        (('source = "device"', 'source = "guess"'), "source 'guess' is none of trace, device, roofline"),
        (("[costs_ns]", "[cost_ns]"), "cost_ns is unknown: did you mean costs_ns?"),
        (("prefill_pair = 4.0", "prefill_pairs = 4.0"), "prefill_pairs is unknown: did you mean prefill_pair?"),
        (("prefill_pair = 4.0", ""), "costs_ns.prefill_pair is missing"),
        (("prefill_pair = 4.0", "prefill_pair = -4.0"), "costs_ns.prefill_pair must be a finite number from 0 on"),
        (("prefill_pair = 4.0", "prefill_pair = inf"), "must be a finite number"),
        (("prefill_pair = 4.0", "prefill_pair = nan"), "must be a finite number"),
        (("prefill_pair = 4.0", "prefill_pair = true"), "must be a finite number"),
        (("prefill_pair = 4.0", 'prefill_pair = "4"'), "must be a finite number"),
        (("prefill_pair = 4.0", "prefill_pair = 1" + "0" * 400), "must be a finite number"),
        (("prefill_pair = 4.0", "prefill_pair = 1" + "0" * 5000), "is no TOML"),
        (("layers = 32", "layers = 0"), "model.layers must be a whole number from 1 on"),
        (("layers = 32", "layers = 2.5"), "model.layers must be a whole number"),
        (("layers = 32", "layer = 32"), "model.layer is unknown: did you mean layers?"),
        (("kv_bytes_per_token = 524288", "kv_bytes_per_token = -1"), "model.kv_bytes_per_token must be a whole number"),
        (("bytes_per_s = 25000000000.0", "bytes_per_s = 0"), "link.h2d-pinned-scattered.bytes_per_s must be above 0"),
        (("[link.h2d-pinned-scattered]", "[link.h2d-pined-scattered]"), "did you mean h2d-pinned-scattered?"),
        (("[link.h2d-pinned-scattered]", "[link]\nh2d-pinned-scattered = 3\n[x]"), "x is unknown"),
        (("[costs_ns]", "costs_ns = 3\n[spread_ns]"), "model.costs_ns is unknown"),
        (("[model]", "stretch = 0\n[model]"), "stretch must be above 0"),
        (("[model]", 'stretch = "1"\n[model]'), "stretch must be a finite number"),
        (("[model]", "[[model]]"), "model must be a table"),
        (("[costs_ns]", "[spread_ns]\ncall = [1]\n[costs_ns]"), "spread_ns.call must be two numbers"),
        (("[costs_ns]", "[errors]\n[costs_ns]"), "errors must be a list of tables"),
        (("[costs_ns]", '[[errors]]\nbatch = "x"\n[costs_ns]'), "errors.batch 'x' is none of all"),
        (("[costs_ns]", "[measured]\npoints = [[1]]\n[costs_ns]"), "each of measured.points must be"),
        (("[costs_ns]", "[measured]\npoints = 3\n[costs_ns]"), "measured.points must be a list"),
        (("[costs_ns]", "[facts]\nx = [1]\n[costs_ns]"), "facts.x must be a text or a number"),
        (("[costs_ns]", "[costs_ns"), "is no TOML"),
        (("[costs_ns]", "x = " + "[" * 5000), "is no TOML"),
        ((GOOD, ""), "its format is None"),
    ],
)  # fmt: skip
def test_wrong_files_are_named_in_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in GOOD
    path = tmp_path / "wrong.toml"
    path.write_text(GOOD.replace(change[0], change[1], 1))
    with pytest.raises(KvtraceError) as caught:
        Profile.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_cut_anywhere_a_file_is_refused_or_whole(tmp_path: Path) -> None:
    """Never a profile with other costs."""
    path = tmp_path / "cut.toml"
    refused = 0
    for end in range(0, len(GOOD), 3):
        path.write_text(GOOD[:end])
        try:
            found = Profile.load(path)
        except KvtraceError:
            refused += 1
        else:
            assert found.model == PLAIN.model or end < GOOD.index("[costs_ns]")
            assert set(found.link) <= set(PLAIN.link)
    assert refused > 100


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe" * 10)
    with pytest.raises(KvtraceError, match="is no TOML"):
        Profile.load(path)
    with path.open("wb") as out:
        out.truncate((16 << 20) + 1)
    with pytest.raises(KvtraceError, match="larger than 16 MiB"):
        Profile.load(path)
    with pytest.raises(UsageError, match=r"there is no profile 'gone.toml'.*kvtrace calibrate"):
        Profile.load("gone.toml")
    with pytest.raises(KvtraceError, match="cannot write"):
        PLAIN.save(tmp_path / "no" / "x.toml")
    with pytest.raises(UsageError, match="--force overwrites it"):
        PLAIN.save(path)
    with pytest.raises(KvtraceError, match="cannot hold nan"):
        dataclasses.replace(PLAIN, costs={**PLAIN.costs, "call": math.nan}).toml()


def test_profiles_that_come_with_kvtrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in profiles.shipped():
        assert Profile.load(name).source == "device"
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path)
    PLAIN.save(tmp_path / "h200-llama.toml")
    assert profiles.shipped() == ["h200-llama"]
    assert Profile.load("h200-llama") == PLAIN
    with pytest.raises(UsageError, match="there is no profile 'h200-lama': did you mean h200-llama"):
        Profile.load("h200-lama")
    assert link_named("h200-llama") == PLAIN.link


# ------------------------------------------------------------------ what a user names


def test_a_trace_times_itself() -> None:
    trace = open_trace(SAMPLES / "chat.kvt")
    found = timing_for(trace)
    assert (found.source, found.device, found.model) == ("trace", "cpu", Model("chat", 30, 2, 23040))
    assert found.link == {}
    assert found.facts["steps"] == 802
    linked = timing_for(trace, None, "a100-40gb")
    assert linked.costs == found.costs
    assert linked.way("h2d", True, "scattered").bytes_per_s == 25e9
    assert {error.batch: error.steps for error in found.errors} == {
        "all": 802,
        "prefill": 1,
        "decode": 737,
        "mixed": 64,
    }


def test_what_can_be_named(tmp_path: Path) -> None:
    trace = open_trace(SAMPLES / "chat.kvt")
    assert timing_for(trace, "a100-40gb:llama-2-7b").source == "roofline"
    PLAIN.save(tmp_path / "p.toml")
    assert timing_for(trace, str(tmp_path / "p.toml")) == PLAIN
    (tmp_path / "odd:name.toml").write_text(PLAIN.toml())
    assert timing_for(trace, str(tmp_path / "odd:name.toml")) == PLAIN
    for wrong, said in (
        ("a100:llama-2-7b", "did you mean a100-40gb or a100-80gb"),
        ("h100:lama-3-8b", "did you mean llama-3-8b"),
        ("nothing", "there is no profile 'nothing'"),
    ):
        with pytest.raises(UsageError, match=said):
            timing_for(trace, wrong)
    with pytest.raises(UsageError, match="there is no GPU 'h10': did you mean h100"):
        timing_for(trace, None, "h10")


def test_traces_that_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(KvtraceError, match=r"is an import: .*`--timing h100:llama-3.1-8b`"):
        learn(toys.imported(1, tmp_path).reader)
    short = toys.plain_toy(5001, tmp_path, steps=12, outputs_behind=0, empty=0.0).reader
    with pytest.raises(KvtraceError, match="too few"):
        learn(short)
    logical = toys.plain_toy(5002, tmp_path).reader
    logical.engines[0]["clock"] = "logical"
    with pytest.raises(KvtraceError, match="simulated without a clock"):
        learn(logical)
    empty = toys.plain_toy(5003, tmp_path, steps=0).reader
    with pytest.raises(KvtraceError, match="no steps with times"):
        learn(empty)


def test_engines_of_two_kinds_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for n in (0, 1):
        (folder / f"e{n}.kvt").write_bytes((SAMPLES / ("chat.kvt", "thrash.kvt")[n]).read_bytes())
    with pytest.raises(KvtraceError, match=r"differ in model \(chat, tiny-llama\)"):
        learn(open_trace(folder))
