"""A TensorRT engine: told apart, and refused with what to do instead."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dgiqa_stream.errors import BackendUnavailable
from quant.proof.artefacts import Artefact, TorchSettings


def open_artefact(path: Path, _settings: TorchSettings) -> Artefact:
    """Raises :class:`BackendUnavailable`: nothing here runs an engine yet."""
    if importlib.util.find_spec("tensorrt") is None:
        raise BackendUnavailable(
            f"{path.name} is a TensorRT engine and TensorRT is not installed: pip install tensorrt "
            "on a machine with the GPU it was built for, or compare the .onnx it was built from"
        )
    raise BackendUnavailable(
        f"{path.name} is a TensorRT engine, which only the GPU it was built for can run, and no "
        "backend here opens one: compare the .onnx it was built from"
    )
