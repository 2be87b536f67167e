"""What the twin is asked, what it keeps, and what it tells; see `twin`."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtrace_replay.schedulers.families import NEWEST, Rules


@dataclass(frozen=True)
class Request:
    """A request. `chain`: identities of its full blocks, prompt and output; `output`: tokens after which it ends (the
    last one is a stop token if it is less than `max_tokens`). Steps are counted from 0, without empty calls."""

    arrival_step: int
    prompt: int
    output: int
    max_tokens: int
    chain: tuple[int, ...]
    priority: int = 0
    arrival_time: float = 0.0
    request_id: str = ""
    abort_step: int | None = None
    no_read: bool = False
    abort_calls: int = 0  # calls without tokens after that step


@dataclass(frozen=True)
class Settings:
    """Settings of an engine, in vLLM's words; `num_blocks` includes the null block."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    prefix_caching: bool = True
    chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    async_scheduling: bool = False
    watermark: float = 0.0
    rules: Rules = NEWEST


@dataclass
class Run:
    """What happened; lists and tuples of plain values, so that runs can be compared.

    events: (step, kind, request, block, identity). steps: (scheduled [(request, tokens, computed before)], free blocks,
    running, waiting, preempted since the step before [request], empty calls since then). lookups: (step, request,
    tokens asked, tokens hit, after preemption), of admitted requests that may read the cache. preemptions: (step,
    request, blocks lost, tokens lost). requests: (first_step, last_step, finish_step, cached_tokens, preemptions,
    finish_reason), None where there is none. empty_after: empty calls after the last step.
    """

    events: list[tuple[int, str, int, int, int | None]] = field(default_factory=list)
    steps: list[tuple[list[tuple[int, int, int]], int, int, int, list[int], int]] = field(default_factory=list)
    lookups: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    preemptions: list[tuple[int, int, int, int]] = field(default_factory=list)
    requests: list[tuple[int | None, int | None, int | None, int | None, int, str | None]] = field(default_factory=list)
    empty_after: int = 0


class CannotFinish(Exception):
    """The engine would be stuck, or turn for ever."""


class Live:
    """A request as the scheduler knows it."""

    def __init__(self, number: int, request: Request, output: int, reason: str) -> None:
        self.number, self.request, self.output, self.reason = number, request, output, reason
        self.status = "absent"  # then waiting, running, finished
        self.generated = self.computed = 0
        self.placeholders = 0  # outputs in flight that are counted as tokens (async)
        self.in_flight = self.stale = 0  # tokens scheduled without output yet; those from before a preemption
        self.table: list[int] = []
        self.filled = 0  # blocks of the table that are cached
        self.hashed = 0  # blocks that lookups know of, with the rule `late_hashes`
        self.preemptions = 0
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.finish_step: int | None = None
        self.cached_tokens: int | None = None
        self.finish_reason: str | None = None

    @property
    def tokens(self) -> int:
        """Known tokens."""
        return self.request.prompt + self.generated


@dataclass
class Batch:
    """One scheduler call: tokens by request, in order, and who gets an output token."""

    scheduled: dict[int, int]
    samples: set[int]
