"""Sums over numbers that lie side by side, in vector instructions and without a branch.

LLVM makes no such code of short loops with a condition, so it is asked for here. Uncompiled (NUMBA_DISABLE_JIT), the
functions are plain Python.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

ROW_BYTES = 128  # two cache lines: int16[64] or int32[32]
WORDS = 8  # uint64[8] are a cache line


def lanes(dtype: Any) -> int:
    """How many numbers of `dtype` `sum_behind` adds up."""
    return ROW_BYTES // np.dtype(dtype).itemsize


if numba.config.DISABLE_JIT:

    def sum_behind(numbers: Any, start: Any, own: Any) -> Any:
        row = numbers[int(start) : int(start) + lanes(numbers.dtype)]
        return int(row[max(int(own) + 1, 0) :].sum())

    def ones_from(words: Any, start: Any, first: Any) -> Any:
        line = sum(int(word) << 64 * i for i, word in enumerate(words[int(start) : int(start) + WORDS]))
        return (line >> int(first)).bit_count()

else:
    _I32, _I64 = ir.IntType(32), ir.IntType(64)

    def _load(context, builder, signature, args, vector):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        return builder.load(place, align=vector.element.width // 8)

    def _spread(builder, number, vector):
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, vector.count), None))

    def _call(builder, name, result, vector, value):
        full = f"llvm.{name}.v{vector.count}i{vector.element.width}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [vector]), full)
        return builder.call(function, [value])

    @intrinsic
    def sum_behind(typing_context, numbers, start, own):
        """The sum of `numbers[start + own + 1 : start + lanes]`, of int16 (from 0 to 65,535 in all) or int32 (not
        below 0); `own` may be below 0 or beyond the lanes."""
        width = numbers.dtype.bitwidth

        def generate(context, builder, signature, args):
            element = ir.IntType(width)
            vector = ir.VectorType(element, 8 * ROW_BYTES // width)
            found = _load(context, builder, signature, args, vector)
            places = ir.Constant(vector, list(range(vector.count)))
            behind = builder.icmp_signed(">", places, _spread(builder, builder.trunc(args[2], element), vector))
            kept = builder.select(behind, found, ir.Constant(vector, None))
            return builder.zext(_call(builder, "vector.reduce.add", element, vector, kept), _I64)

        return types.int64(numbers, types.intp, types.intp), generate

    @intrinsic
    def ones_from(typing_context, words, start, first):
        """The set bits of `words[start : start + WORDS]`, uint64, from bit `first` on."""

        def generate(context, builder, signature, args):
            vector = ir.VectorType(_I64, WORDS)
            found = _load(context, builder, signature, args, vector)
            zeros, ones = ir.Constant(vector, None), ir.Constant(vector, [-1] * WORDS)
            begins = ir.Constant(vector, [64 * i for i in range(WORDS)])
            below = builder.sub(_spread(builder, args[2], vector), begins)
            below = builder.select(builder.icmp_signed(">", below, zeros), below, zeros)
            # What a shift by more than 63 gives is undefined.
            some = builder.icmp_unsigned("<", below, ir.Constant(vector, [64] * WORDS))
            mask = builder.shl(ones, builder.and_(below, ir.Constant(vector, [63] * WORDS)))
            kept = builder.and_(found, builder.select(some, mask, zeros))
            counts = _call(builder, "ctpop", vector, vector, kept)
            return _call(builder, "vector.reduce.add", _I64, vector, counts)

        return types.int64(words, types.intp, types.intp), generate
