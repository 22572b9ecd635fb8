"""One step's pictures and what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from distill.data.shards import LeftOut

Array = TypeVar("Array")
Other = TypeVar("Other")
NO_LADDER = -1


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTargets(Generic[Array]):
    """What a teacher says of N pictures, as they are looked at; NaN where it was not asked."""

    crop_scores: Array
    """float32 (N, K), 0..1: each crop's score."""
    fused: Array
    """float16 (N, C, S, S): its depth-guided features over the picture."""
    pooled: Array
    """float16 (N, D): what its last layer reads."""
    attention: Array
    """float32 (N, S, S), sum 1: how much each place is read where depth asks."""

    def mapped(self, change: Callable[[Array], Other]) -> TeacherTargets[Other]:
        """Every array changed alike."""
        return TeacherTargets(
            change(self.crop_scores),
            change(self.fused),
            change(self.pooled),
            change(self.attention),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Batch(Generic[Array]):
    """Views of N pictures and what is known of each: NaN, weight 0 or -1 where nothing is.

    Arrays are numpy's where a batch is made and torch's where it is learnt from.
    """

    views: dict[str, Array]
    """uint8 (N, H, W, 3) by the view's name."""
    mos: Array
    """float32 (N,), human ratings on 0..1, or NaN."""
    pseudo_mos: Array
    """float32 (N,), full-reference labels on 0..1, or NaN."""
    confidence: Array
    """float32 (N,), how much a pseudo-MOS counts, 0..1."""
    contents: Array
    """int64 (N,): pictures of one number show one scene."""
    ladders: Array
    """int64 (N,): pictures of one number are levels of one ladder; they stand side by side, every
    ladder has as many. ``NO_LADDER`` for all others."""
    levels: Array
    """int64 (N,): within a ladder a higher level is worse."""
    num_ladders: int
    teacher: TeacherTargets[Array] | None = None
    left_out: tuple[LeftOut, ...] = ()
    """Pictures that could not be read: their places are blank and count nothing."""

    def mapped(self, change: Callable[[Array], Other]) -> Batch[Other]:
        """Every array changed alike."""
        return Batch(
            views={name: change(view) for name, view in self.views.items()},
            mos=change(self.mos),
            pseudo_mos=change(self.pseudo_mos),
            confidence=change(self.confidence),
            contents=change(self.contents),
            ladders=change(self.ladders),
            levels=change(self.levels),
            num_ladders=self.num_ladders,
            teacher=None if self.teacher is None else self.teacher.mapped(change),
            left_out=self.left_out,
        )

    def pin_memory(self) -> Batch[Any]:
        """The same in memory that a GPU reads without waiting; arrays must be torch's."""
        pinned: Callable[[Any], Any] = lambda tensor: tensor.pin_memory()  # noqa: E731
        return self.mapped(pinned)

    def with_teacher(self, teacher: TeacherTargets[Array]) -> Batch[Array]:
        """The same pictures with a teacher's targets."""
        return replace(self, teacher=teacher)

    def __repr__(self) -> str:
        """Shapes, not values."""
        shapes = {name: tuple(getattr(view, "shape", ())) for name, view in self.views.items()}
        return f"Batch({shapes}, {self.num_ladders} ladders, teacher={self.teacher is not None})"
