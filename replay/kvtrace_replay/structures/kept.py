"""State that a policy keeps in some runs only, such as where each block lies, which only `remove` asks.

What is not kept is an empty uint8 array. So whether it is kept is known from its type, when the policy is compiled:
the code that keeps it is not there at all where it is not (a branch on a size that is 0 would cost FIFO, S3-FIFO and
2Q a third of their speed, and LFU half: it makes the functions too large to be inlined).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import overload


def new_kept(n: int, dtype: npt.DTypeLike, keeps: bool) -> npt.NDArray[Any]:
    """Zeros of `dtype`, which is not uint8, where `keeps`; else the array that stands for nothing."""
    return np.zeros(n, dtype) if keeps else np.zeros(0, np.uint8)


def is_kept(array: Any) -> bool:
    """Whether `array`, made by `new_kept`, is kept; a constant in compiled code."""
    return bool(array.dtype != np.uint8)


@overload(is_kept)
def _is_kept(array: Any) -> Any:
    answer = array.dtype != types.uint8

    def implementation(array: Any) -> bool:
        return answer

    return implementation
