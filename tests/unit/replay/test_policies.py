"""How policies are found, and what a user's own policy file may do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtrace_replay import load_policy_file, policy_docs, replay
from kvtrace_replay.policies import Stream, find_policy, policies
from kvtrace_replay.policies.lru import Lru
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


# ------------------------------------------------------------------------------------------- parameters

TUNED = '''
"""Evicts by a rule that does not matter here."""
from __future__ import annotations
import numpy as np
from kvtrace_replay.policies import policy
from kvtrace_replay.structures.lists import new_lists, oldest, push_new, unlink
from kvtrace_traces.errors import UsageError

@policy("tuned", summary="a test", paper="none")
class Tuned:
    def setup(stream, capacity, share=0.5, rounds=3, mode="plain"):
        if not 0 < share < 1:
            raise UsageError(f"tuned: share={share} must lie between 0 and 1")
        return new_lists(stream.n_identities, 1), np.array([share, rounds, mode == "plain"])
    def insert(key, now, links, told):
        push_new(links, links.shape[0] - 1, key)
    def hit(key, pinned, now, links, told):
        pass
    def evict(key, now, pins, links, told):
        victim = oldest(links, links.shape[0] - 1)
        unlink(links, victim)
        return victim
'''


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    file = tmp_path / "tuned.py"
    file.write_text(TUNED)
    load_policy_file(file)
    return file


def test_parameters_are_bound_to_the_run(tuned: Path) -> None:
    plain, changed = find_policy("tuned"), find_policy("Tuned:share=0.25,rounds=7,mode=other")
    assert plain.defaults == changed.defaults == {"share": 0.5, "rounds": 3, "mode": "plain"}
    assert (plain.given, plain.called) == ({}, "tuned")
    assert changed.given == {"share": 0.25, "rounds": 7, "mode": "other"}
    assert changed.called == "tuned:share=0.25,rounds=7,mode=other"
    stream = Stream(
        np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64), 1, "object"
    )
    assert plain.state(stream, 1)[1].tolist() == [0.5, 3, 1]
    assert changed.state(stream, 1)[1].tolist() == [0.25, 7, 0]


def test_rows_name_the_parameters(tuned: Path) -> None:
    workload = make_workload([[0], [1], [0]])
    rows = replay(workload, ["tuned", "tuned:rounds=4", "tuned:rounds=4,share=0.1+second-touch"], 1, "object")
    assert [row["policy"] for row in rows] == [
        "tuned",
        "tuned:rounds=4",
        "tuned:rounds=4,share=0.1+second-touch",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tuned:depth=3", "no parameter 'depth'; its parameters are share, rounds, mode"),
        ("tuned:rounds", "'rounds' must read rounds=NUMBER"),
        ("tuned:rounds=", "must read rounds=NUMBER, as in rounds=3"),
        ("tuned:rounds=2.5", "must read rounds=NUMBER, as in rounds=3"),
        ("tuned:share=much", "must read share=NUMBER, as in share=0.5"),
        ("tuned:share=nan", "must read share=NUMBER"),
        ("tuned:share=inf", "must read share=NUMBER"),
        ("lru:share=1", "no parameter 'share'; it has none"),
        ("nothing:share=1", "no policy is called 'nothing'"),
    ],
)
def test_parameters_that_cannot_be_parsed(tuned: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_policy(name)
    assert "\n" not in str(caught.value)


def test_a_value_that_setup_refuses(tuned: Path) -> None:
    with pytest.raises(UsageError, match=r"share=2\.0 must lie between 0 and 1"):
        replay(make_workload([[0]]), "tuned:share=2", 1, "object")


def test_the_parameters_of_every_policy_can_be_given_as_they_are_listed() -> None:
    for entry in policies():
        listed = ",".join(f"{name}={value}" for name, value in entry.defaults.items())
        if listed:
            assert find_policy(f"{entry.name}:{listed}").given == entry.defaults


def test_a_file_and_a_class(tmp_path: Path) -> None:
    one = tmp_path / "one.py"
    one.write_text(TUNED.replace("tuned", "tuned-one"))
    assert find_policy(str(one)).name == "tuned-one"
    assert find_policy(f"{one}:Tuned").name == "tuned-one"
    assert find_policy(f"{one}:tuned-one").name == "tuned-one"
    assert find_policy(f"{one}:Tuned:rounds=5").called == "tuned-one:rounds=5"
    assert find_policy(f"{one}:rounds=5").called == "tuned-one:rounds=5"
    assert find_policy(f"{one}:Tuned+second-touch:uses=3").called == "tuned-one+second-touch:uses=3"
    two = tmp_path / "two.py"
    other = TUNED.replace("tuned", "tuned-b").replace("Tuned", "Other")
    two.write_text(TUNED.replace("tuned", "tuned-a") + other[other.index("@policy") :])
    assert find_policy(f"{two}:Other").name == "tuned-b"
    for text in (str(two), f"{two}:Neither"):
        with pytest.raises(UsageError, match="NAME is one of tuned-a, tuned-b"):
            find_policy(text)


def test_a_parameter_without_a_default(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    file.write_text(TUNED.replace("share=0.5", "share"))
    with pytest.raises(UsageError, match="parameter 'share' of setup needs a default"):
        load_policy_file(file)


# ------------------------------------------------------------------------------------------- the page


def test_the_page_has_the_table_of_policies(tmp_path: Path) -> None:
    page = tmp_path / "policies.md"
    page.write_text(f"before\n{policy_docs.BEGIN}\nstale rows\n{policy_docs.END}\nafter\n")
    assert policy_docs.main(["--check", "--file", str(page)]) == 1
    assert policy_docs.main(["--write", "--file", str(page)]) == 0
    assert policy_docs.main(["--check", "--file", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale rows" not in text
    for entry in policies():
        assert f"| `{entry.name}` |" in text
    page.write_text("no table")
    assert policy_docs.main(["--write", "--file", str(page)]) == 1
    assert policy_docs.main(["--write", "--file", str(tmp_path / "none.md")]) == 1


def test_the_projects_page_is_up_to_date() -> None:
    """In a process of its own: other tests load policies of theirs."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "kvtrace_replay.policy_docs", "--check"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_name_of_a_built_in_policy_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'lru'.* choose another"):
        load_policy_file(write(tmp_path, "lru"))
    assert find_policy("lru").setup is Lru.setup


def test_an_edited_file_takes_its_own_place(tmp_path: Path) -> None:
    load_policy_file(write(tmp_path, "edited"))
    first = find_policy("edited")
    load_policy_file(write(tmp_path, "edited", EVICT + "  # another"))
    assert find_policy("edited").setup is not first.setup


@pytest.mark.parametrize(
    ("evict", "told"),
    [
        ("return nonsense(links)", "NameError: name 'nonsense' is not defined, in evict"),
        ("return links.no_such_thing", r"Unknown attribute 'no_such_thing'.*, in evict, unclear\d\.py:1\d"),
        ("return links[key, 3, 4]", r"cannot index .* with 3 indices.*, in evict, unclear\d\.py:1\d"),
        ("pass", r"\(KVTRACE_DEBUG=1 shows where\)"),
    ],
)
@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_a_policy_that_does_not_compile_names_the_cause(tmp_path: Path, evict: str, told: str, semantics: str) -> None:
    name = f"unclear{len(evict) % 10}"
    load_policy_file(write(tmp_path, name, evict))
    with pytest.raises(KvtraceError, match=f"'{name}' does not compile: .*{told}"):
        replay(make_workload([[0], [1], [2]]), name, 1, semantics)
