"""A TensorRT engine, where there is TensorRT and a GPU of the kind it was built for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dgiqa_stream.errors import BackendUnavailable
from quant.proof.artefacts import Artefact, TorchSettings


def open_artefact(path: Path, _settings: TorchSettings) -> Artefact:
    """Raises :class:`BackendUnavailable` where engines cannot run."""
    if importlib.util.find_spec("tensorrt") is None:
        raise BackendUnavailable(
            f"{path.name} is a TensorRT engine and TensorRT is not installed: pip install tensorrt "
            "on a machine with the GPU it was built for, or compare the .onnx it was built from"
        )
    raise BackendUnavailable(
        f"{path.name} is a TensorRT engine, which only the GPU it was built for can run, and no "
        "backend here opens one: compare the .onnx it was built from"
    )
