"""`StepCosts`: what a scheduler step takes, as a sum over its work.

The work of a step, in the order of WORK, is: once `call`; `prefill_token`, tokens that rows of prefill compute;
`prefill_pair`, pairs of a query and a key that their attention looks at: a row that computes t tokens after c others
has t * c + t * (t + 1) / 2; `decode_row`, rows of decode: one token, past the prompt; `decode_context`, tokens that
these look at, their own among them; `block_in` and `block_out`, KV blocks copied to the device and from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtrace_traces.errors import UsageError

F64 = npt.NDArray[np.float64]

WORK = ("call", "prefill_token", "prefill_pair", "decode_row", "decode_context", "block_in", "block_out")


@dataclass(frozen=True)
class StepCosts:
    """What a step takes, in nanoseconds for a unit of each kind of WORK.

    `overlap`: the part of copying blocks that runs beside computing, from 0 (one after the other, as in vLLM 0.4.x) to
    1 (a step takes as long as the longer of the two).
    """

    call: float
    prefill_token: float = 0.0
    prefill_pair: float = 0.0
    decode_row: float = 0.0
    decode_context: float = 0.0
    block_in: float = 0.0
    block_out: float = 0.0
    overlap: float = 0.0

    def array(self) -> F64:
        """float64[8]: in the order of WORK, then `overlap`. Raises UsageError for a cost that is negative or not
        finite, a call that takes no time, or an overlap above 1."""
        values = np.array([*(getattr(self, name) for name in WORK), self.overlap], np.float64)
        if self.overlap > 1:
            raise UsageError(f"overlap {self.overlap} must be a share of the copying, from 0 to 1")
        if not np.isfinite(values).all() or (values < 0).any() or self.call < 1:
            raise UsageError("costs of a step must be finite and not negative, and a call takes at least 1 ns")
        return values


#: The longest that a block may take over the link, ns: an hour, so that a run's clock stays within its int64.
LONGEST_BLOCK_NS = 3600 * 10**9


@dataclass(frozen=True)
class TransferCosts:
    """What a transfer of blocks between host and device takes beside the steps, in nanoseconds: once, and for each
    block; `out`: to the host, `in_`: from it."""

    out: float
    block_out: float
    in_: float
    block_in: float

    def array(self) -> F64:
        """float64[4]: out, block_out, in_, block_in. Raises UsageError for a cost that is negative, not finite, or so
        high that no clock holds it."""
        values = np.array([self.out, self.block_out, self.in_, self.block_in], np.float64)
        if not np.isfinite(values).all() or (values < 0).any():
            raise UsageError("costs of a transfer must be finite and not negative: give the link a bandwidth above 0")
        if (values > LONGEST_BLOCK_NS).any():
            raise UsageError(
                f"a block takes {values.max() / 1e9:.3g} s over the link, more than the hour that is simulated: give "
                "the link a higher bandwidth"
            )
        return values
