"""Sixteen numbers at a time: whether they go up or down evenly, and writing such a row of numbers.

Blocks that change hands together mostly have consecutive numbers, hold consecutive identities and have as many users.
Where that is so, sixteen of them cost a few instructions over vectors. LLVM makes none of loops over so few, which it
unrolls first, so they are asked for here. Without compilation (NUMBA_DISABLE_JIT) the functions are plain Python.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

LANES = 16
_WORDS = ir.VectorType(ir.IntType(32), LANES)


def even(values, column, at, begin, step, but=LANES):
    """Whether the LANES numbers of `values` (int32[n], or a `column` of int32[n, m]) from `at` on are `begin`,
    `begin + step`, ..., all or all but one. False without a look where a column does not lie in one piece."""
    place = values if values.ndim == 1 else values[:, column]
    same = place[at : at + LANES] == begin + step * np.arange(LANES)
    return bool((same | (np.arange(LANES) == but)).all())


def fill_even(values, column, at, begin, step):
    """Write `begin`, `begin + step`, ... to the LANES numbers that `even` looks at."""
    place = values if values.ndim == 1 else values[:, column]
    place[at : at + LANES] = begin + step * np.arange(LANES)


def _in_one_piece(values):
    return (values.ndim, values.layout) in ((1, "C"), (2, "F")) and values.dtype == types.int32


def _place(context, builder, signature, args):
    """The pointer to the numbers."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    place = builder.gep(array.data, [args[2]])
    if signature.args[0].ndim == 2:
        strides = cgutils.unpack_tuple(builder, array.strides, 2)
        place = cgutils.pointer_add(builder, place, builder.mul(args[1], strides[1]))
    return builder.bitcast(place, _WORDS.as_pointer())


def _numbers(builder, args):
    """The vector of `begin + step * lane`."""
    begin, step = (builder.trunc(arg, ir.IntType(32)) for arg in args[3:5])
    zero, places = ir.Constant(ir.IntType(32), 0), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    begins, steps = (
        builder.shuffle_vector(builder.insert_element(ir.Constant(_WORDS, ir.Undefined), x, zero), places, places)
        for x in (begin, step)
    )
    return builder.add(begins, builder.mul(steps, ir.Constant(_WORDS, list(range(LANES)))))


@intrinsic
def _even(typing, values, column, at, begin, step, but):
    def code(context, builder, signature, args):
        found = builder.load(_place(context, builder, signature, args), align=4)
        same = builder.icmp_signed("==", found, _numbers(builder, args))
        bits = builder.zext(builder.bitcast(same, ir.IntType(LANES)), ir.IntType(64))
        every = ir.Constant(ir.IntType(64), (1 << LANES) - 1)
        spared = builder.shl(ir.Constant(ir.IntType(64), 1), args[5])
        return builder.icmp_unsigned("==", builder.and_(builder.or_(bits, spared), every), every)

    return types.boolean(values, *(types.int64,) * 5), code


@intrinsic
def _fill_even(typing, values, column, at, begin, step):
    def code(context, builder, signature, args):
        builder.store(_numbers(builder, args), _place(context, builder, signature, args), align=4)
        return context.get_dummy_value()

    return types.void(values, *(types.int64,) * 4), code


@overload(even, jit_options={"forceinline": True, "nogil": True})
def _overload_even(values, column, at, begin, step, but=LANES):
    if not _in_one_piece(values):
        return lambda values, column, at, begin, step, but=LANES: False
    return lambda values, column, at, begin, step, but=LANES: _even(values, column, at, begin, step, but)


@overload(fill_even, jit_options={"forceinline": True, "nogil": True})
def _overload_fill_even(values, column, at, begin, step):
    if _in_one_piece(values):
        return lambda values, column, at, begin, step: _fill_even(values, column, at, begin, step)

    def one_by_one(values, column, at, begin, step):
        for lane in range(LANES):
            values[at + lane, column] = begin + step * lane

    return one_by_one
