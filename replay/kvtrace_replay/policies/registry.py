"""How an eviction policy is written and found.

A policy is a class that groups a few plain functions (no instance is ever made), in a file of its own:

    @policy("lru", summary="evicts the block used longest ago", paper="...")
    class Lru:
        def setup(stream, capacity): ...             # Python: returns the state, a tuple of at most 8 arrays
        def insert(key, now, *state): ...            # compiled: `key` was placed in the cache
        def hit(key, pinned, now, *state): ...       # compiled: a resident `key` was used
        def evict(key, now, pins, *state): ...       # compiled: choose, forget and return a victim
        def pin(key, *state): ...                    # compiled, optional: `key` may not be evicted from
        now on def unpin(key, *state): ...                  # compiled, optional: it may again

where `*state` stands for the arrays of `setup` under names of the policy's own. The driver promises:

- `evict` is called only when the cache is full and some block is not pinned, right before the `insert` of its
  `key` (which a policy with ghost entries may look at). It must return a resident block with `pins[block]
  == 0`.
- `now` is the position of the reference in the stream (`Stream.refs`), so a policy may look into its own
  per-reference arrays. It grows with time only in the `object` semantics.
- In `object` semantics nothing is ever pinned, and `pinned` is False as a constant of compilation.
- In `prefix` semantics each request calls `hit` or `insert` once for each reference, the tail before the
  head, when it takes its blocks; `pin` follows when the block was not pinned yet. `pinned` tells `hit`
  whether it was. `unpin` follows when the last request that holds the block ends, the tail before the
  head: this is the moment that defines recency, as in vLLM, which frees a request's blocks in reverse
  (`KVCacheManager.free`, 0.32.0).

The functions are compiled into the driver by the type of a tag (an empty-handed NamedTuple class per
policy), so a policy costs no call, and the compiled driver is found on disk by later processes.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import threading
import uuid
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvtrace_traces.errors import UsageError

MAX_STATE = 8
LEADING = {
    "insert": ("key", "now"),
    "hit": ("key", "pinned", "now"),
    "evict": ("key", "now", "pins"),
    "pin": ("key",),
    "unpin": ("key",),
}
_OPTIONAL = ("pin", "unpin")
T = TypeVar("T", bound=type)


@dataclass(eq=False)
class Stream:
    """What `setup` may know: the whole stream of references, under one semantics.

    Attributes:
        refs: int32[n_refs] block ids, dense from 0, in file order.
        indptr: int64[n_requests + 1]; request r's references are `refs[indptr[r]:indptr[r + 1]]`.
        prompt_blocks: int32[n_requests]; the first entries, looked up at admission; the rest come at finish.
        events: int64[m]; r + 1 is the admission of request r, -(r + 1) its finish, in the order they are
            replayed. Empty in `object` semantics.
        n_identities: number of distinct block ids.
        semantics: "object" or "prefix".
    """

    refs: npt.NDArray[np.int32]
    indptr: npt.NDArray[np.int64]
    prompt_blocks: npt.NDArray[np.int32]
    events: npt.NDArray[np.int64]
    n_identities: int
    semantics: str
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, made once per stream: for read-only state that runs at several capacities have in
        common."""
        with self._lock:
            if name not in self._shared:
                self._shared[name] = make()
            return self._shared[name]


@dataclass(frozen=True)
class Policy:
    """A registered policy: its name, one line about it, its paper, its longer text and its functions."""

    name: str
    summary: str
    paper: str
    doc: str
    setup: Callable[[Stream, int], tuple[npt.NDArray[Any], ...]]
    functions: dict[str, Callable[..., Any]]
    n_state: int
    tag: Any
    needs_future: bool = False


_policies: dict[str, Policy] = {}
_by_tag: dict[type, Policy] = {}
_load_lock = threading.Lock()
_loaded = False


def policy(name: str, *, summary: str, paper: str, needs_future: bool = False) -> Callable[[T], T]:
    """Registers the class below it as policy `name`.

    Args:
        name: lower case, as given to `--policy`.
        summary: one line for tables and help.
        paper: where the rule comes from.
        needs_future: it looks at references still to come, which only an open loop knows.

    Raises UsageError when the class does not have the functions that the module's docstring lists.
    """

    def register(cls: T) -> T:
        parts = {part: vars(cls).get(part) for part in ("setup", *LEADING)}
        functions = {part: getattr(f, "__func__", f) for part, f in parts.items() if f is not None}
        setup = functions.pop("setup", None)
        if setup is None:
            raise UsageError(f"policy {name!r} lacks the function 'setup'")
        n_state = _check_functions(name, functions)
        tag_type = _make_tag(name, cls)
        entry = Policy(
            name=name,
            summary=summary,
            paper=paper,
            doc=inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""),
            setup=setup,
            functions=functions,
            n_state=n_state,
            tag=tag_type(0),
            needs_future=needs_future,
        )
        _policies[name] = entry
        _by_tag[tag_type] = entry
        return cls

    return register


def _check_functions(name: str, functions: dict[str, Callable[..., Any]]) -> int:
    counts = set()
    for part, leading in LEADING.items():
        if part not in functions:
            if part in _OPTIONAL:
                continue
            raise UsageError(f"policy {name!r} lacks the function {part!r}")
        arguments = tuple(inspect.signature(functions[part]).parameters)
        if arguments[: len(leading)] != leading:
            raise UsageError(f"policy {name!r}: {part} must begin with the arguments ({', '.join(leading)})")
        counts.add(len(arguments) - len(leading))
    if len(counts) != 1 or max(counts) > MAX_STATE:
        raise UsageError(f"policy {name!r}: its functions must all take the same state, {MAX_STATE} arrays at most")
    return counts.pop()


def _make_tag(name: str, cls: type) -> Any:
    """A NamedTuple class of the policy's own. Its name holds a hash of the policy's file, since compiled
    drivers are kept on disk under the names of their argument types."""
    module = sys.modules[cls.__module__]
    file = getattr(module, "__file__", None)
    mark = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else uuid.uuid4().hex[:12]
    tag_name = f"Tag_{''.join(c if c.isalnum() else '_' for c in name)}_{mark}"
    # Numba's cache pickles the class by its place in the module.
    tag_type = namedtuple(tag_name, ["code"], module=cls.__module__)  # type: ignore[misc]
    setattr(module, tag_name, tag_type)
    return tag_type


def policy_of(tag_type: type) -> Policy:
    """The policy whose tag is of class `tag_type`."""
    return _by_tag[tag_type]


def _load_all() -> None:
    global _loaded
    with _load_lock:
        if not _loaded:
            import kvtrace_replay.policies as package

            for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
            _loaded = True


def policies() -> list[Policy]:
    """Every registered policy, by name."""
    _load_all()
    return [_policies[name] for name in sorted(_policies)]


def find_policy(name: str) -> Policy:
    """The policy called `name` (any case). Raises UsageError, with the nearest names, when there is none."""
    _load_all()
    key = str(name).strip().lower()
    if key in _policies:
        return _policies[key]
    near = difflib.get_close_matches(key, _policies, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(_policies))}"
    raise UsageError(f"no policy is called {str(name)!r}; {hint}")


def load_policy_file(path: str | Path) -> list[str]:
    """Runs a user's own policy file; returns the names it registered.

    Only the file itself is watched for changes, not other files that it imports. Raises UsageError when
    it cannot be read or registers nothing.
    """
    file = Path(path)
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the policy file {file}: {error.strerror}") from error
    _load_all()  # so that a user's policy may take the place of one of ours, never the other way round
    module_name = f"kvtrace_policy_{hashlib.sha256(source).hexdigest()[:16]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise UsageError(f"the policy file {file} must be a Python file, named *.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    names = sorted(name for name, entry in _policies.items() if type(entry.tag).__module__ == module_name)
    if not names:
        raise UsageError(f"the policy file {file} registers no policy: decorate a class with @policy(...)")
    return names
