"""Chains of a few requests out of a whole log, and keyed hashes that replace identities. Compiled."""

# ruff: noqa: SIM109 -- chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.compile import njit
from kvtrace_traces.survey import CHAIN, FILL1, op_words

U64 = NDArray[np.uint64]


def chains_of(words: Any, starts: Any, stops: Any, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], U64]:
    """The chains of the ``wanted`` requests (ascending) as the whole log tells them: CSR ``indptr`` and identities."""
    lengths = np.zeros(len(wanted), np.int64)
    nowhere = np.empty(0, np.uint64)
    if len(wanted):
        _collect(words, starts, stops, wanted, np.zeros(len(wanted), np.int64), lengths, nowhere)
    indptr = np.zeros(len(wanted) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    found = np.empty(int(indptr[-1]), np.uint64)
    if len(found):
        lengths[:] = 0
        _collect(words, starts, stops, wanted, indptr, lengths, found)
    return indptr, found


@njit
def _collect(words, starts, stops, wanted, indptr, lengths, found):
    """Append the identities of ``wanted`` requests to ``found`` (uint64, empty: only count them in ``lengths``)."""
    write = len(found) > 0
    for c in range(len(starts)):
        at, stop = starts[c], stops[c]
        while at < stop:
            n = op_words(words, at, stop)
            op = words[at] & np.uint32(15)
            if op == CHAIN or op == FILL1:
                request = np.int64(words[at] >> np.uint32(4))
                i = np.searchsorted(wanted, request)
                if i < len(wanted) and wanted[i] == request:
                    first = at + 1 if op == FILL1 else at + 2
                    many = np.int64(1) if op == FILL1 else np.int64(words[at + 1])
                    if write:
                        for j in range(many):
                            low, high = np.uint64(words[first + 2 * j]), np.uint64(words[first + 2 * j + 1])
                            found[indptr[i] + lengths[i] + j] = low | high << np.uint64(32)
                    lengths[i] += many
            at += n


def fresh_key() -> U64:
    """A key of 128 bits for :func:`keyed`, uint64[2]. Nobody keeps it."""
    return np.array([secrets.randbits(64), secrets.randbits(64)], np.uint64)


@njit
def _round(v0, v1, v2, v3):
    """SipRound (Aumasson and Bernstein: SipHash, a fast short-input PRF, 2012)."""
    v0 += v1
    v1 = (v1 << np.uint64(13)) | (v1 >> np.uint64(51))
    v1 ^= v0
    v0 = (v0 << np.uint64(32)) | (v0 >> np.uint64(32))
    v2 += v3
    v3 = (v3 << np.uint64(16)) | (v3 >> np.uint64(48))
    v3 ^= v2
    v0 += v3
    v3 = (v3 << np.uint64(21)) | (v3 >> np.uint64(43))
    v3 ^= v0
    v2 += v1
    v1 = (v1 << np.uint64(17)) | (v1 >> np.uint64(47))
    v1 ^= v2
    v2 = (v2 << np.uint64(32)) | (v2 >> np.uint64(32))
    return v0, v1, v2, v3


@njit
def keyed(key, value):
    """SipHash-2-4 of the eight bytes of ``value`` (uint64) under ``key`` (uint64[2])."""
    v0 = key[0] ^ np.uint64(0x736F6D6570736575)
    v1 = key[1] ^ np.uint64(0x646F72616E646F6D)
    v2 = key[0] ^ np.uint64(0x6C7967656E657261)
    v3 = key[1] ^ np.uint64(0x7465646279746573)
    v3 ^= value
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0 ^= value
    last = np.uint64(8) << np.uint64(56)  # the length, and no bytes left
    v3 ^= last
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0 ^= last
    v2 ^= np.uint64(0xFF)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


@njit
def rekey(key, values, spare_zero):
    """Replace each of ``values`` (uint64) by its keyed hash, in place; with ``spare_zero`` not 0, which is for none."""
    for i in range(len(values)):
        if values[i] != 0 or not spare_zero:
            values[i] = keyed(key, values[i])
