"""Parts of a long evaluation that are done, beside the result to come: a rerun goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.data.shards import whole_or_none


class FinishedParts:
    """``RESULT.done``: parts by name, kept for the same model and settings alone."""

    def __init__(self, result: Path, settings: object = None) -> None:
        """Take up what an interrupted run with equal ``settings`` left beside a result."""
        self.path = result.with_name(result.name + ".done")
        self._settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._parts: dict[str, Any] = {}
        if self.path.is_file():
            try:
                found = json.loads(self.path.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError):
                return  # damaged: begin again
            if isinstance(found, dict) and found.get("settings") == self._settings:
                self._parts = found["parts"]

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part as it was kept, or made now and kept."""
        if name not in self._parts:
            self._parts[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_none(self.path) as partial:
                partial.write_text(
                    json.dumps({"settings": self._settings, "parts": self._parts}, allow_nan=False)
                )
        made: dict[str, Any] = self._parts[name]
        return made

    def forget(self) -> None:
        """The result is written: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)
