"""The running curve: exact while all is followed, near to it when it is sampled; and the hot prefixes."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest

from kvtrace.top.lru import Lru
from kvtrace.top.prefixes import Prefixes, places
from kvtrace.top.running_curve import RunningCurve

Asked = tuple[array, int]  # type: ignore[type-arg]


def conversations(seed: int, requests: int, most_turns: int, system: int) -> list[Asked]:
    """Requests of conversations that grow by some blocks a turn, all behind the same `system` blocks."""
    rng = random.Random(seed)
    shared = [rng.getrandbits(63) + 1 for _ in range(system)]
    open_ones: list[list[int]] = []
    made: list[Asked] = []
    for _ in range(requests):
        if not open_ones or rng.random() < 0.25:
            open_ones.append(list(shared))
        chain = open_ones[min(int(rng.expovariate(0.004)), len(open_ones) - 1) * -1 - 1]
        chain += [rng.getrandbits(63) + 1 for _ in range(rng.randint(2, 8))]
        prompt = len(chain)
        chain += [rng.getrandbits(63) + 1 for _ in range(rng.randint(0, 3))]
        made.append((array("Q", chain), prompt))
        if len(chain) > most_turns * 6 + system:
            open_ones.remove(chain)
    return made


def play(curve: RunningCurve, asked: list[Asked], at_once: int = 8) -> RunningCurve:
    under_way: list[int] = []
    for number, (chain, prompt) in enumerate(asked):
        curve.admit(number, chain, prompt, prompt, 16 * prompt)
        under_way.append(number)
        if len(under_way) > at_once:
            ended = under_way.pop(0)
            curve.finish(ended, asked[ended][0])
    return curve


@pytest.mark.parametrize("system", [0, 40], ids=["no shared beginning", "a system prompt"])
@pytest.mark.parametrize("seed", range(3))
def test_a_sample_is_near_to_the_whole(seed: int, system: int) -> None:
    asked = conversations(seed, 6000, 10, system)
    capacities = [2000, 8000, 16000]
    exact = play(RunningCurve(capacities, 16, most_blocks=1 << 30), asked)
    sampled = play(RunningCurve(capacities, 16, most_blocks=4000), asked)
    assert exact.rate == 1
    assert sampled.rate <= 0.25
    assert sampled.followed < 0.7 * exact.followed
    if system:
        assert set(asked[0][0][:system]) <= sampled.trunk
    for ours, theirs in zip(sampled.token_hit_ratios(), exact.token_hit_ratios(), strict=True):
        assert ours == pytest.approx(theirs, abs=0.045)
    ratios = exact.token_hit_ratios()
    assert ratios[0] is not None
    assert ratios[2] is not None
    assert ratios[2] - ratios[0] > 0.05  # else nothing would be told apart


def test_memory_is_bounded() -> None:
    rng = random.Random(1)
    curve = RunningCurve([3000], 16, most_blocks=1000)
    largest = 0
    for number in range(3000):
        chain = array("Q", [rng.getrandbits(63) + 1 for _ in range(10)])
        curve.admit(number, chain, 10, 10, 160)
        curve.finish(number, chain)
        largest = max(largest, len(curve._before), len(curve._through), len(curve._caches[0]))
    assert largest < 1100
    assert curve.rate < 0.5


def test_a_cache_that_is_too_small_tells_nothing() -> None:
    curve = RunningCurve([3, 50], 16)
    assert curve.token_hit_ratios() == [None, None]
    chain = array("Q", range(1, 6))
    for number in range(2):
        curve.admit(number, chain, 5, 4, 80)
        curve.finish(number, chain)
    assert curve.token_hit_ratios() == [None, 4 * 16 / 160]


def test_what_a_gap_leaves_is_let_go() -> None:
    curve = RunningCurve([4], 16)
    for number in range(2):
        curve.admit(number, array("Q", [number + 1] * 1), 1, 1, 16)
    curve.give_up()
    assert curve.running() == {}
    for number in range(10, 20):
        chain = array("Q", [100 + number, 200 + number, 300 + number])
        curve.admit(number, chain, 3, 3, 48)
        curve.finish(number, chain)
        assert len(curve._caches[0]) == min(4, 2 + 3 * (number - 9))


@pytest.mark.parametrize("seed", range(40))
def test_lru_against_a_list(seed: int) -> None:
    """A twin that keeps the blocks in a list by their last use, and looks for the victim."""
    rng = random.Random(seed)
    capacity = rng.randint(3, 12)
    cache = Lru(capacity)
    order: list[int] = []  # all resident blocks, least recently let go of first
    pins: Counter[int] = Counter()
    held: dict[int, tuple[list[int], set[int], int]] = {}

    def take(blocks: list[int], mine: set[int]) -> None:
        found = [b for b in blocks if b in order]
        for block in found:
            pins[block] += 1
            mine.add(block)
        missing = [b for b in blocks if b not in found]
        room = capacity - len([b for b in order if pins[b]])
        for block in reversed(missing[: max(0, room)]):
            if len(order) == capacity:
                order.remove(next(b for b in order if not pins[b]))
            order.append(block)
            pins[block] += 1
            mine.add(block)

    for number in range(300):
        if held and rng.random() < 0.5:
            ended = rng.choice(sorted(held))
            chain, mine, prompt = held.pop(ended)
            take(chain[prompt:], mine)
            for block in reversed(chain):
                if block in mine:
                    pins[block] -= 1
                    if not pins[block]:
                        order.remove(block)
                        order.append(block)
            cache.finish(ended, array("Q", chain), prompt)
        else:
            root = rng.randint(1, 4)
            chain = [root * 100 + i for i in range(rng.randint(1, 6))]
            prompt = rng.randint(1, len(chain))
            expected = 0
            while expected < prompt and chain[expected] in order:
                expected += 1
            assert cache.admit(number, array("Q", chain[:prompt]), prompt) == expected
            own: set[int] = set()
            take(chain[:prompt], own)
            held[number] = chain, own, prompt
        assert cache.blocks() == set(order)
        assert len(cache) == len(order) <= capacity


@pytest.mark.parametrize("blocks", range(40))
def test_places(blocks: int) -> None:
    chosen = places(blocks)
    expected = sorted({2**k for k in range(9)} | {3 * 2**k for k in range(9)})
    assert chosen == [place for place in expected if place <= blocks]


def marks_of(chain: list[int]) -> array:  # type: ignore[type-arg]
    return array("Q", [chain[place - 1] for place in places(len(chain))])


def test_prefixes_are_counted_exactly_where_they_fit() -> None:
    rng = random.Random(3)
    prefixes = Prefixes()
    counts: Counter[int] = Counter()
    depths = {}
    for _ in range(500):
        root = rng.randint(1, 5)
        chain = [root * 1000 + i for i in range(rng.randint(0, 12))]
        prefixes.add(marks_of(chain), len(chain), len(chain) // 2)
        for place in places(len(chain)):
            counts[chain[place - 1]] += 1
            depths[chain[place - 1]] = place
    for head in prefixes.hottest(100):
        assert (head.requests, head.blocks, head.error) == (counts[head.identity], depths[head.identity], 0)
    worth = [(head.requests - 1) * head.blocks for head in prefixes.hottest(100)]
    assert worth == sorted(worth, reverse=True)


def test_of_nested_prefixes_the_longest_speaks() -> None:
    prefixes = Prefixes()
    shared = list(range(1, 26))
    for i in range(20):
        prefixes.add(marks_of([*shared, 1000 + i]), 26, 25)
    (head,) = prefixes.hottest(5)
    assert (head.blocks, head.requests, head.found) == (24, 20, 20)


def test_what_is_hot_stays_when_there_is_too_much() -> None:
    rng = random.Random(5)
    prefixes = Prefixes(most=50)
    for _ in range(5000):
        hot = rng.random() < 0.2
        chain = [1, 2] if hot else [rng.getrandbits(60) + 10]
        prefixes.add(marks_of(chain), len(chain), 0)
        assert len(prefixes._counts) <= 101
    head = prefixes.hottest(1)[0]
    assert head.identity == 2
    assert head.requests - head.error <= 1000 * 1.2
    assert head.requests >= 800
