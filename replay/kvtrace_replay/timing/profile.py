"""`Profile`: what steps and moves of blocks cost on one device with one model, kept as a small TOML file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from kvtrace_replay.timing.costs import StepCosts, TransferCosts
from kvtrace_replay.timing.fit import FitError
from kvtrace_replay.timing.link import COPIES, DIRECTIONS, LAYOUTS, LinkCost, way
from kvtrace_traces.errors import KvtraceError, UsageError

FORMAT = 1
SOURCES = ("trace", "device", "roofline")
SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Model:
    """The model that a profile is of. `kv_tensors`: tensors of the cache in a layer: 2, keys and values, or 1 with MLA;
    `kv_bytes_per_token`: over all layers; None where the trace does not know."""

    name: str
    layers: int
    kv_tensors: int = 2
    kv_bytes_per_token: int | None = None

    @property
    def copies_per_block(self) -> int:
        """Copies that move one block where each layer's tensor is a copy of its own."""
        return self.layers * self.kv_tensors


@dataclass(frozen=True)
class Measured:
    """One point that `calibrate --device` measured: nanoseconds over the repeats.

    `what`: prefill, decode, or a way over the link; `size`: tokens, rows or bytes; `context`: tokens before, or copies.
    """

    what: str
    size: int
    context: int
    median_ns: float
    q1_ns: float
    q3_ns: float


@dataclass(frozen=True)
class Profile:
    """Costs of one device with one model.

    `source`: one of SOURCES; `costs`: ns by kind of work (`work.COLUMNS`); `spread`: the same, lowest and highest of
    the fits in cross-validation; `unidentified`: kinds whose cost is 0 without being known, and why; `link`: by way
    (`link.WAYS`), empty where nothing is known of it; `errors`: of predicted steps; `facts`: what else the figures rest
    on; `measured`: the points behind a profile of a device; `stretch`: what steps take on average, with the pauses of
    interpreter and machine, over their `costs`, which are of steps without.
    """

    name: str
    source: str
    device: str
    model: Model
    costs: dict[str, float]
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    unidentified: dict[str, str] = field(default_factory=dict)
    link: dict[str, LinkCost] = field(default_factory=dict)
    errors: tuple[FitError, ...] = ()
    facts: dict[str, str | int | float] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    stretch: float = 1.0

    @classmethod
    def load(cls, named: str | Path) -> Profile:
        """The profile in a TOML file, or one of those that come with kvtrace, by name.

        Raises UsageError where there is none, KvtraceError where the file is no profile.
        """
        from kvtrace_replay.timing.toml import profile_of

        path = Path(named)
        if not path.is_file() and path.suffix != ".toml":
            path = SHIPPED / f"{named}.toml" if str(named) in shipped() else path
        if not path.is_file():
            known = shipped()
            near = difflib.get_close_matches(str(named), known, n=1)
            hint = f": did you mean {near[0]}?" if near else f" (profiles: {', '.join(known)})" if known else ""
            raise UsageError(f"there is no profile {str(named)!r}{hint or '; `kvtrace calibrate` makes one'}")
        return profile_of(path)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the profile as TOML. Raises UsageError where the file exists and not `force`."""
        path = Path(path)
        if path.exists() and not force:
            raise UsageError(f"{path} exists; --force overwrites it")
        try:
            path.write_text(self.toml(), encoding="utf-8")
        except OSError as error:
            raise KvtraceError(f"cannot write {path}: {error.strerror}") from error

    def toml(self) -> str:
        """The profile as TOML; `load` gives back an equal one."""
        from kvtrace_replay.timing.toml import written

        return written(self)

    # ------------------------------------------------------------------ costs

    @property
    def mean_costs(self) -> dict[str, float]:
        """`costs` with the pauses spread over them, so that the time of many steps comes out."""
        return {name: cost * self.stretch for name, cost in self.costs.items()}

    def step_costs(
        self,
        block_size: int,
        *,
        copies: str = "per-block-layer-tensor",
        pinned: bool | None = None,
        overlap: float = 0.0,
    ) -> StepCosts:
        """The costs of a step's work, ns, with blocks of `block_size` tokens, the average pauses among them.

        `copies`: one of `link.COPIES`; `pinned`: the host's memory, None for pinned where the profile knows it;
        `overlap`: as in `StepCosts`. Moves of blocks cost 0 in a profile without a link: ask `needs_link` first where
        blocks are to move. What a transfer costs once (`LinkCost.transfer_ns`) has no place in a sum over blocks:
        `swap_ns` has it.
        """
        moves = {"block_in": 0.0, "block_out": 0.0}
        if self.link:
            size, pieces = self._block(block_size, copies)
            for name, direction in (("block_in", "h2d"), ("block_out", "d2h")):
                moves[name] = self.way(direction, pinned, COPIES[copies]).ns(size, pieces, transfers=0)
        costs = self.mean_costs
        costs["call"] = max(costs["call"], 1.0)
        return StepCosts(**costs, **moves, overlap=overlap)

    def transfer_costs(
        self, block_size: int, *, copies: str = "per-block-layer", pinned: bool | None = None
    ) -> TransferCosts:
        """The costs of moving blocks of `block_size` tokens beside the steps; `copies` and `pinned` as in `step_costs`.

        Raises KvtraceError where the profile does not know its link, or the bytes of a token.
        """
        self.needs_link()
        size, pieces = self._block(block_size, copies)
        out, into = (self.way(direction, pinned, COPIES[copies]) for direction in ("d2h", "h2d"))
        return TransferCosts(
            out.ns(0, 0), out.ns(size, pieces, transfers=0), into.ns(0, 0), into.ns(size, pieces, transfers=0)
        )

    def recompute_ns(self, tokens: int, context: int = 0, calls: int = 1) -> float:
        """How long the prefill of `tokens` tokens takes after `context` others, in `calls` steps of its own (0: as a
        part of steps that happen anyway)."""
        pairs = tokens * context + tokens * (tokens + 1) / 2
        costs = self.mean_costs
        return calls * costs["call"] + tokens * costs["prefill_token"] + pairs * costs["prefill_pair"]

    def swap_ns(
        self,
        blocks: int,
        block_size: int,
        *,
        direction: str | None = None,
        copies: str = "per-block-layer-tensor",
        pinned: bool | None = None,
    ) -> float:
        """How long `blocks` blocks take over the link in one transfer: one `direction`, h2d or d2h, or None for both,
        out and in again. Raises KvtraceError where the profile does not know its link."""
        self.needs_link()
        size, pieces = self._block(block_size, copies)
        ways = [self.way(each, pinned, COPIES[copies]) for each in ([direction] if direction else DIRECTIONS)]
        return sum(one.ns(blocks * size, blocks * pieces if pieces else 1) for one in ways) if blocks else 0.0

    def transfer_ns(
        self, size_bytes: float, copies: int, direction: str, pinned: bool | None = None, layout: str = "scattered"
    ) -> float:
        """How long one transfer of `size_bytes` in `copies` copies takes; `direction` h2d or d2h, `layout` scattered or
        gathered. Raises KvtraceError where the profile does not know that way."""
        return self.way(direction, pinned, layout).ns(size_bytes, copies)

    def needs_link(self) -> None:
        """Raises KvtraceError where the profile does not know what moving blocks costs."""
        if not self.link:
            raise KvtraceError(
                f"the profile {self.name!r} does not know what moving blocks costs (a trace does not tell): simulate "
                "or calibrate with --link GPU (or a profile, or 25GB/s), or name a profile of a device or GPU:MODEL"
            )

    def way(self, direction: str, pinned: bool | None, layout: str) -> LinkCost:
        """One way over the link; `pinned` None: pinned where that is known, else pageable.

        Raises UsageError for names that do not exist, KvtraceError for a way that the profile does not know.
        """
        if direction not in DIRECTIONS or layout not in LAYOUTS:
            raise UsageError(f"no way over the link: {direction!r}, {layout!r}; {DIRECTIONS} and {LAYOUTS} are")
        self.needs_link()
        for memory in ("pinned", "pageable") if pinned is None else ("pinned",) if pinned else ("pageable",):
            if (name := way(direction, memory, layout)) in self.link:
                return self.link[name]
        raise KvtraceError(f"the profile {self.name!r} does not know {name}: it has {', '.join(self.link)}")

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of `block_size` tokens. Raises KvtraceError where the profile does not know."""
        if self.model.kv_bytes_per_token is None:
            raise KvtraceError(f"the profile {self.name!r} does not know the KV bytes of a token: give it [model] "
                               "kv_bytes_per_token")  # fmt: skip
        return block_size * self.model.kv_bytes_per_token

    def _block(self, block_size: int, copies: str) -> tuple[int, int]:
        """Bytes of a block and its copies; 0 where blocks are gathered."""
        if copies not in COPIES:
            raise UsageError(f"copies {copies!r} is none of {', '.join(COPIES)}")
        pieces = {"per-block-layer-tensor": self.model.copies_per_block, "per-block-layer": self.model.layers}
        return self.block_bytes(block_size), pieces.get(copies, 0)


def shipped() -> list[str]:
    """The names of the profiles that come with kvtrace."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))
