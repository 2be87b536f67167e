"""Logs of requests to OpenAI's interface, JSONL or a JSON list: what a gateway or proxy in front of a server writes.

A record is the body of a request, or has it as ``body``, ``request``, ``request_body`` or ``request_json``. Its prompt
is one of ``prompt_token_ids`` (or ``token_ids``, ``input_ids``), ``messages``, ``prompt`` or ``input``; text needs a
tokenizer, which the user names. Times, answers and usage are taken where they are told. Identities are keyed hashes of
whole granules of tokens.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from kvtrace_traces.errors import UsageError
from kvtrace_traces.importers import BLOCK_TOKENS, importer
from kvtrace_traces.importers.batches import UNKNOWN, Bad, Piece, Record, gathered
from kvtrace_traces.importers.columns import SECONDS
from kvtrace_traces.importers.documents import documents
from kvtrace_traces.importers.fields import date_ns, name_of, nanoseconds, shown, tokens_of
from kvtrace_traces.importers.source import Source
from kvtrace_traces.importers.tokens import HOW, Chain, Encode, checked, of_message, of_prompt, text_of, tokenizer

_BODIES = ("body", "request", "request_body", "request_json")
_ANSWERS = ("response", "response_body", "response_json")
_TOKENS = ("prompt_token_ids", "token_ids", "input_ids")
_TIMES = ("timestamp", "arrival_time", "ts", "time", "start_time", "created_at", "created")
_OUTPUTS = ("completion_tokens", "output_tokens", "output_length")
_NAMES = ("request_id", "custom_id", "id")
_LATEST_S = 10**11  # as seconds, a time after the year 5000: then it counts something finer


class NeedsTokenizer(ValueError):
    """A record holds text, and no tokenizer was named."""


def granule(source: Source) -> int:
    """Tokens for which an identity is made."""
    return source.options.granule or source.options.block_size or BLOCK_TOKENS


@importer(
    "openai", "OpenAI-style request logs, JSONL or JSON: messages, prompt or token ids",
    granule=granule, takes=("block_size", "granule", "tokenizer"),
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a record."""
    encode, chain = tokenizer(source.options.tokenizer), Chain(source.granule)

    def records() -> Iterator[Record | Bad]:
        for found in documents(source):
            if isinstance(found, Bad):
                yield found
                continue
            try:
                yield _record(found.value, encode, chain)
            except NeedsTokenizer:
                raise UsageError(
                    f"{source.where(found.file, found.line)} holds text: name its tokenizer with {HOW}"
                ) from None
            except ValueError as error:
                yield Bad(found.file, found.line, str(error))

    return gathered(records())


def _record(row: Any, encode: Encode | None, chain: Chain) -> Record:
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    body = _inner(row, _BODIES) or row
    answer = _inner(row, _ANSWERS) or {}
    answer = _inner(answer, ("body",)) or answer
    prompt = _prompt(row, body, encode)
    return Record(
        chain.of(prompt),
        _time(row, body, answer),
        len(prompt),
        _output_tokens(row, body, answer, encode),
        name_of(row, *_NAMES) or name_of(answer, "id"),
    )


def _inner(row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """The first of ``names`` that is an object, or a text of one."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError(f"{name} is a text that is not JSON") from None
        if isinstance(value, dict):
            return value
    return None


def _prompt(row: Mapping[str, Any], body: Mapping[str, Any], encode: Encode | None) -> array[int]:
    for name in _TOKENS:
        if name in body or name in row:
            return checked(body[name] if name in body else row[name], name)
    if "messages" in body:
        return _chat(body, body["messages"], encode)
    prompt = body.get("prompt")
    if prompt is not None:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            (prompt,) = prompt
        if isinstance(prompt, str):
            return array("I", _needed(encode)(prompt))
        if isinstance(prompt, list) and any(not isinstance(token, int) for token in prompt):
            raise ValueError("prompt holds several prompts: write a record for each")
        return checked(prompt, "prompt")
    if "input" in body:
        asked = body["input"]
        messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        if "instructions" in body:
            messages = [{"role": "system", "content": body["instructions"]}, *messages]
        return _chat(body, messages, encode)
    raise ValueError("it has none of messages, prompt, input or prompt_token_ids")


def _chat(body: Mapping[str, Any], messages: Any, encode: Encode | None) -> array[int]:
    if not isinstance(messages, list):
        raise ValueError("messages is not a list")
    encode = _needed(encode)
    parts = []
    if body.get("tools"):  # templates put them first, and they are most of what chats share
        parts.append(of_message(encode, "tools", json.dumps(body["tools"], default=str)))
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"messages holds {shown(message)}, which is no object")
        text = text_of(message.get("content"))
        if message.get("tool_calls"):
            text += json.dumps(message["tool_calls"], default=str)
        parts.append(of_message(encode, str(message.get("role", message.get("type", "user"))), text))
    return of_prompt(encode, parts)


def _needed(encode: Encode | None) -> Encode:
    if encode is None:
        raise NeedsTokenizer
    return encode


def _time(*places: Mapping[str, Any]) -> int:
    for place in places:
        for name in _TIMES:
            value = place.get(name)
            if value is not None:
                return _moment(value, name)
    return UNKNOWN


def _moment(value: Any, name: str) -> int:
    if isinstance(value, str):
        try:
            value = Decimal(value)
        except InvalidOperation:
            return date_ns(value, name)
    unit = SECONDS
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        while unit > 0 and value >= _LATEST_S * 10 ** (SECONDS - unit):
            unit -= 3
    return nanoseconds(value, name, unit)


def _output_tokens(
    row: Mapping[str, Any], body: Mapping[str, Any], answer: Mapping[str, Any], encode: Encode | None
) -> int:
    for place in (row.get("usage"), answer.get("usage"), row, answer):
        if isinstance(place, dict):
            for name in _OUTPUTS:
                if place.get(name) is not None:
                    return tokens_of(place, name)
    for place in (row, answer):
        if isinstance(place.get("output_token_ids"), list):
            return len(place["output_token_ids"])
    if encode is not None:
        for place in (row, answer):
            text = _answer_text(place)
            if text is not None:
                return len(encode(text))
    return 0


def _answer_text(place: Mapping[str, Any]) -> str | None:
    choices = place.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        content = message.get("content") if isinstance(message, dict) else choices[0].get("text")
        return text_of(content)
    for name in ("response", "completion", "output_text", "output"):
        if isinstance(place.get(name), str):
            return str(place[name])
    return None
