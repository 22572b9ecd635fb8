"""The process a command runs in: its memory, and how it was called."""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from pathlib import Path

_MALLOPT = {"trim_threshold": -1, "top_pad": -2, "mmap_threshold": -3}  # glibc's malloc.h
_KEEP_BYTES = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed: activations of a step are the next step's.

    Returning them to the kernel and faulting them in again took 40 % of a training step on two
    cores. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for what in ("mmap_threshold", "trim_threshold"):
        mallopt(_MALLOPT[what], _KEEP_BYTES)
    mallopt(_MALLOPT["top_pad"], 256 << 20)


def use_threads(threads: int) -> None:
    """Compute with so many threads, 0 for all cores, and keep the memory between steps."""
    import cv2
    import torch

    keep_freed_memory()
    cv2.setNumThreads(1)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def command_line() -> str:
    """This command, with folders reduced to their names: a result must not carry machine paths."""
    program = Path(sys.argv[0])
    name = f"dgiqa-{program.parent.name}" if program.name == "cli.py" else program.name
    words = [name, *sys.argv[1:]]
    return shlex.join(_without_folders(word) for word in words)


def _without_folders(word: str) -> str:
    """``/a/b`` to ``b`` and ``--packs=/a/b`` to ``--packs=b``; other words as they are."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return option + equals + (Path(value).name if value.startswith(("/", "..")) else value)
