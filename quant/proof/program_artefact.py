"""A ``.pt2`` program of ``dgiqa-quant program``, as torch runs it on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dgiqa_stream.preprocess import make_batch
from dgiqa_stream.types import Planes
from quant.export_program import load_program
from quant.proof.agreement import Scores
from quant.proof.artefacts import Artefact, TorchSettings


def open_artefact(path: Path, _settings: TorchSettings) -> Artefact:
    """Raises as :func:`~quant.export_program.load_program`."""
    exported, manifest = load_program(path)
    module = exported.module()
    views = manifest.preprocess.views

    def predict(pictures: Sequence[Planes]) -> Scores:
        cut = make_batch(pictures, views).views
        with torch.no_grad():
            found = module(*(torch.from_numpy(cut[view.name]) for view in views))
        quality = found[0] if isinstance(found, tuple | list) else found  # (N, 1), first of all
        return np.array([manifest.output.mapping(float(raw)) for raw in quality.reshape(-1)])

    return Artefact(path.name, f"torch program {manifest.precision}", manifest.sha256, predict)
