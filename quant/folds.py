"""Students that know some kinds of damage alone, as ``dgiqa-quant leave-out`` judges them.

Only commands import this module, as it joins training to compression.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError
from distill.compute import Compute
from distill.data.leave_out import kinds_of
from distill.models.student import Deployed
from distill.models.trunks import Trunk
from distill.run_folder import RunFolder
from quant.calibration import Views
from quant.export_onnx import export_graph
from quant.fragments_training import Teaching, wanted_of
from quant.head import Features, HeadConfig, refit_
from quant.looks import Looks
from quant.ptq import Int8Recipe, quantize_onnx
from quant.rounded_tensors import ranges_of


@dataclass(frozen=True, slots=True, eq=False)
class Lore:
    """What there is to learn from."""

    looks: Looks
    features: Features
    falls: NDArray[np.float64] | None
    """Logits (N,) of who says how far ladders fall; None where a student's own head does."""

    def without(self, kinds: Sequence[str]) -> Lore:
        """The same but for every ladder that shows one of those kinds, the rest numbered anew.

        Raises :class:`ConfigError` where no ladder is left.
        """
        whole = self.features.labels.ladder
        dropped = {
            int(ladder)
            for (_, record, _), ladder in zip(self.looks.drawn, whole, strict=True)
            if ladder >= 0 and kinds_of(record) & set(kinds)
        }
        kept = np.flatnonzero([int(n) not in dropped for n in whole])
        labels = self.features.labels.at(kept)
        if not (labels.ladder >= 0).any():
            raise ConfigError(f"no ladder is left without {', '.join(kinds)}: give more shards")
        numbers, ladder = np.unique(labels.ladder, return_inverse=True)
        ladder = ladder + min(int(numbers[0]), 0)  # -1, of rated pictures, stays
        labels = replace(labels, ladder=ladder.astype(np.int64))
        features = Features(self.features.of_float[kept], self.features.of_int8[kept], labels)
        looks = Looks([self.looks.drawn[i] for i in kept.tolist()], labels, self.looks.views)
        return Lore(looks, features, None if self.falls is None else self.falls[kept])


@dataclass(frozen=True, slots=True, eq=False)
class RefittedHead:
    """Makes a student by fitting its head."""

    graphs: Sequence[onnx.ModelProto]
    """Float and INT8."""
    settings: HeadConfig

    def __call__(self, lore: Lore, without: Sequence[str]) -> onnx.ModelProto:
        """The INT8 graph with a head that knows what ``lore`` holds."""
        reference, small = (copy.deepcopy(graph) for graph in self.graphs)
        refit_(reference, small, lore.features, self.settings, former=lore.falls)
        return small


@dataclass(frozen=True, slots=True, eq=False)
class TaughtFragments:
    """Makes a student by teaching a fragment trunk and a head beside a trunk that stays."""

    graphs: Sequence[onnx.ModelProto]
    """Float and INT8, of the trunk that stays."""
    trunk: Trunk
    recipe: Int8Recipe
    calibration: Sequence[Views]
    run: Path
    compute: Compute
    about: Mapping[str, Any]
    """What a run that goes on must share."""

    def __call__(self, lore: Lore, without: Sequence[str]) -> onnx.ModelProto:
        """The INT8 graph of one that knows what ``lore`` holds; goes on from its run's folder."""
        head, fragments = self.recipe.head, self.recipe.fragments
        teaching = Teaching(
            lore.looks,
            lore.features,
            wanted_of(self.graphs[0], lore.features, head, fragments, lore.falls),
            settings=(fragments, head),
            folder=RunFolder(self.run / f"without_{without[0]}"),
            compute=self.compute,
            about={**self.about, "the kinds left out": list(without)},
        )
        graph = export_graph(Deployed(teaching.student(self.trunk, None)), lore.looks.views)
        return quantize_onnx(
            graph, self.recipe.quantize, self.calibration, ranges=ranges_of(self.graphs[1])
        )
