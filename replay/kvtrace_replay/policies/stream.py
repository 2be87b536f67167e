"""`Stream`: what a policy's `setup` may know of the replay it takes part in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Made = TypeVar("Made")


@dataclass(eq=False)
class Stream:
    """The whole stream of references, under one semantics.

    Attributes:
        refs: int32[n_refs] block ids, dense from 0, in file order.
        indptr: int64[n_requests + 1]; request r's references are `refs[indptr[r]:indptr[r + 1]]`.
        prompt_blocks: int32[n_requests]; the first entries, looked up at admission; the rest come at finish.
        events: int64[m]; r + 1 is the admission of request r, -(r + 1) its finish, in the order they are
            replayed. Empty in `object` semantics.
        n_identities: number of distinct block ids.
        semantics: "object", "prefix" or "radix".
        block_size: tokens in a full block.
        timed: the requests' times are known.
        arrival_ns: int64[n_requests]; where they are not, one second lies between two requests.
        priority: int32[n_requests], lower first, as vLLM has it; 0 where unknown.
        request_class: int32[n_requests], dense ids of (type, turn); 0 where unknown.
        removes: blocks may be taken out otherwise than by eviction (`remove`).
    """

    refs: I32
    indptr: I64
    prompt_blocks: I32
    events: I64
    n_identities: int
    semantics: str
    block_size: int = 1
    timed: bool = False
    arrival_ns: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    priority: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    request_class: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    removes: bool = False
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        n = self.indptr.size - 1
        if not self.arrival_ns.size:
            self.timed, self.arrival_ns = False, np.arange(n, dtype=np.int64) * 1_000_000_000
        if not self.priority.size:
            self.priority = np.zeros(n, np.int32)
        if not self.request_class.size:
            self.request_class = np.zeros(n, np.int32)

    def share(self, name: str, make: Callable[[], Made]) -> Made:
        """`make()`, made once per stream: for read-only state that runs at several capacities have in
        common."""
        with self._lock:
            if name not in self._shared:
                self._shared[name] = make()
            made: Made = self._shared[name]
            return made

    def depths(self) -> I32:
        """int32[n_refs]: the position of each reference in its request's chain, from 0. Read-only."""
        return self.share("depths", self._depths)

    def request_of(self) -> I32:
        """int32[n_refs]: the request of each reference. Read-only."""
        return self.share("request_of", self._request_of)

    def _depths(self) -> I32:
        made = np.arange(self.refs.size, dtype=np.int64)
        made -= np.repeat(self.indptr[:-1], np.diff(self.indptr))
        return _read_only(made.astype(np.int32))

    def _request_of(self) -> I32:
        lengths = np.diff(self.indptr)
        return _read_only(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths))


def _read_only(array: I32) -> I32:
    array.setflags(write=False)
    return array
