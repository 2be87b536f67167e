"""Names for the content of blocks that give nothing away.

The log must tell equal prefixes from different ones and nothing else. vLLM's own block hashes start from a public seed,
so that whoever holds them can test guesses at a prompt; each is therefore hashed again with a secret key that is
not in the log. Where the engine makes no hashes, or only at a coarser stride, the chain is made here from token ids.

The hash runs in the serving thread for every block that fills, so the cheapest keyed one at hand is taken: Python's own
hash of bytes, SipHash-1-3 with 128 secret bits that each process draws at its start. Where the user chose a key, or
took the secret away with ``PYTHONHASHSEED``, it is BLAKE2b with a key of ours, some times slower.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

DIGEST_BYTES = 8


_pack = struct.Struct("<q").pack


def siphash(content: bytes) -> bytes:
    """Eight bytes that only this process could have made of ``content``, where its hash is secret."""
    return _pack(hash(content))


def keyed_hash(key: bytes | None) -> Callable[[bytes], bytes]:
    """A function from bytes to 8 bytes, keyed with ``key`` or, for None, with a secret of the process."""
    if (
        key is None
        and _hash_is_secret()
        and sys.hash_info.algorithm.startswith("siphash")
        and sys.hash_info.width == 64
    ):
        return siphash
    secret = key or os.urandom(16)

    def blake(content: bytes) -> bytes:
        return blake2b(secret + content, digest_size=DIGEST_BYTES).digest()

    return blake


def as_number(keyed: Callable[[bytes], bytes]) -> Callable[[bytes], int]:
    """``keyed`` as a function to a signed number, which saves a call where it is Python's own hash."""
    return hash if keyed is siphash else lambda content: int.from_bytes(keyed(content), "little", signed=True)


def _hash_is_secret() -> bool:
    """Whether this process drew the secret of its hash itself. Its environment may have been changed since it began."""
    try:
        with open("/proc/self/environ", "rb") as file:
            given = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
    except OSError:
        return False
    seeds = (given.get(b"PYTHONHASHSEED", b""), os.environ.get("PYTHONHASHSEED", "").encode())
    return bool(sys.flags.hash_randomization) and all(seed in (b"", b"random") for seed in seeds)


class EngineChain:
    """Identities from the engine's own chained hashes, of which every ``stride``-th is taken."""

    def __init__(self, keyed: Callable[[bytes], bytes], granule: int, hash_block_size: int) -> None:
        self._number = as_number(keyed)
        self.granule = granule
        self._stride = granule // hash_block_size

    def entries(self, request: Any, start: int, stop: int, state: list[Any]) -> bytes:
        """Chain entries ``start`` to ``stop`` (in granules) of a vLLM request, 8 bytes each."""
        stride = self._stride
        hashes = request.block_hashes[(start + 1) * stride - 1 : stop * stride : stride]
        if len(hashes) != stop - start:
            raise RuntimeError(f"{len(hashes)} of {stop - start} block hashes are there")
        return array("q", map(self._number, map(_as_bytes, hashes))).tobytes()


class OwnChain:
    """Identities from token ids, chained, at a stride of ``granule`` tokens.

    ``extra_keys(request, start, end)``: what makes equal tokens different for the engine (adapter, salt, images).
    ``state``: per request, the last link ``[bytes]``; empty at first.
    """

    def __init__(self, keyed: Callable[[bytes], bytes], granule: int, extra_keys: Any) -> None:
        self._keyed = keyed
        self.granule = granule
        self._extra_keys = extra_keys

    def entries(self, request: Any, start: int, stop: int, state: list[Any]) -> bytes:
        """As :meth:`EngineChain.entries`. ``start`` must be where the last call for the request stopped."""
        granule, extra_keys = self.granule, self._extra_keys
        link = state[0] if state else b""
        tokens = array("i", request.all_token_ids[start * granule : stop * granule]).tobytes()
        plain = _no_extra_keys(request)
        out = []
        size = granule * 4
        for i in range(stop - start):
            content = tokens[i * size : (i + 1) * size]
            if not plain:
                at = (start + i) * granule
                content += repr(extra_keys(request, at, at + granule)).encode()
            link = blake2b(link + content, digest_size=16).digest()
            out.append(self._keyed(link))
        state[:] = [link]
        return b"".join(out)


def tenant(keyed: Callable[[bytes], bytes], lora: str | None, salt: str | None) -> bytes:
    """Eight bytes that tell tenants (adapter and cache salt) apart; zeros for neither."""
    if lora is None and salt is None:
        return bytes(8)
    return keyed(repr((lora, salt)).encode())


def _no_extra_keys(request: Any) -> bool:
    return (
        not getattr(request, "mm_features", None)
        and getattr(request, "lora_request", None) is None
        and getattr(request, "cache_salt", None) is None
    )


def _as_bytes(block_hash: Any) -> bytes:
    """Older engines keep a block hash as an integer, or as a tuple with the integer in front."""
    if isinstance(block_hash, bytes):
        return block_hash
    value = getattr(block_hash, "hash_value", block_hash)
    return value if isinstance(value, bytes) else int(value).to_bytes(40, "little", signed=True)
