"""An ONNX file, float or INT8, as the runtime serves it."""

from __future__ import annotations

from pathlib import Path

from quant.proof.artefacts import Artefact, TorchSettings, scorer_artefact


def open_artefact(path: Path, _settings: TorchSettings) -> Artefact:
    """See :func:`~quant.proof.artefacts.scorer_artefact`."""
    return scorer_artefact(path)
