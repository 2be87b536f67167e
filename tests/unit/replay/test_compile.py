"""The compile decorator: kept between processes, never stale, never fatal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtrace_replay import replay
from kvtrace_traces import sources
from unit.replay.twins import make_workload

RUN = """
import sys
sys.path.insert(0, {where!r})
import kvtrace_traces.compile as c
import toy.main
print(toy.main.answer(20), sum(toy.main.answer._cache_hits.values()), c.cache_folder())
"""


def toy(folder: Path, increment: int) -> None:
    package = folder / "toy"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text(
        f"from kvtrace_traces.compile import njit\n@njit(cache=False)\ndef more(x):\n    return x + {increment}\n"
    )
    (package / "main.py").write_text(
        "from kvtrace_traces.compile import njit\nfrom toy.helper import more\n"
        "@njit\ndef answer(x):\n    return more(2 * x)\n"
    )


def run(folder: Path, code: str = RUN, **variables: str) -> tuple[list[str], str]:
    env = {**os.environ, "KVTRACE_CACHE_DIR": str(folder / "cache"), **variables}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code.format(where=str(folder))],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split(), done.stderr


def test_kept_for_the_next_process_and_announced_once(tmp_path: Path) -> None:
    toy(tmp_path, 2)
    (answer, hits, _), notes = run(tmp_path)
    assert (answer, hits) == ("42", "0")
    assert notes.count("kvtrace: compiling for this machine (once)") == 1
    (answer, hits, _), notes = run(tmp_path)
    assert (answer, hits, notes) == ("42", "1", "")


def test_a_changed_helper_in_another_file_is_seen(tmp_path: Path) -> None:
    toy(tmp_path, 2)
    run(tmp_path)
    toy(tmp_path, 3)
    (answer, hits, _), _ = run(tmp_path)
    assert (answer, hits) == ("43", "0")


def test_code_that_does_not_depend_on_what_changed_is_kept(tmp_path: Path) -> None:
    toy(tmp_path, 2)
    (tmp_path / "toy" / "other.py").write_text("x = 1\n")
    run(tmp_path)
    (tmp_path / "toy" / "other.py").write_text("x = 2\n")
    (answer, hits, _), notes = run(tmp_path)
    assert (answer, hits, notes) == ("42", "1", "")


def test_what_a_file_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "dep"
    (package / "sub").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "import dep.plain\nfrom dep import (\n    b as first,  # why, not\n    NAME,\n)\nimport numpy as np\n",
        "b.py": "def later():\n    from dep.sub import thing\n",
        "plain.py": "",
        "sub/__init__.py": "from dep.sub.deep import thing\n",
        "sub/deep.py": "from dep.a import circle\n",
        "unused.py": "from dep import a\n",
    }.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = {str(file.relative_to(package)) for file in sources._closure(package / "a.py", "dep")}
    assert found == {"a.py", "__init__.py", "b.py", "plain.py", "sub/__init__.py", "sub/deep.py"}


def test_no_writable_folder_is_no_error(tmp_path: Path) -> None:
    toy(tmp_path, 2)
    (tmp_path / "file").write_text("")
    (answer, hits, folder), notes = run(tmp_path, KVTRACE_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert (answer, hits, folder) == ("42", "0", "None")
    assert "at each start: no writable cache folder, set KVTRACE_CACHE_DIR" in notes


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove data"])
def test_a_damaged_cache_is_compiled_anew(tmp_path: Path, damage: str) -> None:
    toy(tmp_path, 2)
    (_, _, folder), _ = run(tmp_path)
    for file in Path(folder).iterdir():
        if damage == "truncate":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif damage == "garbage":
            file.write_bytes(b"not a cache")
        elif file.suffix == ".nbc":
            file.unlink()
    (answer, hits, _), _ = run(tmp_path)
    assert (answer, hits) == ("42", "0")
    (answer, hits, _), _ = run(tmp_path)
    assert (answer, hits) == ("42", "1")


REPLAY = """
import sys
sys.path.insert(0, {tests!r})
from unit.replay.twins import make_workload
from kvtrace_replay import load_policy_file, replay
kinds = ["object", "prefix"]
for file in sys.argv[1:]:
    load_policy_file(file)
print([r["block_hits"] for r in replay(make_workload([[0], [1], [0]]), {policies!r}, 2, kinds)])
"""


def test_drivers_are_kept_and_one_users_policy_harms_no_other_process(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[2])
    own = tmp_path / "own.py"
    fifo = Path(sys.modules["kvtrace_replay"].__path__[0]) / "policies" / "fifo.py"
    own.write_text(fifo.read_text().replace('"fifo"', '"own"'))

    def go(policies: list[str], *files: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", REPLAY.format(tests=tests, policies=policies), *files],
            env={**os.environ, "KVTRACE_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip(), done.stderr

    assert "compiling" in go(["fifo"])[1]
    assert go(["fifo"]) == ("[1, 1]", "")
    assert "compiling" in go(["own", "fifo"], str(own))[1]
    assert go(["fifo"]) == ("[1, 1]", "")
    assert go(["own", "fifo"], str(own)) == ("[1, 1, 1, 1]", "")


def test_without_the_compiler(tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, {where!r})
from unit.replay.twins import make_workload
from kvtrace_replay import replay
workload = make_workload([[0, 1, 2], [3, 4], [0, 1, 2]])
print(*(r["block_hits"] for r in replay(workload, ["lru", "fifo", "opt"], 4, ["object", "prefix"])))
"""
    plain, notes = run(Path(__file__).parents[2], code, NUMBA_DISABLE_JIT="1", KVTRACE_CACHE_DIR=str(tmp_path))
    workload = make_workload([[0, 1, 2], [3, 4], [0, 1, 2]])
    rows = replay(workload, ["lru", "fifo", "opt"], 4, ["object", "prefix"])
    assert plain == [str(row["block_hits"]) for row in rows]
    assert notes == ""
