"""How an eviction policy is written and found.

A policy is a class that groups a few plain functions (no instance is ever made), in a file of its own:

    @policy("lru", summary="evicts the block used longest ago", paper="...")
    class Lru:
        def setup(stream, capacity, small=0.1): ...  # Python: returns the state, a tuple of at most 8 arrays
        def insert(key, now, *state): ...            # compiled: `key` was placed in the cache
        def hit(key, pinned, now, *state): ...       # compiled: a resident `key` was used
        def evict(key, now, pins, *state): ...       # compiled: choose, forget and return a victim

and, where it wants them, of these, compiled too:

        def pin(key, *state): ...                    # `key` may not be evicted from now on
        def unpin(key, *state): ...                  # it may again
        def begin(request, now, *state): ...         # `request` is about to be looked up
        def expire(now, pins, *state): ...           # a block to drop for its age, or -1
        def admit(key, now, pins, *state): ...       # False: the missing `key` gets no place
        def remove(key, *state): ...                 # `key` is gone, though not as a victim
        def soon(key, near, pins, *state): ...       # `key` is about to be asked for

and one more in Python, `places(capacity, **parameters)`: False where the rule has too few blocks in `object` semantics
to place any. A sample of a trace has no scaled cache so small then (see `curves.sample`).

Above, `*state` stands for the arrays of `setup` under names of the policy's own. Keyword arguments of `setup`
are the policy's parameters, their defaults stand there and nowhere else, and `--policy lru:small=0.2` sets
them; `setup` raises UsageError for a value that cannot be. The driver promises:

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
- `begin` comes once a request, before its lookup. `expire` follows until it returns -1 (in `object` semantics before
  each reference); what it returns must be resident with `pins[block] == 0`, and must have been forgotten. `admit` is
  asked for each missing block, in chain order, before any place is made; `pins[block] < 0` means not resident. A
  closed loop calls none of the three, and places what the engine places: `@policy(..., open_loop=True)` says that a
  policy is not itself without them.
- `remove` takes a resident `key` that nobody holds out of the cache; nothing is to remember it as evicted, and it may
  come back by `insert`. Only tiers that others take blocks from call it, and only where `Stream.removes` was True in
  `setup` (see `kvtrace_replay.tiers`): where it is False a policy need not keep what it would take to find a block.
- `soon` may ask for memory early (`structures.machine.prefetch`) and must change nothing. It is called some references
  before `key` is asked for, with `near` False, and once more half way, with `near` True, each a constant of
  compilation; only by the driver of `object` semantics, and not for the last references.
- In `radix` semantics as in `prefix`, with three differences (see `cache.radix_driver`): `hit` comes in two runs,
  first for the blocks that the lookup hit, then for resident ones beyond the most it may hit; `pins[block]` is the
  number of locks and of resident blocks right below, while `pin` and `unpin` tell of locks alone; `evict` may return
  the head of an unlocked end that does not branch, and all from it down leave at once.

The functions are compiled into the driver by the type of a tag (an empty-handed NamedTuple class per
policy), so a policy costs no call, and the compiled driver is found on disk by later processes.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import re
import sys
import threading
import uuid
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from kvtrace_replay.policies.stream import Stream
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.sources import sources_hash

MAX_STATE = 8
LEADING = {
    "insert": ("key", "now"),
    "hit": ("key", "pinned", "now"),
    "evict": ("key", "now", "pins"),
    "pin": ("key",),
    "unpin": ("key",),
    "begin": ("request", "now"),
    "expire": ("now", "pins"),
    "admit": ("key", "now", "pins"),
    "remove": ("key",),
    "soon": ("key", "near", "pins"),
}
# What a driver gets from a function that the policy does not have.
OTHERWISE = {"pin": None, "unpin": None, "begin": None, "expire": -1, "admit": True, "remove": None, "soon": None}
SEMANTICS = ("object", "prefix", "radix")
SECOND_TOUCH = "second-touch"
_FILE = re.compile(r"(?P<file>[^+]*\.py)(?::(?P<policy>[A-Za-z_][\w-]*)(?!\w*=))?")
T = TypeVar("T", bound=type)


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy, its parameters bound.

    Attributes:
        name, summary, paper, doc: what it is called, its rule in one line, where it comes from, its longer text.
        setup, functions, n_state, tag: its functions, how many arrays they take, the type that stands for it.
        needs_future: it looks at references still to come, which only an open loop knows.
        open_loop: it needs `begin`, which only an open loop calls.
        in_order: no use changes its order, so that imports need hold nothing (see `cache.prefix_driver`).
        by_last_use: its victim is always the block used longest ago, so that time stamps can take the place of lists
            (see `cache.recency_driver`).
        semantics: those in which the rule makes sense.
        stand_in: by semantics, the policy that is run in its place: the same rule in other words.
        defaults: its parameters.
        given: the parameters that were set.
        class_name: of the class that was decorated.
        uses: blocks are placed at their `uses`-th use only (`second-touch`); 1 places always.
        places: its function of that name, if it has one.
    """

    name: str
    summary: str
    paper: str
    doc: str
    setup: Callable[..., tuple[npt.NDArray[Any], ...]]
    functions: dict[str, Callable[..., Any]]
    n_state: int
    tag: Any
    needs_future: bool = False
    open_loop: bool = False
    in_order: bool = False
    by_last_use: bool = False
    semantics: tuple[str, ...] = ("object", "prefix")
    stand_in: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    class_name: str = ""
    uses: int = 1
    places: Callable[..., bool] | None = None

    @property
    def removable(self) -> bool:
        """Blocks can be taken out of it that are not its victims."""
        return "remove" in self.functions

    @property
    def called(self) -> str:
        """As `--policy` takes it: the name with the parameters that were set."""
        own = self.name + _spelled(self.given)
        return (
            own if self.uses == 1 else f"{own}+{SECOND_TOUCH}" + _spelled({"uses": self.uses} if self.uses > 2 else {})
        )

    def places_at(self, capacity: int) -> bool:
        """Whether it places any block in so many, in `object` semantics, where not all fit."""
        return self.places is None or bool(self.places(capacity, **self.defaults | self.given))

    def state(self, stream: Stream, capacity: int) -> tuple[npt.NDArray[Any], ...]:
        """The arrays for one run. Raises UsageError for a parameter that cannot be, KvtraceError when `setup` returns
        another number of arrays than the functions take."""
        state = self.setup(stream, capacity, **self.given)
        if len(state) != self.n_state:
            raise KvtraceError(
                f"policy {self.name!r}: setup returns {len(state)} arrays, its functions take {self.n_state}"
            )
        return state

    def within(self, semantics: str) -> Policy:
        """The policy to run under `semantics`. Raises UsageError, naming what can be, where the rule makes no sense."""
        if semantics in self.semantics:
            return self
        if semantics in self.stand_in:
            return replace(find_policy(self.stand_in[semantics]), uses=self.uses)
        raise UsageError(
            f"policy {self.name!r} has no meaning in {semantics} semantics; it runs in {', '.join(self.semantics)}"
        )


def _spelled(parameters: dict[str, Any]) -> str:
    return (":" + ",".join(f"{key}={value}" for key, value in parameters.items())) if parameters else ""


_policies: dict[str, Policy] = {}
_by_tag: dict[type, Policy] = {}
_load_lock = threading.Lock()
_loaded = False


def policy(
    name: str,
    *,
    summary: str,
    paper: str,
    needs_future: bool = False,
    open_loop: bool = False,
    in_order: bool = False,
    by_last_use: bool = False,
    semantics: tuple[str, ...] = ("object", "prefix"),
    stand_in: dict[str, str] | None = None,
) -> Callable[[T], T]:
    """Registers the class below it as policy `name`.

    Args:
        name: lower case, as given to `--policy`.
        summary: one line for tables and help.
        paper: where the rule comes from.
        needs_future, open_loop, in_order, by_last_use, semantics, stand_in: see `Policy`.

    Raises UsageError when the class does not have the functions that the module's docstring lists, or has the name of a
    built-in one.
    """

    def register(cls: T) -> T:
        parts = {part: vars(cls).get(part) for part in ("setup", "places", *LEADING)}
        functions = {part: getattr(f, "__func__", f) for part, f in parts.items() if f is not None}
        setup = functions.pop("setup", None)
        if setup is None:
            raise UsageError(f"policy {name!r} lacks the function 'setup'")
        places = functions.pop("places", None)
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
            open_loop=open_loop,
            in_order=in_order,
            by_last_use=by_last_use,
            semantics=semantics,
            stand_in=dict(stand_in or {}),
            defaults=_defaults(name, setup),
            class_name=cls.__name__,
            places=places,
        )
        ours, known = __name__.rpartition(".")[0], _policies.get(name)
        if known is not None and type(known.tag).__module__.startswith(ours) and not cls.__module__.startswith(ours):
            raise UsageError(f"policy {name!r}: kvtrace has one of that name, choose another")
        _policies[name] = entry
        _by_tag[tag_type] = entry
        return cls

    return register


def _defaults(name: str, setup: Callable[..., Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(setup).parameters.values())
    for parameter in parameters[2:]:
        if not isinstance(parameter.default, (int, float, str)):
            raise UsageError(f"policy {name!r}: the parameter {parameter.name!r} of setup needs a default")
    return {parameter.name: parameter.default for parameter in parameters[2:]}


def _check_functions(name: str, functions: dict[str, Callable[..., Any]]) -> int:
    counts = set()
    for part, leading in LEADING.items():
        if part not in functions:
            if part in OTHERWISE:
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
    """A NamedTuple class of the policy's own. Its name holds a hash of the policy's file and of what that imports,
    since compiled drivers are kept on disk under the names of their argument types."""
    module = sys.modules[cls.__module__]
    file = getattr(module, "__file__", None)
    mark = uuid.uuid4().hex[:12]
    if file:  # its bytes besides: the other hash is taken once per file and process
        imported = sources_hash(file, cls.__module__.partition(".")[0])
        mark = hashlib.sha256(Path(file).read_bytes() + imported.encode()).hexdigest()[:12]
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


def _load(name: str) -> None:
    """Load what may be the policy's own file; all of them where it is none, as for a name that no policy has."""
    module = f"kvtrace_replay.policies.{name.replace('-', '_')}"
    if name not in _policies and module.rpartition(".")[2].isidentifier() and importlib.util.find_spec(module):
        importlib.import_module(module)
    if name not in _policies:
        _load_all()


def policies() -> list[Policy]:
    """Every registered policy, by name."""
    _load_all()
    return [_policies[name] for name in sorted(_policies)]


def find_policy(name: str) -> Policy:
    """The policy written as `name`: `lru`, `s3fifo:small=0.2,ghost=1`, `lru+second-touch`, in any case, or
    `./mine.py:MyPolicy`, a class (or the name of a policy) of a file that is loaded for it.

    Raises UsageError, with the nearest names, when there is none, and for a parameter that it does not have.
    """
    text, plus, admission = _from_file(str(name).strip()).lower().partition("+")
    if not plus and text.split(":")[0] == SECOND_TOUCH:
        text, admission = "lru", text
    found = _with_parameters(text)
    if not plus and not admission:
        return found
    what, _, parameters = admission.partition(":")
    if what != SECOND_TOUCH:
        raise UsageError(f"no admission is called {what!r}; write POLICY+{SECOND_TOUCH}, or POLICY alone")
    uses = _parsed(SECOND_TOUCH, parameters, {"uses": 2}).get("uses", 2)
    if not 1 <= uses <= 255:
        raise UsageError(f"{SECOND_TOUCH}: uses={uses} must lie between 1 and 255")
    return replace(found, uses=uses)


def _from_file(text: str) -> str:
    """`text` with a leading FILE.py:CLASS replaced by the name of the policy that it holds."""
    match = _FILE.match(text)
    if match is None:
        return text
    names = load_policy_file(match["file"])
    wanted = match["policy"]
    if wanted is None and len(names) == 1:
        return names[0] + text[match.end() :]
    for name in names:
        if wanted in (name, _policies[name].class_name):
            return name + text[match.end() :]
    raise UsageError(f"write {match['file']}:NAME, where NAME is one of {', '.join(names)}")


def _with_parameters(text: str) -> Policy:
    key, _, parameters = text.partition(":")
    _load(key)
    if key not in _policies:
        names = [*_policies, SECOND_TOUCH]
        near = difflib.get_close_matches(key, names, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(names))}"
        raise UsageError(f"no policy is called {key!r}; {hint}")
    found = _policies[key]
    given = _parsed(key, parameters, found.defaults)
    return replace(found, given=given) if given else found


def _parsed(name: str, text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """`a=1,b=2` as a dict, each value of the type of its default."""
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults:
            known = f"its parameters are {', '.join(defaults)}" if defaults else "it has none"
            raise UsageError(f"policy {name!r} has no parameter {key!r}; {known}")
        kind = type(defaults[key])
        try:
            given[key] = kind(value)
        except ValueError:
            equals = ""
        if not equals or (kind is float and not math.isfinite(given[key])):
            raise UsageError(f"policy {name!r}: {part!r} must read {key}=NUMBER, as in {key}={defaults[key]}")
    return given


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
    _load_all()  # the names that are taken
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
