"""Messages as GStreamer's element messages: ``dgiqa-frame``, ``dgiqa-window``, ``dgiqa-final``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from gi.repository import GObject, Gst

from dgiqa_stream.wire import Message

POSTED = frozenset({"frame", "window", "final"})
_LEFT_OUT = frozenset({"params"})  # the settings, which whoever set the properties knows
_TYPES = {
    bool: GObject.TYPE_BOOLEAN,
    # Left to itself, PyGObject makes a 32-bit int of a number and fails at 2.1 s of nanoseconds.
    int: GObject.TYPE_INT64,
    float: GObject.TYPE_DOUBLE,
    str: GObject.TYPE_STRING,
}


class BusSink:
    """A sink that posts on the bus in the name of an element."""

    def __init__(self, element: Gst.Element) -> None:
        self._element = element

    def send(self, message: Message) -> None:
        """Post what an application asks for; how the source is doing it knows by itself."""
        if message.kind in POSTED:
            self._element.post_message(
                Gst.Message.new_element(self._element, structure_of(message))
            )

    def tick(self) -> None:
        """Nothing is due."""

    def close(self) -> None:
        """Nothing to release."""


def structure_of(message: Message) -> Gst.Structure:
    """A message's fields by their paths in JSON, such as ``quality.score``.

    Integers are 64-bit, ``frame.time_base`` is a fraction, a list of numbers an array of doubles;
    what is null, and lists of anything else, are left out.
    """
    structure = Gst.Structure.new_empty(f"dgiqa-{message.kind}")
    for name, value in _fields(msgspec.to_builtins(message)):
        structure.set_value(name, value)
    return structure


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in _LEFT_OUT:
            yield from _fields(value, f"{prefix}{key}.")
        elif key == "time_base" and value is not None:
            yield prefix + key, Gst.Fraction(*value)
        elif isinstance(value, list) and value and all(isinstance(v, float) for v in value):
            yield prefix + key, Gst.ValueArray(value)
        elif kind := _TYPES.get(type(value)):
            yield prefix + key, GObject.Value(kind, value)
