"""`radix` semantics and SGLang's policies against their slow twins, on thousands of random workloads."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_replay.policies import load_policy_file
from kvtrace_replay.structures.ranked import is_in, new_ranked, put_in, take_least, take_out
from kvtrace_traces.errors import KvtraceError, UsageError
from unit.replay.policies.twins_radix import BlockTree, NodeTree, Path, RadixOutcome, Uses
from unit.replay.test_against_twins import random_schedule
from unit.replay.twins import make_workload

NODE_ORDERS = ["lru", "lfu", "fifo", "mru", "filo", "slru", "priority"]


def random_tree_workload(rng: random.Random) -> tuple[Workload, int]:
    """A small workload whose requests share and leave prefixes, and its largest request in blocks."""
    n_requests = rng.choice([2, 4, 8, 15, 30, 45])
    alphabet = rng.randint(1, 4)
    numbers: dict[Path, int] = {}
    chains: list[list[int]] = []
    tails: list[Path] = [()]
    chained = rng.random() < 0.8
    for _ in range(n_requests):
        base = rng.choice(tails) if rng.random() < 0.7 else ()
        base = base[: rng.randint(0, len(base))] if rng.random() < 0.4 else base
        blocks = (*base, *(rng.randrange(alphabet) for _ in range(rng.randint(0, 6))))[:14]
        tails.append(blocks)
        keys = [blocks[: i + 1] if chained else (blocks[i],) for i in range(len(blocks))]
        chains.append([numbers.setdefault(key, len(numbers)) for key in keys])
    prompts = [rng.randint(0, len(c)) if rng.random() < 0.5 else len(c) for c in chains]
    workload = make_workload(
        chains,
        prompt_blocks=prompts,
        hit_cap=[max(0, n - rng.choice([0, 0, 0, 1, 3])) for n in prompts],
        schedule=random_schedule(rng, n_requests) if rng.random() < 0.6 else None,
        last_tokens=[rng.randint(1, 16) for _ in chains],
    )
    if rng.random() < 0.5:
        priority = np.array([rng.randint(-2, 3) for _ in chains], np.int32)
        workload = dataclasses.replace(workload, priority=priority)
    return workload, max([1, *(len(chain) for chain in chains)])


def check(workload: Workload, policy: str, capacity: float, expected: RadixOutcome) -> None:
    (row,) = replay(workload, policy, capacity, "radix")
    assert row["why"] is None
    assert replay_requests(workload, policy, capacity, "radix").tolist() == expected.hits
    assert row["block_hits"] == sum(expected.hits)
    assert row["token_hits"] == expected.token_hits
    assert row["evictions"] == expected.evictions
    assert row["pin_overflow_requests"] == len(expected.overflows)
    assert row["bypassed_blocks"] == expected.bypassed


def some_capacity(rng: random.Random, largest: int) -> float:
    return rng.choice([largest, largest + 1, largest + rng.randint(0, 8), largest + rng.randint(5, 30), math.inf])


@pytest.mark.parametrize("order", NODE_ORDERS)
def test_sglang_policies_on_thousands_of_random_workloads(order: str) -> None:
    rng = random.Random(f"nodes {order}")
    for _ in range(400):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        check(workload, f"sglang-{order}", capacity, NodeTree(workload, capacity, order).run())


def lru_rank(path: Path, uses: Uses, tree: BlockTree) -> int:
    return uses.released


@pytest.mark.parametrize("uses", [1, 2])
def test_lru_by_block_on_thousands_of_random_workloads(uses: int) -> None:
    rng = random.Random(f"lru {uses}")
    policy = "lru" if uses == 1 else "lru+second-touch"
    for _ in range(600):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        check(workload, policy, capacity, BlockTree(workload, capacity, lru_rank, uses=uses).run())


def opt_rank(path: Path, uses: Uses, tree: BlockTree) -> Any:
    for later in range(tree.event + 1, len(tree.events)):
        r = tree.events[later] - 1
        if r >= 0 and len(path) <= tree.prompts[r] and tree.chains[r][: len(path)] == path:
            return (1, -later, -len(path))
    return (0, -len(path), uses.event)


def test_opt_in_a_tree_on_random_workloads() -> None:
    rng = random.Random("opt")
    for _ in range(600):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        check(workload, "opt", capacity, BlockTree(workload, capacity, opt_rank).run())


def test_a_threshold_moves_the_segments() -> None:
    rng = random.Random("threshold")
    for _ in range(200):
        workload, largest = random_tree_workload(rng)
        capacity, threshold = some_capacity(rng, largest), rng.choice([1, 3])
        expected = NodeTree(workload, capacity, "slru", threshold).run()
        check(workload, f"sglang-slru:threshold={threshold}", capacity, expected)


def test_priorities_may_be_taken_as_written() -> None:
    rng = random.Random("as written")
    for _ in range(200):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        expected = NodeTree(workload, capacity, "priority", sign=1).run()
        check(workload, "sglang-priority:as_written=1", capacity, expected)


def test_second_touch_runs_on_nodes_too() -> None:
    rng = random.Random("second touch")
    for _ in range(200):
        workload, largest = random_tree_workload(rng)
        capacity, uses = some_capacity(rng, largest), rng.choice([2, 3])
        expected = NodeTree(workload, capacity, "lru", uses=uses).run()
        check(workload, f"sglang-lru+second-touch:uses={uses}", capacity, expected)


def test_the_random_workloads_cover_what_they_are_for() -> None:
    rng = random.Random(0)
    seen = dict.fromkeys(["overflow", "split", "large node evicted", "hit", "other than lru"], 0)
    for _ in range(200):
        workload, largest = random_tree_workload(rng)
        tree = NodeTree(workload, largest, "lru")
        sizes: list[int] = []
        evict = tree.evict

        def watched(blocks: float, evict: Any = evict, tree: NodeTree = tree, sizes: list[int] = sizes) -> None:
            before = tree.outcome.evictions
            evict(blocks)
            if tree.outcome.evictions - before > max(blocks, 0):
                sizes.append(tree.outcome.evictions - before)

        tree.evict = watched
        outcome = tree.run()
        seen["overflow"] += bool(outcome.overflows)
        seen["hit"] += sum(outcome.hits) > 0
        seen["large node evicted"] += bool(sizes)
        seen["split"] += any(len(node.run) > 1 and node.parent is not tree.root for node in tree.nodes())
        seen["other than lru"] += outcome.hits != NodeTree(workload, largest, "lfu").run().hits
    assert min(seen.values()) > 15, seen


def test_where_ids_are_paths_leaf_first_policies_need_no_tree() -> None:
    # LRU that frees tails first, Belady's rule and length-aware choose leaves by themselves.
    rng = random.Random("same")
    for _ in range(150):
        workload, largest = random_tree_workload(rng)
        if any(len(set(chain)) < len(chain) for chain in _chains(workload)) or not _are_paths(workload):
            continue
        capacity = largest + rng.randint(0, 10)
        for policy in ("lru", "opt", "length-aware"):
            rows = replay(workload, policy, capacity, ["prefix", "radix"])
            if rows[0]["pin_overflow_requests"] == 0:
                assert rows[0]["block_hits"] == rows[1]["block_hits"]
                assert rows[0]["evictions"] == rows[1]["evictions"]


def _chains(workload: Workload) -> list[list[int]]:
    bounds = workload.indptr.tolist()
    return [workload.identities[a:b].tolist() for a, b in pairwise(bounds)]


def _are_paths(workload: Workload) -> bool:
    above: dict[int, int] = {}
    return all(above.setdefault(b, a) == a for chain in _chains(workload) for a, b in pairwise([-1, *chain]))


# ---------------------------------------------------------------- by hand


def test_a_block_is_its_whole_path() -> None:
    # Id 7 under 1 and under 2 are two blocks of the tree, and id 5 twice in a row is two blocks.
    workload = make_workload([[1, 7], [2, 7], [1, 7], [5, 5, 5]])
    assert replay_requests(workload, "lru", math.inf, "radix").tolist() == [0, 0, 2, 0]
    assert replay_requests(workload, "lru", 4, "radix").tolist() == [0, 0, 2, 0]
    (row,) = replay(workload, "lru", 3, "radix")
    assert row["why"] is None


def test_by_block_a_leaf_goes_and_by_node_the_whole_run() -> None:
    # Room for 6: [0 1 2 3] leaves 2; [8 9 10] asks for 1 more than there is.
    chains = [[0, 1, 2, 3], [8, 9, 10], [0, 1, 2, 3]]
    workload = make_workload(chains)
    by_block, by_node = replay(workload, ["lru", "sglang-lru"], 6, "radix")
    assert replay_requests(workload, "lru", 6, "radix").tolist() == [0, 0, 3]
    assert replay_requests(workload, "sglang-lru", 6, "radix").tolist() == [0, 0, 0]
    assert by_block["evictions"] == 2  # 3, then 10
    assert by_node["evictions"] == 7  # [0 1 2 3], then [8 9 10]


def test_a_lookup_splits_the_node_that_it_leaves() -> None:
    # [0 1 2 3] is split at 1 by [0 1 5]. Its lower part [2 3] counts as used by that lookup, but before [5]; it is
    # what goes when [8 9] asks for room, and [0 1] stays.
    workload = make_workload([[0, 1, 2, 3], [0, 1, 5], [8, 9], [0, 1, 2, 3]])
    assert replay_requests(workload, "sglang-lru", 6, "radix").tolist() == [0, 2, 0, 2]
    assert replay_requests(workload, "sglang-filo", 6, "radix").tolist() == [0, 2, 0, 4]  # the younger [5] goes first


def test_what_a_running_request_holds_stays_and_overflow_is_said() -> None:
    # Request 1 holds [0 1]; request 2 wants 4 blocks of 5: 3 fit, the last is left out, and it is said to be one.
    workload = make_workload([[0, 1], [4, 5, 6, 7], [4, 5, 6, 7]], schedule=[1, 2, -2, -1, 3, -3])
    (row,) = replay(workload, "lru", 5, "radix")
    assert row["pin_overflow_requests"] == 1
    assert replay_requests(workload, "lru", 5, "radix").tolist() == [0, 0, 3]


def test_no_output_without_its_prompt() -> None:
    # Request 2's prompt finds room for 2 of 3 blocks, so its output [7] is not in the tree.
    workload = make_workload(
        [[0, 1], [4, 5, 6, 7], [4, 5, 6, 7]], prompt_blocks=[2, 3, 4], schedule=[1, 2, -1, -2, 3, -3]
    )
    assert replay_requests(workload, "lru", 4, "radix").tolist() == [0, 0, 2]
    assert replay_requests(workload, "lru", 5, "radix").tolist() == [0, 0, 4]


def test_stand_ins_and_errors() -> None:
    workload, largest = random_tree_workload(random.Random(3))
    plain, named = replay(workload, ["fifo", "sglang-fifo"], largest + 2, "radix")
    assert plain["block_hits"] == named["block_hits"]
    for semantics in ("object", "prefix"):
        with pytest.raises(UsageError, match=f"'sglang-lru' has no meaning in {semantics} semantics"):
            replay(workload, "sglang-lru", largest, semantics)


WRONG = """
from __future__ import annotations
import numpy as np
from kvtrace_replay.policies import policy

@policy("NAME", summary="evicts what it may not", paper="none", semantics=("radix",))
class Wrong:
    @staticmethod
    def setup(stream, capacity):
        return (np.full(1, -1, np.int64),)
    @staticmethod
    def insert(key, now, a):
        pass
    @staticmethod
    def hit(key, pinned, now, a):
        pass
    @staticmethod
    def evict(key, now, pins, a):
        return VICTIM
"""


@pytest.mark.parametrize("victim", ["np.int64(key)", "np.int64(-1)", "np.int64(99)", "np.int64(0)"])
def test_a_policy_that_evicts_a_wrong_block_is_found_out(tmp_path: Any, victim: str) -> None:
    # 0 has two blocks below it: [0 1] and [0 2].
    name = f"wrong-{abs(hash(victim))}"
    file = tmp_path / "wrong.py"
    file.write_text(WRONG.replace("NAME", name).replace("VICTIM", victim))
    load_policy_file(file)
    with pytest.raises(KvtraceError, match="may not be evicted"):
        replay(make_workload([[0, 1], [0, 2], [3]]), name, 3, "radix")


# ---------------------------------------------------------------- the heap that forgets lazily


def test_the_least_ranked_of_a_changing_set() -> None:
    rng = random.Random(1)
    for _ in range(40):
        n_ids = rng.choice([1, 5, 60])
        most = rng.randint(1, n_ids)
        entries, tickets = new_ranked(n_ids, most)
        at = np.zeros(2, np.int64)
        members: dict[int, tuple[int, int]] = {}
        for step in range(2000):
            key = rng.randrange(n_ids)
            if rng.random() < 0.7 and (key in members or len(members) < most):
                members[key] = (rng.randint(-2, 2), rng.choice([-1, 1]) * step)
                put_in(entries, tickets, at, key, *members[key])
            elif rng.random() < 0.7:
                members.pop(key, None)
                take_out(tickets, key)
            else:
                least = min(members, key=lambda k: members[k]) if members else -1
                members.pop(least, None)
                assert take_least(entries, tickets, at) == least
            assert is_in(tickets, key) == (key in members)
