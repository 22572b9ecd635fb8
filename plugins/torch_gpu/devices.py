"""Which devices torch is to use, why not others, and which of them were lost."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dgiqa_stream.backends import refuse_unknown_device
from dgiqa_stream.errors import BackendUnavailable, ConfigError, DeviceLost, FrameLost

Result = TypeVar("Result")

_FAULTS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "NVRTC error")
_lock = threading.Lock()
_in_use: Counter[int] = Counter()  # numbers of CUDA devices: backends that score there
_lost: dict[int, str] = {}  # number of a CUDA device: why it is of no use to this process any more


def device_of(wanted: str) -> tuple[torch.device, str]:
    """The first of :func:`devices_of`, and why it is no GPU."""
    found, reason = devices_of(wanted)
    return found[0], reason


def devices_of(wanted: str) -> tuple[tuple[torch.device, ...], str]:
    """The devices that ``wanted`` comes to, and why there is no GPU among them.

    ``auto`` is the first GPU, or else the CPU; ``cuda`` all GPUs that the process sees; ``cuda:N``,
    or several with commas between, those. Raises :class:`BackendUnavailable` where a GPU is asked
    for by name and is not usable: only ``auto`` falls back.
    """
    refuse_unknown_device(wanted)
    if wanted == "cpu":
        return (torch.device("cpu"),), ""
    reason = why_no_cuda()
    if wanted == "auto":
        reason = reason or why_lost(0)
        return (torch.device("cpu" if reason else "cuda:0"),), reason
    if reason:
        raise BackendUnavailable(f"device {wanted!r}: {reason}; or use --device cpu")
    numbers = numbers_of(wanted, torch.cuda.device_count())
    for number in numbers:
        if why := why_lost(number):
            raise BackendUnavailable(f"device {wanted!r}: {why}; start this program again")
    return tuple(torch.device("cuda", number) for number in numbers), ""


def numbers_of(wanted: str, num_devices: int) -> tuple[int, ...]:
    """The CUDA devices that ``cuda`` or ``cuda:N,cuda:M`` names, of those that there are."""
    if wanted == "cuda":
        return tuple(range(num_devices))
    numbers = tuple(int(name.partition(":")[2]) for name in wanted.split(","))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"device {wanted!r} names one device twice: name each once")
    if max(numbers) >= num_devices:
        raise BackendUnavailable(
            f"device {wanted!r}: there are {num_devices} CUDA devices, numbered from 0"
        )
    return numbers


def why_no_cuda() -> str:
    """Empty where torch can use a CUDA device; else why it cannot, and what to do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one of pytorch.org's"
    with warnings.catch_warnings():  # of a driver that is too old: it is told below, in a line
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as exc:  # no driver, or one too old for this torch
        return f"torch {torch.__version__} finds no CUDA device: {str(exc).splitlines()[0]}"
    return f"torch {torch.__version__} finds no CUDA device"


def shares_memory(device: torch.device) -> bool:
    """Whether the device works in the CPU's own memory, as on a Jetson: page-locked copies are
    then for nothing.
    """
    if device.type != "cuda":
        return True
    return bool(torch.cuda.get_device_properties(device).is_integrated)


def uuid_of(device: torch.device) -> str:
    """By which NVML knows a CUDA device; empty where torch does not tell."""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def note_use(device: torch.device, change: int) -> None:
    """One backend more, or fewer, scores on a device."""
    if device.type == "cuda":
        with _lock:
            _in_use[device.index or 0] += change


def numbers_in_use() -> tuple[int, ...]:
    """The CUDA devices that score now, but for those that are lost; the first, where none does.

    Where all are lost it is those: who asks for one is then told why not.
    """
    with _lock:
        used = sorted(n for n, count in _in_use.items() if count > 0)
        return tuple(n for n in used if n not in _lost) or tuple(used) or (0,)


# A device that fails ---------------------------------------------------------------------------


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether torch's allocator, or CUDA itself, had too little left."""
    is_cudas = isinstance(exc, RuntimeError) and "CUDA error: out of memory" in str(exc)
    return isinstance(exc, torch.OutOfMemoryError) or is_cudas


def is_fault(exc: BaseException) -> bool:
    """Whether the device, its driver or its libraries failed, and not the program or the memory."""
    if is_out_of_memory(exc) or not isinstance(exc, RuntimeError):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)  # torch 2.8 on
    if accelerator_error is not None and isinstance(exc, accelerator_error):
        return True
    return any(word in str(exc) for word in _FAULTS)


def note_loss(device: torch.device, reason: str) -> None:
    """This process can use the device no more: an error in its CUDA context stays there."""
    if device.type == "cuda":
        with _lock:
            _lost.setdefault(device.index or 0, reason)


def why_lost(number: int) -> str:
    """Empty while a CUDA device is in use or could be; else why it no longer is."""
    with _lock:
        reason = _lost.get(number, "")
    return f"cuda:{number} was lost while running ({reason})" if reason else ""


def twice(device: torch.device, call: Callable[[], Result]) -> Result:
    """What a call gives; after a fault it is made once more, and after another the device is lost.

    Raises :class:`DeviceLost` then, and whatever else the call raises.
    """
    try:
        return call()
    except RuntimeError as exc:
        if not is_fault(exc):
            raise
    try:
        return call()
    except RuntimeError as exc:
        if not is_fault(exc):
            raise
        told = " ".join(str(exc).split())[:200]
        note_loss(device, told)
        raise DeviceLost(f"{device} was lost while running: {told}") from exc


def on_cpu(tensor: Tensor) -> Tensor:
    """The tensor in memory; raises :class:`FrameLost` where its device is lost."""
    try:
        return twice(tensor.device, tensor.cpu)
    except DeviceLost as exc:
        raise FrameLost(f"a picture cannot be read any more: {exc}") from exc
