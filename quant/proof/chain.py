"""A chain of steps in a folder: each is whole or absent, and skipped where it is done already.

Every step has a folder of its own, ``2-int8`` and so on, with a ``done.json`` that says what it was
made with. It grows as ``2-int8.part`` and is renamed when it is finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.proof.artefacts import sha256_of
from quant.proof.files import write_json

Files = Mapping[str, Path]
"""What the chain has come to, by role: ``weights``, ``float``, ``int8``, ``ranges``."""
_DONE, _KEY = "done.json", "key.json"


@dataclass(frozen=True, slots=True)
class Step:
    """One link: what it does with which files and settings."""

    name: str
    settings: Any
    """Ready for JSON: with equal settings and input files a finished step is skipped."""
    reads: tuple[str, ...]
    """Roles of its input files."""
    run: Callable[[Files, Path], Files]
    """Given the files and an empty folder it gives the roles that it makes, in that folder."""
    resumes: bool = False
    """Whether it goes on by itself with what an interrupt left in its folder."""


def run_chain(
    steps: Sequence[Step], files: Files, folder: Path, tell: Callable[[str], None]
) -> tuple[Files, list[dict[str, Any]]]:
    """Run what is not finished; the files in the end, and what is known of every step."""
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for number, step in enumerate(steps, 1):
        place = folder / f"{number}-{step.name}"
        key = _key(step, files)
        made = _finished(place, key)
        is_new = made is None
        if made is None:
            tell(f"{number} of {len(steps)}: {step.name}")
            made = _run(step, files, place, key)
        else:
            tell(f"{number} of {len(steps)}: {step.name} is done")
        files = {**files, **made}
        outputs = {role: sha256_of(path) for role, path in sorted(made.items())}
        told.append({"step": step.name, "is_new": is_new, "outputs": outputs})
    return files, told


def _key(step: Step, files: Files) -> str:
    inputs = {role: sha256_of(files[role]) for role in step.reads if role in files}
    told = {"step": step.name, "settings": step.settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _finished(place: Path, key: str) -> Files | None:
    """What a finished step made; None where it is absent, of other settings or was changed."""
    found = _read(place / _DONE)
    if found.get("key") != key:
        return None
    outputs = {role: place / name for role, (name, _) in found["outputs"].items()}
    whole = all(
        outputs[role].is_file() and sha256_of(outputs[role]) == sha256
        for role, (_, sha256) in found["outputs"].items()
    )
    return outputs if whole else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _run(step: Step, files: Files, place: Path, key: str) -> Files:
    part = place.with_name(place.name + ".part")
    if not (step.resumes and _read(part / _KEY).get("key") == key):
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(exist_ok=True)
    write_json(part / _KEY, {"key": key})
    try:
        made = step.run(files, part)
    except BaseException:  # an interrupt too leaves nothing half-written
        if not step.resumes:
            shutil.rmtree(part, ignore_errors=True)
        raise
    outputs = {role: [path.name, sha256_of(path)] for role, path in made.items()}
    write_json(part / _DONE, {"step": step.name, "key": key, "outputs": outputs})
    shutil.rmtree(place, ignore_errors=True)
    part.replace(place)
    return {role: place / path.name for role, path in made.items()}
