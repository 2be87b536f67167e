"""How policies are found, and what a user's own policy file may do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvtrace_replay import load_policy_file, replay
from kvtrace_replay.policies import find_policy, policies
from kvtrace_traces.errors import KvtraceError, UsageError
from unit.replay.twins import make_workload

MRU = '''
"""Evicts the block used last: a policy of a user's own."""
from __future__ import annotations
import numpy as np
from kvtrace_replay.policies import policy
from kvtrace_replay.structures.lists import new_lists, push_new, unlink

@policy("{name}", summary="a test", paper="none")
class Own:
    def setup(stream, capacity):
        return (new_lists(stream.n_identities, 1),)
    def insert(key, now, links):
        push_new(links, links.shape[0] - 1, key)
    def hit(key, pinned, now, links):
        unlink(links, key)
        push_new(links, links.shape[0] - 1, key)
    def evict(key, now, pins, links):
        {evict}
'''
EVICT = """victim = links[links.shape[0] - 1, 1]
        while pins[victim] > 0:
            victim = links[victim, 1]
        unlink(links, victim)
        return victim"""


def write(folder: Path, name: str, evict: str = EVICT) -> Path:
    file = folder / f"{name}.py"
    file.write_text(MRU.format(name=name, evict=evict))
    return file


def test_every_policy_tells_what_it_is() -> None:
    entries = {entry.name: entry for entry in policies()}
    assert {"fifo", "lru", "opt"} <= set(entries)
    for name in ("fifo", "lru", "opt"):
        assert entries[name].summary
        assert entries[name].paper
        assert len(entries[name].doc.splitlines()) >= 8


def test_names_in_any_case_and_near_misses() -> None:
    assert find_policy(" LRU ").name == "lru"
    with pytest.raises(UsageError, match="did you mean fifo"):
        find_policy("fifi")


def test_a_users_own_file(tmp_path: Path) -> None:
    file = write(tmp_path, "mru_own")
    assert load_policy_file(file) == ["mru_own"]
    assert load_policy_file(file) == ["mru_own"]  # again, in the same process
    workload = make_workload([[0], [1], [2], [0], [1], [2]])
    hits = [row["block_hits"] for row in replay(workload, "mru_own", 2, ["object", "prefix"])]
    assert hits == [2, 2]  # 2 evicts 1; 0 hits; 1 evicts 0; 2 hits


def test_a_changed_file_is_another_policy_by_the_same_name(tmp_path: Path) -> None:
    load_policy_file(write(tmp_path, "changing"))
    workload = make_workload([[0], [1], [2], [0], [1]])
    (before,) = replay(workload, "changing", 2, "object")
    load_policy_file(write(tmp_path, "changing", EVICT.replace("1, 1]", "1, 0]", 1)))
    (after,) = replay(workload, "changing", 2, "object")
    assert (before["block_hits"], after["block_hits"]) == (1, 0)


@pytest.mark.parametrize("victim", ["-7", "10**9", "2"])
def test_a_wrong_victim_is_an_error_not_a_crash(tmp_path: Path, victim: str) -> None:
    name = f"wrong{abs(int(eval(victim)))}"
    load_policy_file(write(tmp_path, name, f"return {victim}"))
    for semantics in ("object", "prefix"):
        with pytest.raises(KvtraceError, match="may not be evicted"):
            replay(make_workload([[0], [1], [2]]), name, 1, semantics)


def test_a_policy_that_does_not_compile(tmp_path: Path) -> None:
    load_policy_file(write(tmp_path, "broken", "return links.no_such_thing"))
    with pytest.raises(KvtraceError, match="'broken' does not compile") as caught:
        replay(make_workload([[0], [1], [2]]), "broken", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("    def evict(key, now, pins, links):", "    def evict(key, links):"), "evict must begin with"),
        (("def insert(key, now, links)", "def place(key, now, links)"), "lacks the function 'insert'"),
        (("def setup", "def start"), "lacks the function 'setup'"),
        (("def hit(key, pinned, now, links)", "def hit(key, pinned, now)"), "the same state"),
        (("@policy", "#"), "registers no policy"),
    ],
)
def test_a_policy_file_that_breaks_the_rules(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = write(tmp_path, "odd")
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(UsageError, match=message):
        load_policy_file(file)


def test_a_policy_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the policy file"):
        load_policy_file(tmp_path / "none.py")


def test_setup_must_return_what_the_functions_take(tmp_path: Path) -> None:
    file = write(tmp_path, "short")
    file.write_text(file.read_text().replace("return (new_lists(stream.n_identities, 1),)", "return ()"))
    load_policy_file(file)
    with pytest.raises(KvtraceError, match="setup returns 0 arrays, its functions take 1"):
        replay(make_workload([[0]]), "short", 1)


def test_the_state_of_a_run_is_its_own() -> None:
    workload = make_workload(np.random.default_rng(0).integers(0, 40, (50, 4)).tolist())
    first, second = (replay(workload, ["opt", "lru", "fifo"], [10, 20]) for _ in range(2))
    assert [r["block_hits"] for r in first] == [r["block_hits"] for r in second]
