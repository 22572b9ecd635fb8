"""``--resume``: what is complete stands in a journal beside the output, and is not scored again.

The journal ``OUTPUT.resume`` is NDJSON and only grows: a line that says how scores were made, then
a line per input that was scored to its end, with its rows. A run that goes on writes the output
anew from those rows and new ones, so that it comes out as if it had never been stopped. One run at
a time has it: the journal is locked while it is open, and the system unlocks it however a run ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from dgiqa_stream.cli._rows import InputResult
from dgiqa_stream.errors import ConfigError, SinkError
from dgiqa_stream.urls import path_of, scheme_of

if TYPE_CHECKING:
    from dgiqa_stream.cli._jobs import Score
    from dgiqa_stream.cli._rows import RowWriter

SCHEMA = "dgiqa.resume/1"
_RESULT_FIELDS = (
    *("path", "num_frames", "num_corrupt", "pooled", "headline", "coverage", "in_domain_share"),
    "seconds",
)
Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


def journal_path(output: str) -> Path:
    """The journal of an output."""
    return Path(output + ".resume")


def refuse_unresumable(output: str, format: str, inputs: list[str]) -> None:
    """Raise :class:`ConfigError` for what cannot be resumed."""
    target = Path(output)
    if output == "-" or (target.exists() and not target.is_file()):
        raise ConfigError("--resume needs a file to go on with: name it with -o")
    if format not in ("csv", "ndjson", "pooled"):
        raise ConfigError(
            f"--resume cannot go on with --format {format}: use csv, ndjson or pooled"
        )
    for path in inputs:
        if scheme_of(path) != "file":
            raise ConfigError(f"--resume knows files by size and time of change: {path} is none")
    if target.exists() and target.stat().st_size and not journal_path(output).exists():
        raise ConfigError(
            f"cannot resume {output}: it was not written with --resume, there is no "
            f"{journal_path(output)}; delete it or choose another -o"
        )


def stamp_of(path: str) -> Stamp | None:
    """What tells that a file has changed; None where there is none."""
    try:
        found = path_of(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


@dataclass(slots=True)
class Journal:
    """What earlier runs completed, and where this one adds its own; close it at the end."""

    _file: IO[bytes]
    _done: Mapping[tuple[str, Stamp], dict[str, Any]]
    _begun: dict[str, Stamp | None] = field(default_factory=dict)
    num_kept: int = 0

    @classmethod
    def open(cls, output: str, made: Mapping[str, Any]) -> Journal:
        """Read the journal of an output, or begin one. ``made`` says how scores are made.

        Raises :class:`ConfigError` where they were made otherwise before or another run has it,
        :class:`SinkError` where it cannot be written.
        """
        path = journal_path(output)
        header = json.loads(json.dumps({"schema": SCHEMA, **made}))
        with ExitStack() as on_failure:
            try:
                file = on_failure.enter_context(path.open("a+b"))
                _lock(file, output)
                file.seek(0)
                lines, num_bytes = _whole_lines(file.read())
                if lines:
                    _refuse_other(lines[0], header, output)
                file.truncate(num_bytes)  # a line that a killed run left unfinished
                journal = cls(file, {_key(line): line for line in lines[1:]})
                if not lines:
                    journal._append(header)
            except OSError as exc:
                raise SinkError(f"cannot write {path}: {exc.strerror}; choose another -o") from exc
            on_failure.pop_all()  # the journal closes it
        return journal

    def scoring(self, score: Score) -> Score:
        """Scores what is not complete yet."""

        def score_or_keep(path: str, writer: RowWriter) -> InputResult:
            stamp = stamp_of(path)
            self._begun[path] = stamp
            done = None if stamp is None else self._done.get((path, stamp))
            if done is None:
                return score(path, writer)
            return InputResult(**{k: done[k] for k in _RESULT_FIELDS}, kept_rows=done["rows"])

        return score_or_keep

    def take(self, result: InputResult, rows: str) -> None:
        """Keep what was scored to its end."""
        stamp = self._begun.get(result.path)
        if result.kept_rows is not None:
            self.num_kept += 1
        elif result.error is None and stamp is not None:
            told = {k: getattr(result, k) for k in _RESULT_FIELDS}
            told["pooled"] = dict(result.pooled)
            self._append({**told, "size_bytes": stamp[0], "mtime_ns": stamp[1], "rows": rows})

    def close(self) -> None:
        """Nothing more is taken."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise SinkError(f"cannot write {self._file.name}: {exc.strerror}; make room") from exc


class RowsOut:
    """The output, which also remembers what was written since it was last asked."""

    def __init__(self, out: TextIO) -> None:
        """``out`` is the file itself."""
        self._out, self._parts = out, list[str]()

    def write(self, text: str) -> int:
        """Write and remember."""
        self._parts.append(text)
        return self._out.write(text)

    def flush(self) -> None:
        """Hand it to the system."""
        self._out.flush()

    def taken(self) -> str:
        """What was written since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text


def _lock(file: IO[bytes], output: str) -> None:
    """Have the file alone until it is closed; where the system has no such locks, nothing is done.

    A lock on the journal itself, not a file beside it: nothing is left behind by a killed run.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        file.close()
        raise ConfigError(
            f"cannot resume {output}: another run writes it now; wait for its end, or choose "
            "another -o"
        ) from exc
    except OSError:  # a network file system without locks
        return


def _whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines that were written to their end, and how many bytes they are."""
    lines: list[dict[str, Any]] = []
    num_bytes = 0
    for line in content.splitlines(keepends=True):
        try:
            found = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(found, dict):
            break
        lines.append(found)
        num_bytes += len(line)
    return lines, num_bytes


def _key(line: Mapping[str, Any]) -> tuple[str, Stamp]:
    return line["path"], (line["size_bytes"], line["mtime_ns"])


def _refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], output: str) -> None:
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if names:
        raise ConfigError(
            f"cannot resume {output}: {', '.join(names)} differ from those of the run that began "
            f"it; use the same, or delete it and {journal_path(output)}"
        )
