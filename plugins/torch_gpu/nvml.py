"""What the driver tells of a GPU: load, memory, temperature, power; needs ``nvidia-ml-py``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

_FRESH_SECONDS = 1.0


def device_status(number: int, *, uuid: str = "") -> dict[str, Any]:
    """Of one CUDA device, by NVML; what this device or driver does not tell is None.

    NVML's numbers are the driver's, which ``CUDA_VISIBLE_DEVICES`` does not change: ``uuid``, where
    it is given, finds the device. Raises ``RuntimeError`` with NVML's reason where there is no
    driver or device, ``ImportError`` without the package.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            by_uuid = pynvml.nvmlDeviceGetHandleByUUID
            handle = by_uuid(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(number)
            return _status(pynvml, handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as exc:
        raise RuntimeError(f"NVML: {exc}") from exc


class DeviceWatch:
    """What NVML last told of one device, asked again after a second. Thread-safe.

    While one thread asks, others are told what was known before: none waits for the driver. A
    device that cannot be asked, for want of the package, of the driver or of itself, tells nothing:
    telemetry must not end what it watches.
    """

    def __init__(
        self, ask: Callable[[], dict[str, Any]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``ask`` is :func:`device_status` of the device; nothing is asked yet."""
        self._ask, self._clock = ask, clock
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._known: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        """Facts by name; empty where nothing is told."""
        if self._lock.acquire(blocking=False):
            try:
                if self._clock() - self._asked_at >= _FRESH_SECONDS:
                    self._asked_at = self._clock()
                    self._known = self._ask()
            except (ImportError, RuntimeError):
                self._known = {}
            finally:
                self._lock.release()
        return self._known


def _status(pynvml: Any, handle: Any) -> dict[str, Any]:
    def told(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except pynvml.NVMLError:
            return None

    memory = told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    load = told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    decoder = told(lambda: pynvml.nvmlDeviceGetDecoderUtilization(handle))
    power = told(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    return {
        "name": told(lambda: pynvml.nvmlDeviceGetName(handle)),
        "driver": told(pynvml.nvmlSystemGetDriverVersion),
        "load_percent": load and load.gpu,
        "decoder_load_percent": decoder and decoder[0],
        "used_bytes": memory and memory.used,
        "total_bytes": memory and memory.total,
        "temperature_celsius": told(
            lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
        "power_watts": None if power is None else power / 1000,
        "sm_clock_mhz": told(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
    }
