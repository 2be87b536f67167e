"""Keys as indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtrace_traces.compile import njit


@njit(cache=False)
def as_index(key: Any) -> int:
    """A key of any integer type as an index that is known not to be negative: Python's rule for negative ones costs a
    branch at every use."""
    return np.intp(np.uint32(key))  # type: ignore[return-value]
