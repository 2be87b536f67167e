"""Machine instructions that NumPy and Numba do not offer: counting bits, finding the first or the last one, and asking
for memory early."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

if numba.config.DISABLE_JIT:

    def bit_count(word: Any) -> Any:
        return np.uint64(int(word).bit_count())

    def leading_zeros(word: Any) -> Any:
        return np.uint64(64 - int(word).bit_length())

    def trailing_zeros(word: Any) -> Any:
        lowest = int(word) & -int(word)
        return np.uint64(lowest.bit_length() - 1 if lowest else 64)

    def prefetch(array: Any, index: Any) -> None:
        return None

else:

    @intrinsic
    def bit_count(typing_context: Any, word: Any) -> Any:
        """Set bits of a uint64: one machine instruction."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ctpop(args[0])

        return types.uint64(types.uint64), generate

    @intrinsic
    def leading_zeros(typing_context: Any, word: Any) -> Any:
        """Zero bits above the highest set bit of a uint64 (64 for 0): one machine instruction."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ctlz(args[0], context.get_constant(types.boolean, False))

        return types.uint64(types.uint64), generate

    @intrinsic
    def trailing_zeros(typing_context: Any, word: Any) -> Any:
        """Zero bits below the lowest set bit of a uint64 (64 for 0): one machine instruction."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.cttz(args[0], context.get_constant(types.boolean, False))

        return types.uint64(types.uint64), generate

    @intrinsic
    def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
        """Asks for element `index` of `array` (C-contiguous; counted through all its dimensions) to be brought near;
        changes nothing, never fails."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            byte = ir.IntType(8).as_pointer()
            flag = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            address = builder.bitcast(builder.gep(data, [args[1]]), byte)
            # A read, to be kept as near as possible, of data.
            builder.call(function, [address, flag(0), flag(3), flag(1)])
            return context.get_dummy_value()

        return types.void(array, types.intp), generate
