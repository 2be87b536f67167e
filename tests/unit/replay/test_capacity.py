"""Capacities as people write them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvtrace_replay import parse_capacity
from kvtrace_traces.errors import UsageError
from unit.replay.twins import make_workload

# 10 distinct blocks of 16 tokens and 1 MiB.
WORKLOAD = make_workload([list(range(10))], bytes_per_block=2**20)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("1000", 1000), ("10k", 10_000), ("1.5k", 1500), ("2M", 2_000_000), (" 7 ", 7), ("1_000", 1000),
        ("1e3", 1000), ("50%", 5), ("99%", 9), ("29%", 2), ("100%", 10), ("250%", 25), ("10.5%", 1),
        ("65536tok", 4096), ("17tok", 1), ("4ktok", 250), ("8GiB", 8192), ("1MiB", 1), ("1GB", 953),
        ("8 gib", 8192), ("inf", math.inf), ("INF", math.inf), ("infinite", math.inf),
        (5, 5), (5.0, 5), (np.int64(5), 5), (math.inf, math.inf),
    ],
)  # fmt: skip
def test_forms(text: str | float, blocks: float) -> None:
    parsed = parse_capacity(text, WORKLOAD)
    assert parsed == blocks
    assert math.isinf(parsed) or type(parsed) is int


@pytest.mark.parametrize(
    "text",
    ["0", "-5", "nan", "", "k", "ten", "10x", "10 20", "--1", "1,5", "5%%", "0%", "15tok", "1KiB", "0.5",
     0, -1, 2.5, math.nan, -math.inf, None, True, "-inf", [5]],
)  # fmt: skip
def test_what_is_not_a_capacity_names_the_fix(text: object) -> None:
    with pytest.raises(UsageError, match="write blocks"):
        parse_capacity(text, WORKLOAD)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1e300", "99999999999999999999", str(2**53), 10**30, 1e300, "9e18tok"])
def test_what_no_machine_holds(text: str | int | float) -> None:
    with pytest.raises(UsageError, match="is too large: at most 9,007,199,254,740,991 blocks, or inf"):
        parse_capacity(text, WORKLOAD)


def test_a_share_is_exact() -> None:
    workload = make_workload([list(range(100))])
    assert [parse_capacity(f"{p}%", workload) for p in range(1, 101)] == list(range(1, 101))


def test_a_share_of_the_content_ids_in_object_semantics() -> None:
    workload = make_workload([[0, 1], [2, 3]], raw=[0, 1, 1, 0])
    assert parse_capacity("100%", workload) == 4
    assert parse_capacity("100%", workload, "object") == 2


def test_bytes_of_an_unknown_block() -> None:
    with pytest.raises(UsageError, match="does not know the bytes of a block: give it in blocks"):
        parse_capacity("8GiB", make_workload([[0]]))
