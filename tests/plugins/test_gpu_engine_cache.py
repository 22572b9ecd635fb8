"""plugins.torch_gpu.tensorrt.engine_cache: which engine is taken for what, and why not."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest

pytest.importorskip("torch")

from plugins.torch_gpu.tensorrt.engine_cache import (
    EngineCache,
    EngineKey,
)

KEY = EngineKey("ab" * 32, "fp16", (1, 2, 4, 8), "NVIDIA L4", "8.9", "11.4.0", "2.14.0")


@pytest.fixture
def cache(tmp_path):
    """A folder that is not there yet."""
    return EngineCache(tmp_path / "user" / "engines")


def test_what_is_written_is_found(cache):
    """An engine comes back bit for bit, new lines and zeros in it included, and alone in a folder
    that its owner alone may enter.
    """
    plan = b"\n\0{}\n" * 1000
    assert (cache.find(KEY).plan, cache.find(KEY).reason) == (None, "")
    cache.write(KEY, plan)
    assert cache.find(KEY).plan == plan
    assert [p.suffix for p in cache.folder.iterdir()] == [".engine"]
    if os.name == "posix":
        assert stat.S_IMODE(cache.folder.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "cd" * 32},
        {"precision": "int8"},
        {"buckets": (1, 2, 4)},
        {"gpu": "NVIDIA L40"},
        {"capability": "9.0"},
    ],
)
def test_another_thing_is_another_file(cache, change):
    """Another model, precision, set of batches or GPU leaves the engine where it is."""
    other = dataclasses.replace(KEY, **change)
    cache.write(KEY, b"one")
    assert cache.find(other).plan is None
    cache.write(other, b"two")
    assert (cache.find(KEY).plan, cache.find(other).plan) == (b"one", b"two")


@pytest.mark.parametrize("change", [{"tensorrt": "10.9.0"}, {"torch_tensorrt": "2.15.0"}])
def test_another_version_takes_the_place(cache, change):
    """An engine of other versions is not taken, its versions are told, and the new one replaces it:
    one file.
    """
    cache.write(KEY, b"one")
    other = dataclasses.replace(KEY, **change)
    found = cache.find(other)
    assert found.plan is None
    assert "was built by tensorrt 11.4.0, torch-tensorrt 2.14.0" in found.reason
    cache.write(other, b"two")
    assert (cache.find(other).plan, cache.find(KEY).plan) == (b"two", None)
    assert len(list(cache.folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "no line", "empty", "a list"])
def test_a_damaged_file_is_not_an_engine(cache, damage):
    """A file cut short, with one bit turned, or of something else is never given to the driver."""
    cache.write(KEY, b"plan" * 50)
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-1],
            "bit": whole[:-1] + bytes([whole[-1] ^ 1]),
            "no line": b"\0" * 200_000,
            "empty": b"",
            "a list": b"[1]\n" + b"plan" * 50,
        }[damage]
    )
    found = cache.find(KEY)
    assert (found.plan, found.reason) == (None, f"{path.name} is damaged")


def test_a_file_under_anothers_name_is_not_taken(cache):
    """Renamed to the name of another model's engine, a file is still what it says it is."""
    other = dataclasses.replace(KEY, model_sha256="cd" * 32)
    cache.write(KEY, b"one")
    (path,) = cache.folder.iterdir()
    path.rename(path.with_name(other.file_name))
    found = cache.find(other)
    assert found.plan is None
    assert "of another model or GPU" in found.reason


@pytest.mark.skipif(os.name != "posix", reason="files have owners on POSIX")
def test_a_file_of_another_user_is_not_taken(cache, monkeypatch):
    """An engine is code: what another user put there is not run."""
    cache.write(KEY, b"one")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    found = cache.find(KEY)
    assert found.plan is None
    assert "belongs to another user" in found.reason


def test_a_write_that_fails_leaves_nothing(cache, monkeypatch):
    """A full disk raises OSError and leaves the folder as it was."""
    cache.write(KEY, b"one")

    def full(_self, _content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        cache.write(KEY, b"two")
    monkeypatch.undo()
    assert len(list(cache.folder.iterdir())) == 1
    assert cache.find(KEY).plan == b"one"


def test_the_first_line_says_all_of_the_key(cache):
    """Every field of the key stands in the file, for people."""
    cache.write(KEY, b"one")
    (path,) = cache.folder.iterdir()
    about = json.loads(path.read_bytes().split(b"\n")[0])
    assert about["schema"] == "dgiqa.engine/1"
    assert {k: v for k, v in about.items() if k in dataclasses.asdict(KEY)} == {
        **dataclasses.asdict(KEY),
        "buckets": [1, 2, 4, 8],
    }
