"""What the driver tells of a GPU: load, memory, temperature, power; needs ``nvidia-ml-py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def device_status(number: int) -> dict[str, Any]:
    """Of one CUDA device, by NVML; what this device or driver does not tell is None.

    Raises ``RuntimeError`` with NVML's reason where there is no driver, ``ImportError`` without the
    package.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        raise RuntimeError(f"NVML: {exc}") from exc
    try:
        return _status(pynvml, pynvml.nvmlDeviceGetHandleByIndex(number))
    except pynvml.NVMLError as exc:
        raise RuntimeError(f"NVML: {exc}") from exc
    finally:
        pynvml.nvmlShutdown()


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
