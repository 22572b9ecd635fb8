"""The published contract: messages made from the runtime's values, and their bytes.

JSON and msgpack carry the same fields. Numbers that are not finite become null. The JSON Schema of
all messages is ``assets/schema/messages-1.json`` in the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from dgiqa_stream.factory import MessageFactory, error_part, new_id
from dgiqa_stream.messages import (
    KINDS,
    MAJOR,
    PUBLISHED_KINDS,
    ErrorPart,
    FinalMessage,
    FrameMessage,
    Message,
    MetaMessage,
    Slot,
    StatusMessage,
    ThumbnailMessage,
    WindowMessage,
    finite,
    slot_of,
)

__all__ = [
    "KINDS",
    "MAJOR",
    "PUBLISHED_KINDS",
    "ErrorPart",
    "FinalMessage",
    "FrameMessage",
    "Message",
    "MessageFactory",
    "MetaMessage",
    "Slot",
    "StatusMessage",
    "ThumbnailMessage",
    "WindowMessage",
    "decode",
    "encode",
    "error_part",
    "json_schema",
    "new_id",
    "slot_of",
    "topic_of",
    "topic_prefix",
]

_JSON_STARTS = frozenset(b"{ \t\r\n")  # none of them begins a msgpack map

_to_json = msgspec.json.Encoder().encode
_from_json: Callable[[bytes], Message] = msgspec.json.Decoder(Message).decode
_from_msgpack: Callable[[bytes], Message] = msgspec.msgpack.Decoder(Message).decode


def encode(message: Message, encoding: Literal["json", "msgpack"] = "json") -> bytes:
    """The payload: UTF-8 JSON on one line, or msgpack."""
    if encoding == "json":
        return _to_json(message)
    # msgspec's msgpack, unlike its JSON, keeps NaN
    return msgspec.msgpack.encode(finite(msgspec.to_builtins(message, builtin_types=(bytes,))))


def decode(payload: bytes) -> Message:
    """The message in a payload of either encoding; unknown keys are ignored.

    Raises ``ValueError`` where the payload is damaged or its schema is unknown.
    """
    read = _from_json if payload[:1] and payload[0] in _JSON_STARTS else _from_msgpack
    try:
        return read(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(
            f"not a message of major {MAJOR} ({', '.join(KINDS)}): {exc}; "
            "look for damage, or for a sender of another version"
        ) from exc


def topic_of(message: Message) -> bytes:
    """``dgiqa/1/<kind>/<stream>/``; the last slash keeps ``cam1`` from matching ``cam10``."""
    return topic_prefix(message.kind, message.stream)


def topic_prefix(kind: str, stream: str | None = None) -> bytes:
    """What to subscribe to for one kind, of one stream or of all."""
    return f"dgiqa/{MAJOR}/{kind}/{stream + '/' if stream else ''}".encode("ascii")


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of every message; ``assets/schema/messages-1.json`` equals it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"dgiqa-stream messages, major {MAJOR}",
        **msgspec.json.schema(Message),
    }
