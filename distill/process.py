"""The process a command runs in: its memory, and how it was called."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """Threads of this process that become real-time ones in here are ordinary ones again after it.

    Where it may (as root), libsvtav1 makes the thread that opens it, and its own, more urgent than
    everything else on the machine, and leaves it so: two processes then stop all others on two
    cores. Elsewhere than on Linux nothing happens.
    """
    urgent = _real_time_threads()
    try:
        yield
    finally:
        for thread in _real_time_threads() - urgent:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _real_time_threads() -> set[int]:
    """Their numbers, as the kernel has them."""
    found = set()
    for entry in Path("/proc/self/task").iterdir() if sys.platform == "linux" else ():
        with contextlib.suppress(ProcessLookupError):
            if os.sched_getscheduler(int(entry.name)) in (os.SCHED_FIFO, os.SCHED_RR):
                found.add(int(entry.name))
    return found


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
