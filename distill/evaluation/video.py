"""Rated clips through the runtime's pipeline: which temporal pooling agrees best with people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgiqa_stream.config import StreamConfig
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.pooling import POOLERS
from dgiqa_stream.scorer import Scorer
from distill.data.datasets import RatedItem
from distill.evaluation.agreement import NUM_RESAMPLES, agreement
from distill.evaluation.pictures import as_json


@dataclass(frozen=True, slots=True)
class ScoredClip:
    """A rated clip and what every pooler made of its frame scores."""

    name: str
    mos: float
    """As rated, 0..1."""
    num_frames: int
    """Frames that were scored."""
    pool: Mapping[str, float | None]
    """Pooler to value on 0..100, over the whole clip; None where it is not defined."""
    error: str = ""
    """Why the clip, or the rest of it, could not be scored; without its folder."""


def score_clips(
    items: Sequence[RatedItem],
    scorer: Scorer,
    *,
    config: StreamConfig | None = None,
    on_clip: Callable[[ScoredClip], None] = lambda clip: None,
) -> list[ScoredClip]:
    """Watch each clip to its end as the monitor would; a clip that fails says so and is kept."""
    found = []
    for item in items:
        monitor = Monitor(str(item.path), stream="clip", config=config, scorer=scorer)
        result = monitor.run()
        session = result.session
        clip = ScoredClip(
            name=item.name,
            mos=item.mos,
            num_frames=session.num_frames if session else 0,
            pool=session.pool if session else dict.fromkeys(POOLERS),
            error=str(result.error or "").replace(str(item.path), item.path.name),
        )
        on_clip(clip)
        found.append(clip)
    return found


def judge_clips(
    clips: Sequence[ScoredClip],
    *,
    set_name: str,
    mos_span: float = 1.0,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement of every pooler of ``POOLERS`` with MOS, on one set of clips, ready for JSON.

    Clips that failed or gave no score are named and left out for every pooler alike. Of ``stdev``
    more is worse, so its SRCC is negative where it says something. Raises ``ValueError`` where
    fewer than five clips are left.
    """
    whole = [c for c in clips if not c.error and all(c.pool.get(p) is not None for p in POOLERS)]
    left_out = {c.name: c.error or "nothing was scored" for c in clips if c not in whole}
    mos = np.array([c.mos for c in whole]) * mos_span
    return {
        "kind": "clips",
        "set": set_name,
        "num_clips": len(whole),
        "num_frames": sum(c.num_frames for c in whole),
        "left_out": left_out,
        "mos_span": mos_span,
        "num_resamples": num_resamples,
        "seed": seed,
        "poolers": {
            pooler: as_json(
                agreement(
                    np.array([c.pool[pooler] for c in whole], np.float64),
                    mos,
                    num_resamples=num_resamples,
                    seed=seed,
                )
            )
            for pooler in POOLERS
        },
        "pooled": {
            c.name: {pooler: round(float(c.pool[pooler] or 0.0), 3) for pooler in POOLERS}
            for c in whole
        },
    }
