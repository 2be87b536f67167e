"""Slow, obvious twins of `radix` semantics: a tree of blocks, and SGLang's tree of nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvtrace_replay import Workload
from unit.replay.twins import Outcome, tokens_of

Path = tuple[int, ...]


@dataclass
class RadixOutcome(Outcome):
    bypassed: int = 0


class _Requests:
    """What both twins do alike: lookups counted, room and admission, the order of events."""

    def __init__(self, workload: Workload, capacity: float, uses: int) -> None:
        self.workload = workload
        self.capacity = capacity
        self.uses = uses
        self.asked: dict[Path, int] = {}
        self.chains = [tuple(workload.identities[a:b].tolist()) for a, b in pairwise(workload.indptr.tolist())]
        self.prompts = workload.prompt_blocks.tolist()
        self.outcome = RadixOutcome(hits=[0] * workload.n_requests)
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def order_of_events(self) -> list[int]:
        if self.workload.schedule is not None:
            return list(self.workload.schedule.tolist())
        return [e for r in range(1, self.workload.n_requests + 1) for e in (r, -r)]

    def run(self) -> RadixOutcome:
        for event in self.order_of_events():
            (self.admit if event > 0 else self.finish)(abs(event) - 1)
        return self.outcome

    def count_hits(self, r: int, hits: int) -> None:
        self.outcome.hits[r] = hits
        start = int(self.workload.indptr[r])
        self.outcome.token_hits += sum(tokens_of(self.workload, r, p) for p in range(start, start + hits))

    def allowed(self, r: int, resident: int, stop: int, room: float, complete: bool) -> int:
        """How long the resident part, `resident`, of the first `stop` blocks of request `r` may grow to."""
        chain = self.chains[r]
        length = resident
        for depth in range(resident, stop):
            path = chain[: depth + 1]
            if not complete and self.is_resident(path):
                continue
            asked = self.asked.get(path, 0)
            if asked < self.uses - 1:
                self.asked[path] = asked + 1
                self.outcome.bypassed += 1
                complete = False
            elif length < depth or not complete:
                if r not in self.outcome.overflows:
                    self.outcome.bypassed += 1
            elif length - resident >= room:
                self.outcome.overflows.add(r)
            else:
                length += 1
        return length

    def is_resident(self, path: Path) -> bool:
        raise NotImplementedError

    def admit(self, r: int) -> None:
        raise NotImplementedError

    def finish(self, r: int) -> None:
        raise NotImplementedError


# ---------------------------------------------------------------- blocks


@dataclass
class Uses:
    """What a twin's rank may look at: of one resident block."""

    placed: int = 0  # ticks
    released: int = 0
    count: int = 0
    event: int = 0  # of its last use
    more: Any = None


class BlockTree(_Requests):
    """`rank(path, uses, tree)`: the unlocked leaf with the least rank is evicted. `released` may note things."""

    def __init__(
        self,
        workload: Workload,
        capacity: float,
        rank: Callable[[Path, Uses, BlockTree], Any],
        released: Callable[[Path, Uses, BlockTree], None] | None = None,
        evicted: Callable[[Path, Uses, BlockTree], None] | None = None,
        uses: int = 1,
    ) -> None:
        super().__init__(workload, capacity, uses)
        self.rank, self.released, self.evicted = rank, released, evicted
        self.tree: dict[Path, Uses] = {}
        self.locks: dict[Path, set[int]] = {}
        self.event = -1
        self.events = self.order_of_events()

    def is_resident(self, path: Path) -> bool:
        return path in self.tree

    def longest(self, chain: Path) -> int:
        return max(n for n in range(len(chain) + 1) if n == 0 or chain[:n] in self.tree)

    def locked(self) -> set[Path]:
        return {path for path, holders in self.locks.items() if holders}

    def use(self, path: Path) -> None:
        self.tree[path].count += 1
        self.tree[path].event = self.event

    def take(self, r: int, start: int, stop: int, complete: bool) -> None:
        chain = self.chains[r]
        resident = start
        if complete:
            resident = max(start, self.longest(chain[:stop]))
        for depth in range(start, resident):
            self.use(chain[: depth + 1])
            self.locks[chain[: depth + 1]].add(r)
        length = self.allowed(r, resident, stop, self.capacity - len(self.locked()), complete)
        for depth in range(resident, length):
            path = chain[: depth + 1]
            if len(self.tree) == self.capacity:
                parents = {p[:-1] for p in self.tree}
                leaves = [p for p in self.tree if p not in parents and p not in self.locked()]
                victim = min(leaves, key=lambda p: self.rank(p, self.tree[p], self))
                gone = self.tree.pop(victim)
                if self.evicted:
                    self.evicted(victim, gone, self)
                self.outcome.evictions += 1
            self.tree[path] = Uses(placed=self.tick(), count=1, event=self.event)
            self.locks[path] = {r}

    def admit(self, r: int) -> None:
        self.event += 1
        prompt = self.chains[r][: self.prompts[r]]
        self.count_hits(r, min(self.longest(prompt), int(self.workload.hit_cap[r])))
        self.take(r, 0, len(prompt), True)

    def finish(self, r: int) -> None:
        self.event += 1
        chain, prompt = self.chains[r], self.chains[r][: self.prompts[r]]
        whole = all(r in self.locks.get(prompt[:n], ()) for n in range(1, len(prompt) + 1))
        self.take(r, len(prompt), len(chain), whole)
        for n in range(len(chain), 0, -1):
            if r in self.locks.get(chain[:n], ()):
                self.locks[chain[:n]].discard(r)
                if not self.locks[chain[:n]]:
                    uses = self.tree[chain[:n]]
                    uses.released = self.tick()
                    if self.released:
                        self.released(chain[:n], uses, self)


# ---------------------------------------------------------------- nodes


@dataclass(eq=False)
class Node:
    run: Path
    parent: Node | None
    importance: int
    last: int
    created: int
    hits: int = 0
    locks: int = 0
    children: dict[int, Node] = field(default_factory=dict)


class NodeTree(_Requests):
    """SGLang's rules, one a line: match, lock, evict, insert, and at the end insert and unlock."""

    def __init__(
        self, workload: Workload, capacity: float, order: str, threshold: int = 2, sign: int = -1, uses: int = 1
    ) -> None:
        super().__init__(workload, capacity, uses)
        self.order, self.threshold, self.sign = order, threshold, sign
        self.root = Node((), None, 0, 0, 0)
        self.end: dict[int, Node] = {}  # the lowest node that a request has locked
        self.length: dict[int, int] = {}

    def is_resident(self, path: Path) -> bool:
        node = self.root
        while path:
            if path[0] not in node.children:
                return False
            node = node.children[path[0]]
            if path[: len(node.run)] != node.run[: len(path)]:
                return False
            path = path[len(node.run) :]
        return True

    def nodes(self) -> list[Node]:
        found, todo = [], list(self.root.children.values())
        while todo:
            found.append(todo.pop())
            todo += found[-1].children.values()
        return found

    def walk(self, path: Path) -> list[Node]:
        """Uses the nodes of the longest stored part of `path`, splitting the last where it is left."""
        now, node, passed = self.tick(), self.root, []
        while path and path[0] in node.children:
            child = node.children[path[0]]
            child.last = now
            same = 0
            while same < min(len(child.run), len(path)) and child.run[same] == path[same]:
                same += 1
            if same < len(child.run):
                time = self.tick()
                upper = Node(child.run[:same], node, child.importance, time, time, child.hits, child.locks)
                upper.children = {child.run[same]: child}
                node.children[path[0]] = upper
                child.run, child.parent = child.run[same:], upper
                child = upper
            passed.append(child)
            node, path = child, path[same:]
        return passed

    def insert(self, r: int, path: Path, counted: int) -> Node:
        importance = self.sign * int(self.workload.priority[r]) if self.workload.priority is not None else 0
        passed, depth = self.walk(path), 0
        for node in passed:
            node.importance = max(node.importance, importance)
            depth += len(node.run)
            if depth > counted:
                node.hits += 1
        last = passed[-1] if passed else self.root
        if depth < len(path):
            time = self.tick()
            last.children[path[depth]] = Node(path[depth:], last, importance, time, time, hits=1)
            last = last.children[path[depth]]
        return last

    def lock(self, node: Node | None, by: int) -> None:
        while node is not None:
            node.locks += by
            node = node.parent

    def rank(self, node: Node) -> Any:
        return {
            "lru": node.last,
            "lfu": (node.hits, node.last),
            "fifo": node.created,
            "mru": -node.last,
            "filo": -node.created,
            "slru": (node.hits >= self.threshold, node.last),
            "priority": (node.importance, node.last),
        }[self.order]

    def evict(self, blocks: float) -> None:
        while blocks > 0:
            leaf = min((n for n in self.nodes() if not n.children and not n.locks), key=self.rank)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.run[0]]
            self.outcome.evictions += len(leaf.run)
            blocks -= len(leaf.run)

    def make_room(self, r: int, resident: int, stop: int, complete: bool) -> int:
        locked = sum(len(node.run) for node in self.nodes() if node.locks)
        length = self.allowed(r, resident, stop, self.capacity - locked, complete)
        held = sum(len(node.run) for node in self.nodes())
        self.evict(length - resident - (self.capacity - held))
        return length

    def admit(self, r: int) -> None:
        prompt = self.chains[r][: self.prompts[r]]
        found = self.walk(prompt[: min(len(prompt), int(self.workload.hit_cap[r]))])
        self.count_hits(r, sum(len(node.run) for node in found))
        found = self.walk(prompt)
        own = found[-1] if found else self.root
        self.lock(own, 1)
        self.length[r] = self.make_room(r, sum(len(node.run) for node in found), len(prompt), True)
        self.end[r] = self.insert(r, prompt[: self.length[r]], 0)
        self.lock(own, -1)
        self.lock(self.end[r], 1)

    def finish(self, r: int) -> None:
        chain, prompt = self.chains[r], self.chains[r][: self.prompts[r]]
        if self.length[r] < len(prompt):
            self.make_room(r, len(prompt), len(chain), False)
            self.insert(r, prompt[: self.length[r]], len(prompt))
        else:
            found = self.walk(chain)
            own = found[-1] if found else self.root
            self.lock(own, 1)
            length = self.make_room(r, sum(len(node.run) for node in found), len(chain), True)
            self.insert(r, chain[:length], len(prompt))
            self.lock(own, -1)
        self.lock(self.end.pop(r), -1)
