"""ShareGPT's conversations, a JSON list or JSONL: ``conversations`` of ``from`` (human, gpt, system) and ``value``.

Every answer of the model is a request, whose prompt is all that stands before it, and whose output is the answer. When
they came is not known: they are in the order of the file. Identities are keyed hashes of whole granules of tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from kvtrace_traces.errors import UsageError
from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import UNKNOWN, Bad, Piece, Record, gathered
from kvtrace_traces.importers.documents import documents
from kvtrace_traces.importers.fields import name_of, shown
from kvtrace_traces.importers.openai import NeedsTokenizer, granule
from kvtrace_traces.importers.source import Source
from kvtrace_traces.importers.tokens import HOW, Chain, Encode, checked, of_message, of_prompt, text_of, tokenizer

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_LISTS = ("conversations", "conversation", "messages", "items")


@importer(
    "sharegpt", "ShareGPT conversations, JSON or JSONL: each answer is a request",
    granule=granule, takes=("block_size", "granule", "tokenizer"),
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request for each answer."""
    encode, chain = tokenizer(source.options.tokenizer), Chain(source.granule)

    def records() -> Iterator[Record | Bad]:
        own = silent = 0
        for found in documents(source):
            if isinstance(found, Bad):
                yield found
                continue
            try:
                requests = list(_requests(found.value, encode, chain, own))
            except NeedsTokenizer:
                raise UsageError(
                    f"{source.where(found.file, found.line)} holds text: name its tokenizer with {HOW}"
                ) from None
            except ValueError as error:
                yield Bad(found.file, found.line, str(error))
                continue
            silent += not requests
            own += len(requests)
            yield from requests
        if silent:
            source.notes.append(f"{silent:,} conversations have no answer, and so no request")

    return gathered(records())


def _requests(row: Any, encode: Encode | None, chain: Chain, own: int) -> Iterator[Record]:
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    turns = next((row[name] for name in _LISTS if name in row), None)
    if not isinstance(turns, list):
        raise ValueError("it has no list of conversations")
    before: list[array[int]] = []
    name, parent, number = name_of(row, "id"), UNKNOWN, 0
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"conversations holds {shown(turn)}, which is no object")
        said = str(turn.get("from", turn.get("role", "")))
        role = _ROLES.get(said, said)
        if not role:
            raise ValueError("a turn does not say whom it is from")
        tokens = checked(turn["token_ids"], "token_ids") if "token_ids" in turn else None
        if tokens is None and encode is None:
            raise NeedsTokenizer
        content = turn.get("value", turn.get("content"))
        if role == "assistant":
            number += 1
            prompt = (
                of_prompt(encode, before) if encode is not None else array("I", [t for part in before for t in part])
            )
            output = len(tokens) if tokens is not None else len(encode(text_of(content)))  # type: ignore[misc]
            yield Record(
                chain.of(prompt), UNKNOWN, len(prompt), output, name, turn=number, own=own, parent=parent
            )  # fmt: skip
            own, parent = own + 1, own
        before.append(tokens if tokens is not None else of_message(encode, role, content))  # type: ignore[arg-type]
