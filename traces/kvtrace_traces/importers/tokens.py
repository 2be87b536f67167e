"""Prompts as tokens and as chains of identities that give nothing away: no text and no token gets into a trace.

A chat becomes tokens in the manner of ChatML, message by message: whatever two chats have in common at their beginning
is then the same tokens, whichever tokenizer is used. Templates of models differ in their marks by a few tokens a
message.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain as joined
from pathlib import Path
from typing import Any

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.importers.fields import shown

Encode = Callable[[str], Sequence[int]]
MAX_TOKEN = (1 << 32) - 1
_KEPT_TEXTS = 1 << 14
HOW = "--tokenizer tiktoken:NAME (as cl100k_base, o200k_base) or --tokenizer FILE (a model's tokenizer.json)"


def tokenizer(named: str | None) -> Encode | None:
    """The function from text to token ids that the user named. Raises :class:`KvtraceError` where it is not there."""
    if named is None:
        return None
    family, colon, name = named.partition(":")
    if colon and family == "tiktoken":
        return _kept(_tiktoken(name))
    path = Path(name if family == "tokenizers" and colon else named)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"--tokenizer {named}: there is no such file; give {HOW}")
    return _kept(_tokenizers(path))


def _kept(encode: Encode) -> Encode:
    """Chats repeat their messages: those of late are not encoded again."""
    return lru_cache(maxsize=_KEPT_TEXTS)(lambda text: array("I", encode(text)) if text else array("I"))


def _tiktoken(name: str) -> Encode:
    try:
        import tiktoken  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise KvtraceError("tiktoken is not installed: pip install tiktoken") from None
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UsageError(f"--tokenizer tiktoken:{name}: tiktoken knows {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # it downloads the vocabulary, by whatever client it has
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KvtraceError(
            f"tiktoken could not load {name} ({why[:120]}): let it download once, or set TIKTOKEN_CACHE_DIR"
        ) from None
    return encoding.encode_ordinary


def _tokenizers(path: Path) -> Encode:
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise KvtraceError("tokenizers is not installed: pip install tokenizers") from None
    try:
        made = Tokenizer.from_file(str(path))
    except Exception as error:  # whatever its parser raises
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KvtraceError(f"{path} is no tokenizer.json ({why[:120]})") from None

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = made.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def of_message(encode: Encode, role: str, content: Any) -> array[int]:
    """The tokens of one message. ``content``: a text, or a list of parts as OpenAI's interface has them."""
    tokens = array("I", encode(f"<|im_start|>{role}\n"))
    tokens.extend(encode(text_of(content)))
    tokens.extend(encode("<|im_end|>\n"))
    return tokens


def of_prompt(encode: Encode, messages: Iterable[array[int]]) -> array[int]:
    """The tokens of a prompt: its messages', and the mark that asks for an answer."""
    return array("I", joined(joined.from_iterable(messages), encode("<|im_start|>assistant\n")))


def text_of(content: Any) -> str:
    """The text of a message's content. Raises :class:`ValueError`."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(part) for part in content)
    raise ValueError(f"a message's content is {shown(content)}, neither a text nor a list of parts")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return json.dumps(part, default=str)  # an image, say: equal ones are equal tokens, though not as many as in a model


def checked(tokens: Any, field: str) -> array[int]:
    """A list of token ids. Raises :class:`ValueError`."""
    if not isinstance(tokens, list):
        raise ValueError(f"{field} is not a list")
    for token in tokens:
        if type(token) is not int or not 0 <= token <= MAX_TOKEN:
            raise ValueError(f"{field} holds {shown(token)}, which is no token id")
    return array("I", tokens)


class Chain:
    """Identities of a prompt's whole granules, each a keyed hash over all tokens up to there.

    The key is drawn for each import and is not in the trace: whoever holds the trace cannot test guesses at a prompt.
    """

    def __init__(self, granule: int) -> None:
        self._bytes = 4 * granule
        self._key = os.urandom(32)

    def of(self, tokens: array[int]) -> list[int]:
        """One 64-bit identity for each whole granule of ``tokens``."""
        content, size = tokens.tobytes(), self._bytes
        state, found = b"", []
        for at in range(0, len(content) - size + 1, size):
            state = blake2b(state + content[at : at + size], digest_size=16, key=self._key).digest()
            found.append(int.from_bytes(state[:8], "little"))
        return found
