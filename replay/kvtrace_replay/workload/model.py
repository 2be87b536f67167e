"""`Workload`: the requests of one engine as plain arrays, the only input of every replay kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtrace_traces.errors import KvtraceError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
_OPTIONAL = ("schedule", "raw", "arrival_ns", "priority", "request_class", "held_tokens")


@dataclass(frozen=True, eq=False)
class Workload:
    """The requests of one engine. Every array is C-contiguous; kernels index them without further checks.

    Attributes:
        identities: int32[n_refs]; the chains of all requests one after the other, each prompt then output;
            dense ids 0..n_identities-1 in order of first use.
        indptr: int64[n_requests + 1]; request r's chain is `identities[indptr[r]:indptr[r + 1]]`.
        prompt_blocks: int32[n_requests]; so many entries of the chain are looked up at admission, the
            rest are output blocks, inserted at finish.
        hit_cap: int32[n_requests]; the most blocks a lookup may hit. Recorded: (prompt_tokens - 1) //
            block_size, vLLM's rule (`KVCacheManager.get_computed_blocks`, 0.32.0). Imports:
            prompt_blocks.
        prompt_tokens: int64[n_requests]; denominators of the token-weighted hit ratio.
        last_tokens: int32[n_requests]; tokens in the last entry of each chain, 1..block_size (block_size where
            there is none); all other entries are full.
        schedule: int64[m] or None; r + 1 is the admission of r, -(r + 1) its finish, in log order. A request
            without a finish stays pinned. None: each request is admitted and finished at once, in order.
        raw: int32[n_refs] or None; dense content ids where the import's ids are content ids (one id may stand
            under several parents); the `object` semantics use them when present.
        block_size: tokens in a full block.
        n_identities: number of distinct identities.
        source: "recorded" or "import".
        bytes_per_block: bytes of keys and values in a block, None when unknown.
        arrival_ns: int64[n_requests]; when each request arrived, on the trace's clock; None when unknown.
        priority: int32[n_requests]; lower first, as vLLM has it; None when unknown.
        request_class: int32[n_requests]; dense ids of what the trace calls the request's (type, turn); None when
            unknown.
        held_tokens: int64[n_requests]; tokens whose keys each request held at its end, prompt and output; None when
            unknown.
        carried: so many requests, the first ones in number and in order of admission, are the state that a cut trace
            begins with (`workload.carried`). They fill the cache and are never counted.
    """

    identities: I32
    indptr: I64
    prompt_blocks: I32
    hit_cap: I32
    prompt_tokens: I64
    last_tokens: I32
    schedule: I64 | None
    raw: I32 | None
    block_size: int
    n_identities: int
    source: str
    bytes_per_block: int | None = None
    arrival_ns: I64 | None = None
    priority: I32 | None = None
    request_class: I32 | None = None
    held_tokens: I64 | None = None
    carried: int = 0

    def skipped(self, warmup: float) -> int:
        """How many requests, in order of admission, come before the first that is counted: those carried, and the
        share `warmup` of the others."""
        return self.carried + int(warmup * (self.n_requests - self.carried))

    def token_counts(self) -> I64:
        """int64[n_requests]: tokens in all entries of each chain."""
        lengths = np.diff(self.indptr)
        return lengths * self.block_size - np.where(lengths > 0, self.block_size - self.last_tokens, 0)

    def empty_slots(self) -> tuple[int, int] | None:
        """Internal fragmentation: (token slots that stayed empty in the requests' last blocks, token slots of all their
        blocks), summed over the requests but carried ones at their ends, each counted alone. None where their lengths
        are unknown."""
        if self.held_tokens is None:
            return None
        held = self.held_tokens[self.carried :]
        slots = -(-held // self.block_size) * self.block_size
        return int((slots - held).sum()), int(slots.sum())

    @property
    def n_requests(self) -> int:
        return int(self.prompt_blocks.size)

    @property
    def n_refs(self) -> int:
        return int(self.identities.size)

    def validate(self) -> None:
        """Raises KvtraceError, one line, when an array breaks the contract above (kernels would read
        wild)."""
        self._check_arrays()
        self._check_chains()
        if self.schedule is not None:
            self._check_schedule(self.schedule)

    def _check_arrays(self) -> None:
        sizes: list[tuple[str, type[np.generic], int | None]] = [
            ("identities", np.int32, None),
            ("indptr", np.int64, self.n_requests + 1),
            ("prompt_blocks", np.int32, None),
            ("hit_cap", np.int32, self.n_requests),
            ("prompt_tokens", np.int64, self.n_requests),
            ("last_tokens", np.int32, self.n_requests),
            ("schedule", np.int64, None),
            ("raw", np.int32, self.n_refs),
            ("arrival_ns", np.int64, self.n_requests),
            ("priority", np.int32, self.n_requests),
            ("request_class", np.int32, self.n_requests),
            ("held_tokens", np.int64, self.n_requests),
        ]
        for name, dtype, size in sizes:
            array = getattr(self, name)
            if array is None and name in _OPTIONAL:
                continue
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
                _fail(f"{name} must be a one-dimensional {np.dtype(dtype).name} array")
            if not array.flags.c_contiguous:
                _fail(f"{name} must be C-contiguous: pass numpy.ascontiguousarray of it")
            if size is not None and array.size != size:
                _fail(f"{name} has {array.size} entries, {size} are needed")
        if self.block_size < 1:
            _fail(f"block_size is {self.block_size}, it must be 1 or more")
        if self.source not in ("recorded", "import"):
            _fail(f"source is {self.source!r}, it must be 'recorded' or 'import'")
        if not 0 <= self.carried <= self.n_requests:
            _fail(f"carried is {self.carried}, it must lie between 0 and the number of requests")

    def _check_chains(self) -> None:
        lengths = np.diff(self.indptr)
        if self.indptr[0] != 0 or self.indptr[-1] != self.n_refs or (lengths < 0).any():
            _fail("indptr must rise from 0 to the number of references")
        if (self.prompt_blocks < 0).any() or (self.prompt_blocks > lengths).any():
            _fail("prompt_blocks must lie between 0 and the length of the request's chain")
        if (self.hit_cap < 0).any():
            _fail("hit_cap must not be negative")
        if (self.prompt_tokens < 0).any():
            _fail("prompt_tokens must not be negative")
        if self.n_identities < 0 or self.n_identities >= 2**31:
            _fail(f"n_identities is {self.n_identities}, it must lie between 0 and 2^31 - 1")
        if self.n_refs == 0:
            return
        if self.identities.min() < 0 or self.identities.max() >= self.n_identities:
            _fail(f"identities must lie in 0..{self.n_identities - 1}")
        if self.raw is not None and self.raw.min() < 0:
            _fail("raw must not be negative")
        if self.last_tokens.min() < 1 or self.last_tokens.max() > self.block_size:
            _fail(f"last_tokens must lie in 1..{self.block_size}")

    def _check_schedule(self, schedule: I64) -> None:
        n = self.n_requests
        requests = np.abs(schedule) - 1
        if schedule.size and (requests.min() < 0 or requests.max() >= n):
            _fail(f"schedule entries must be r+1 or -(r+1) of a request r in 0..{n - 1}")
        position = np.arange(schedule.size)
        admitted = schedule > 0
        if (np.bincount(requests[admitted], minlength=n) != 1).any():
            _fail("schedule must admit every request exactly once")
        if (np.bincount(requests[~admitted], minlength=n) > 1).any():
            _fail("schedule must finish no request twice")
        admission = np.empty(n, np.int64)
        admission[requests[admitted]] = position[admitted]
        if (admission[requests[~admitted]] > position[~admitted]).any():
            _fail("schedule must finish no request before its admission")
        if (schedule[admitted][: self.carried] > self.carried).any():
            _fail("schedule must admit the carried requests before all others")


def _fail(what: str) -> None:
    raise KvtraceError(f"not a valid workload: {what}")
