"""Which device torch is to use, and why not another."""

from __future__ import annotations

import re

import torch

from dgiqa_stream.errors import BackendUnavailable, ConfigError


def device_of(wanted: str) -> tuple[torch.device, str]:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` comes to, and why it is no GPU.

    Raises :class:`BackendUnavailable` where a GPU is asked for by name and is not usable: only
    ``auto`` falls back.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise ConfigError(f"unknown device {wanted!r}; known here: auto, cpu, cuda, cuda:N")
    if wanted == "cpu":
        return torch.device("cpu"), ""
    reason = why_no_cuda()
    if wanted == "auto":
        return torch.device("cpu" if reason else "cuda:0"), reason
    if reason:
        raise BackendUnavailable(f"device {wanted!r}: {reason}; or use --device cpu")
    number = int(wanted.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device {wanted!r}: there are {torch.cuda.device_count()} CUDA devices, numbered "
            "from 0"
        )
    return torch.device("cuda", number), ""


def why_no_cuda() -> str:
    """Empty where torch can use a CUDA device; else why it cannot, and what to do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one of pytorch.org's"
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as exc:  # no driver, or one too old for this torch
        return f"torch {torch.__version__} finds no CUDA device: {str(exc).splitlines()[0]}"
    return f"torch {torch.__version__} finds no CUDA device"
