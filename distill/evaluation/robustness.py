"""Whether a student is worth shipping: ladders, stability, familiarity and intervals, in one go.

Everything goes through the runtime's scorer, and no picture was seen in training. Sections that
the given data do not allow are named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgiqa_stream.correlation import srcc
from dgiqa_stream.scorer import Scorer
from distill.data.biq2021 import RatedPicture, load_biq2021
from distill.data.build import read_named
from distill.evaluation.agreement import estimate
from distill.evaluation.codec_ladders import LADDER_CODECS, judge_codecs, judge_full_size
from distill.evaluation.degradation_ladders import (
    degradation_scores,
    left_out_of_training,
    picture_kinds,
    refuse_unknown,
    sum_up_degradations,
)
from distill.evaluation.familiarity import (
    flagged_of,
    has_flag,
    judge_familiarity,
    predictions,
    screen_paths,
)
from distill.evaluation.finished import FinishedParts
from distill.evaluation.interval_coverage import judge_intervals
from distill.evaluation.ladders import TOLERANCE_POINTS
from distill.evaluation.pictures import rounded
from distill.evaluation.small_moves import judge_small_moves
from distill.evaluation.static_scenes import judge_static_scenes
from distill.evaluation.unseen import read_unseen, unseen_paths
from distill.say import say

SECTIONS = ("codecs", "full_size", "degradations", "static", "moves", "familiarity", "rated")


@dataclass(frozen=True, slots=True)
class RobustnessRequest:
    """What to judge on."""

    pristine: tuple[Path, ...]
    """Folders of clean pictures: those of the test split are judged on."""
    full_size: Path | None = None
    """Folder of the same pictures at a size that holds 1080p windows."""
    biq2021: Path | None = None
    num_validation: int = 1000
    seed: int = 1
    """Of the draw of BIQ2021's validation part, as in the recipe."""
    num_contents: int = 24
    contents_per_kind: int = 12
    num_scenes: int = 6
    kinds: tuple[str, ...] | None = None
    """Degradations to judge; all that a picture can have where None."""
    unseen: tuple[str, ...] = ()
    """Kinds that training left out, beside those that the model's manifest names."""

    def settings(self) -> dict[str, Any]:
        """Without folders: what must be equal for two runs to be one."""
        found = asdict(self)
        del found["unseen"]  # is only about summing up
        for name in ("pristine", "full_size", "biq2021"):
            found[name] = bool(found[name])
        return found


def judge_robustness(
    scorer: Scorer,
    request: RobustnessRequest,
    *,
    result: Path,
    sections: tuple[str, ...] = SECTIONS,
) -> dict[str, Any]:
    """Every section that the data allow, ready for JSON; ``result`` is where it will be written.

    An interrupted run is taken up by the next with the same model, settings and pictures. Raises
    ``ConfigError`` for unknown kinds and ``FileNotFoundError`` where no unseen picture is given.
    """
    paths = unseen_paths(request.pristine, number=request.num_contents)
    kinds = request.kinds or tuple(picture_kinds())
    refuse_unknown(kinds, among=picture_kinds())
    refuse_unknown(request.unseen, among=kinds)  # now, not after ten minutes
    if request.full_size is not None and "full_size" in sections:
        unseen_paths([request.full_size])  # likewise
    left_out = left_out_of_training(scorer.manifest.history)
    unseen = {*request.unseen, *(kind for kind in left_out if kind in kinds)}
    judge = _Judge(scorer, request, paths, kinds, tuple(sorted(unseen)))
    model = {"id": scorer.manifest.id, "version": scorer.manifest.version}
    model |= {"precision": scorer.manifest.precision, "sha256": scorer.manifest.sha256}
    about = {
        "model": model,
        "settings": request.settings(),
        "contents": [path.stem for path in paths],
    }
    done = FinishedParts(result, about)
    found: dict[str, Any] = {}
    not_measured: dict[str, str] = {}
    refuse_unknown(sections, among=SECTIONS)
    for name in SECTIONS:
        why = judge.why_not(name) if name in sections else "not asked for"
        if why:
            not_measured[name] = why
            say(f"{name}: left out: {why}")
            continue
        found[name] = done.part(name, partial(_timed, judge.sections()[name], name))
    if "degradations" in found:
        found["degradations"] = judge.summed(found)
    return {
        "kind": "robustness",
        **about,
        "unseen_kinds": list(judge.unseen),
        "tolerance_points": TOLERANCE_POINTS,
        "left_out": not_measured,
        "sections": found,
    }


def _timed(make: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    began = time.process_time()
    made = rounded(make())
    say(f"{name}: {time.process_time() - began:.0f} s of CPU")
    return {**made, "cpu_seconds": round(time.process_time() - began, 1)}


@dataclass(frozen=True, slots=True)
class _Judge:
    scorer: Scorer
    request: RobustnessRequest
    paths: list[Path]
    kinds: tuple[str, ...]
    unseen: tuple[str, ...]

    def sections(self) -> Mapping[str, Callable[[], dict[str, Any]]]:
        """Name to what measures it."""
        return {
            "codecs": self._codecs,
            "full_size": self._full_size,
            "degradations": self._degradations,
            "static": self._static,
            "moves": self._moves,
            "familiarity": self._familiarity,
            "rated": self._rated,
        }

    def why_not(self, name: str) -> str:
        """Why a section cannot be judged; empty where it can."""
        if name == "full_size" and self.request.full_size is None:
            return "no --full-size pictures for 1080p sources"
        if name == "rated" and self.request.biq2021 is None:
            return "no --biq2021"
        return ""

    def _codecs(self) -> dict[str, Any]:
        made = asdict(judge_codecs(self.scorer, map(read_unseen, self.paths)))
        return {**made, "scores": _hundredths(made["scores"])}

    def _full_size(self) -> dict[str, Any]:
        assert self.request.full_size is not None
        paths = unseen_paths([self.request.full_size], number=self.request.num_contents)
        made = asdict(judge_full_size(self.scorer, paths))
        return {**made, "scores": _hundredths(made["scores"])}

    def _degradations(self) -> dict[str, Any]:
        """The four codecs have ladders of their own, on every content."""
        scores = degradation_scores(
            self.scorer,
            self.paths,
            kinds=[kind for kind in self.kinds if kind not in LADDER_CODECS],
            contents_per_kind=self.request.contents_per_kind,
        )
        return {"scores": _hundredths(scores)}

    def summed(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The degradations with the codecs among them: by kind, seen and unseen, and all."""
        measured = found["degradations"]
        coded = found.get("codecs", {}).get("scores", {})
        scores = {**{k: coded[k] for k in self.kinds if k in coded}, **measured["scores"]}
        summary = rounded(asdict(sum_up_degradations(scores, left_out=self.unseen)))
        return {**summary, **measured}

    def _static(self) -> dict[str, Any]:
        few = unseen_paths(self.request.pristine, number=self.request.num_scenes)
        return asdict(judge_static_scenes(self.scorer, few))

    def _moves(self) -> dict[str, Any]:
        return asdict(judge_small_moves(self.scorer, self.paths))

    def _familiarity(self) -> dict[str, Any]:
        screens = screen_paths(self.request.pristine)
        return asdict(judge_familiarity(self.scorer, screens=screens, photographs=self.paths))

    def _rated(self) -> dict[str, Any]:
        assert self.request.biq2021 is not None
        rated = [
            picture
            for picture in load_biq2021(
                self.request.biq2021,
                num_validation=self.request.num_validation,
                seed=self.request.seed,
            )
            if picture.split == "validation"
        ]
        return judge_rated(self.scorer, rated)


def judge_rated(scorer: Scorer, rated: list[RatedPicture]) -> dict[str, Any]:
    """Agreement, flags and, where the model has them, intervals on rated pictures."""
    found = list(predictions(scorer, (read_named(r.path) for r in rated)))
    mos = np.array([100 * r.mos for r in rated])
    made: dict[str, Any] = {
        "split": "validation",
        "srcc": asdict(estimate(srcc, [p.score for p in found], mos)),
        **asdict(flagged_of(found, has_flag=has_flag(scorer))),
        "intervals": None,
    }
    promised = scorer.manifest.interval
    if promised is not None:
        intervals = [p.interval for p in found if p.interval is not None]
        made["intervals"] = asdict(judge_intervals(mos, intervals, nominal=promised.coverage))
    return made


def _hundredths(scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Scores for a file: finer than that they say nothing, and there are thousands."""
    return {
        kind: {name: [round(s, 2) for s in ladder] for name, ladder in by_content.items()}
        for kind, by_content in scores.items()
    }
