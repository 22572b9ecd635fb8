"""A checkpoint of a training run, as torch computes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.preprocess import make_batch
from dgiqa_stream.types import Planes
from distill.models.student import Deployed
from quant.low_rank.student import open_student
from quant.proof.agreement import Scores
from quant.proof.artefacts import Artefact, TorchSettings, sha256_of
from quant.qat import snap_weights_


def open_artefact(path: Path, settings: TorchSettings) -> Artefact:
    """The student of a ``best.pt``, or of what ``factorize`` wrote.

    Raises :class:`ConfigError` without its views and :class:`ModelError` for other files.
    """
    views = settings.views
    if views is None:
        raise ConfigError(f"{path.name} does not tell its views: add --recipe, of its training")
    model = Deployed(open_student(path)[0]).eval()
    if settings.snap_weights:
        snap_weights_(model)

    def predict(pictures: Sequence[Planes]) -> Scores:
        cut = make_batch(pictures, views).views
        with torch.no_grad():
            quality = model(*(torch.from_numpy(cut[view.name]) for view in views))
        return np.asarray(100 * quality.double().squeeze(1).numpy())

    return Artefact(path.name, "torch", sha256_of(path), predict)
