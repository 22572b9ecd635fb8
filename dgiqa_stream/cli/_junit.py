"""JUnit XML, as CI systems read it: a case per input and threshold.

Shaped after the schema of Jenkins' xUnit plugin: ``testsuites``, one ``testsuite`` with
``properties`` and ``testcase`` elements, of which each holds at most one ``failure`` or ``error``.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml  # writes only

from dgiqa_stream.errors import ConfigError, SinkError

if TYPE_CHECKING:
    from dgiqa_stream.cli._rows import InputResult
    from dgiqa_stream.cli._thresholds import Threshold

SUITE = "dgiqa-stream score"
CLASS_NAME = "dgiqa-stream.score"
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def refuse_unwritable(path: str) -> None:
    """Raise before hours of scoring what writing the file would raise after them."""
    target = Path(path)
    if path == "-" or target.is_dir():
        raise ConfigError(f"--junit {path} is no file to write: give it a name, as junit.xml")
    place = target if target.exists() else target.parent
    if not os.access(place, os.W_OK):
        why = "no such folder" if not place.exists() else "no permission"
        raise SinkError(f"cannot write --junit {path}: {why}; choose another name")


def write_junit(
    path: str,
    results: Sequence[InputResult],
    thresholds: Sequence[Threshold],
    *,
    properties: Mapping[str, str],
    seconds: float,
) -> None:
    """Write the file, whole or not at all; raises :class:`SinkError`.

    An input's time is that of its first case, so that the times add up; without thresholds each
    input has one case, that it could be scored.
    """
    cases = [case for result in results for case in _cases(result, thresholds)]
    kinds = [child.tag for case in cases for child in case]
    counts = {
        "tests": str(len(cases)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
    }
    total = {"name": SUITE, **counts, "time": _time(seconds)}
    # without a zone: the schema has no place for it
    begun = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=seconds)
    about = {
        "skipped": "0",
        "timestamp": begun.isoformat(timespec="seconds"),
        "hostname": _clean(platform.node() or "localhost"),
    }
    root = Xml.Element("testsuites", total)
    suite = Xml.SubElement(root, "testsuite", {**total, **about})
    listed = Xml.SubElement(suite, "properties")
    for name, value in properties.items():
        Xml.SubElement(listed, "property", {"name": name, "value": _clean(value)})
    suite.extend(cases)
    Xml.indent(root, space=" ")
    _write_whole(Path(path), Xml.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _cases(result: InputResult, thresholds: Sequence[Threshold]) -> Iterator[Xml.Element]:
    times = [result.seconds, *(0.0 for _ in thresholds[1:])]
    for threshold, seconds in zip(thresholds or (None,), times, strict=True):
        claim = f"{threshold.pooler} >= {threshold.least:g}" if threshold else "is scored"
        case = Xml.Element(
            "testcase",
            {
                "classname": CLASS_NAME,
                "name": _clean(f"{result.path}: {claim}"),
                "time": _time(seconds),
            },
        )
        shortfall = threshold.shortfall(result.pooled) if threshold else ""
        if result.error is not None:
            _tell(case, "error", "not-scored", result.error)
        elif shortfall:
            _tell(case, "failure", "below-threshold", shortfall)
        yield case


def _tell(case: Xml.Element, tag: str, kind: str, text: str) -> None:
    said = Xml.SubElement(case, tag, {"type": kind, "message": _clean(text)})
    said.text = _clean(text)


def _clean(text: str) -> str:
    """The text with what XML 1.0 cannot hold escaped, as bytes of a name that are no UTF-8."""
    return _NOT_IN_XML.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


def _time(seconds: float) -> str:
    return f"{seconds:.3f}"


def _write_whole(target: Path, content: bytes) -> None:
    """Beside it first, then renamed; a device or pipe is written as it is."""
    is_file = target.is_file() or not target.exists()
    place = target.with_name(f".{target.name}-{os.getpid()}") if is_file else target
    try:
        place.write_bytes(content)
        if is_file:
            place.replace(target)
    except OSError as exc:
        if is_file:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)
        raise SinkError(f"cannot write --junit {target}: {exc.strerror}") from exc
