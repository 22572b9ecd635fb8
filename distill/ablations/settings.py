"""How large an ablation is and where its data lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What the comparisons of a run have in common."""

    pack: Path
    """The rated pack of ``dgiqa-distill data``: its training and validation parts."""
    backbone: Path
    """MobileNetV2, ``.npz``."""
    cache: Path
    """Folder that keeps frozen features."""
    num_train: int = 3000
    num_validation: int = 1000
    num_crops: int = 2
    num_seeds: int = 3
    num_epochs: int = 8
    batch: int = 64
    rate: float = 1e-3
    seed: int = 1
    """Of the choice of pictures and crops; runs differ by their own seeds."""
