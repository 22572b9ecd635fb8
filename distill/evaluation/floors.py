"""What a student must reach to be shipped, and the table that says whether it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dgiqa_stream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Floor:
    """A figure of a robustness result and the bounds it must keep, ends included."""

    what: str
    path: str
    """Of the figure below ``sections``, with dots between keys."""
    unit: Literal["share", "points"]
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, value: float) -> bool:
        """Whether the figure itself keeps the bounds; its interval may not."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def bounds(self) -> str:
        """In words."""
        low, high = (
            None if bound is None else _number(bound, self.unit, digits=0)
            for bound in (self.at_least, self.at_most)
        )
        unit = " %" if self.unit == "share" else " points"
        if low is not None and high is not None:
            return f"{low} to {high}{unit}"
        return f"≥ {low}{unit}" if low is not None else f"≤ {high}{unit}"


FLOORS: tuple[Floor, ...] = (
    *(
        Floor(
            f"{name} ladders, steps falling",
            f"codecs.by_codec.{codec}.share_falling",
            "share",
            0.97,
        )
        for codec, name in (("h264", "H.264"), ("h265", "H.265"), ("av1", "AV1"), ("vp9", "VP9"))
    ),
    Floor("all four codecs, steps falling", "codecs.all.share_falling", "share", 0.97),
    *(
        Floor(
            f"clean 1080p above its {name} version at CRF 45",
            f"full_size.by_codec.{codec}.drop_points",
            "points",
            25.0,
        )
        for codec, name in (("h264", "H.264"), ("h265", "H.265"))
    ),
    Floor(
        "damage seen in training, steps falling", "degradations.seen.share_falling", "share", 0.97
    ),
    Floor(
        "damage unseen in training, steps falling",
        "degradations.unseen.share_falling",
        "share",
        0.85,
    ),
    Floor(
        "damage that takes turns at being left out of the head's training, steps falling",
        "leave_out.unseen.share_falling",
        "share",
        0.85,
    ),
    Floor(
        "static scenes, largest standard deviation over frames",
        "static.largest_stdev_points",
        "points",
        at_most=2.0,
    ),
    Floor("shift by one pixel, 95th percentile", "moves.shifts.p95_points", "points", at_most=2.0),
    Floor("rescale by 1 %, 95th percentile", "moves.rescales.p95_points", "points", at_most=2.0),
    *(
        Floor(f"{name} flagged", f"familiarity.groups.{group}.flagged", "share", 0.9)
        for group, name in (
            ("screens", "screens"),
            ("text", "pages of text"),
            ("noise", "pure noise"),
            ("black", "black"),
        )
    ),
    Floor("BIQ2021 validation flagged", "rated.flagged", "share", at_most=0.05),
    Floor(
        "ratings inside the 90 % interval", "rated.intervals.all.share_inside", "share", 0.87, 0.93
    ),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, with its 95 % interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def figure(result: Mapping[str, Any], path: str) -> Figure | None:
    """The figure of a result at a path; None where it was not measured."""
    found: Any = result["sections"]
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return Figure(float(found))
    return Figure(found["value"], found["low"], found["high"])


def with_left_out(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Robustness results, each with what ``dgiqa-quant leave-out`` found of the same model.

    Raises :class:`ConfigError` for a result of another kind, and for one of ``leave-out`` whose
    model is that of no robustness result.
    """
    found = [dict(result) for result in results if result["kind"] == "robustness"]
    for result in results:
        if result["kind"] == "robustness":
            continue
        if result["kind"] != "leave_out":
            raise ConfigError(f"a result of `judge {result['kind']}` has no floors")
        model = result["model"]
        same = [other for other in found if other["model"]["sha256"] == model["sha256"]]
        if not same:
            raise ConfigError(
                f"what was left out is of {model['id']} {model['sha256'][:12]}, of which no "
                "robustness result is given: give that one beside it"
            )
        for other in same:
            other["sections"] = {**other["sections"], "leave_out": result}
    return found


def floors_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each floor, a column for each result, with what is not met in bold.

    Rows that no result measured are left out.
    """
    heads = ["", "floor", *(f"`{r['model']['id']}` {r['model']['version']}" for r in results)]
    lines = [heads, ["---"] * len(heads)]
    for floor in FLOORS:
        found = [figure(result, floor.path) for result in results]
        if any(found):
            lines.append([floor.what, floor.bounds(), *(_cell(floor, f) for f in found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(floor: Floor, found: Figure | None) -> str:
    if found is None:
        return "not measured"
    unit = " %" if floor.unit == "share" else ""
    text = _number(found.value, floor.unit) + unit
    if found.low is not None and found.high is not None:
        text += f" ({_number(found.low, floor.unit)} to {_number(found.high, floor.unit)})"
    return f"{text}, met" if floor.is_met(found.value) else f"**{text}, not met**"


def _number(value: float, unit: str, *, digits: int = 1) -> str:
    return f"{value * (100 if unit == 'share' else 1):.{digits}f}"


_MARKED = re.compile(
    r"^(?P<begin><!-- floors of (?P<names>\S+(?: \S+)*) -->\n)(?P<table>.*?)(?P<end><!-- end -->)$",
    re.MULTILINE | re.DOTALL,
)


def with_tables(text: str, read: Callable[[str], Mapping[str, Any]]) -> str:
    """A page whose every ``<!-- floors of NAME.json ... -->`` to ``<!-- end -->`` is made anew.

    ``read`` gives the result of a file's name. Raises :class:`ConfigError` where the page has no
    such place.
    """
    if not _MARKED.search(text):
        raise ConfigError(
            "the page has no place for a table: write <!-- floors of RESULT.json --> and, lines "
            "below, <!-- end -->"
        )

    def made_anew(match: re.Match[str]) -> str:
        table = floors_table(with_left_out([read(name) for name in match["names"].split()]))
        return f"{match['begin']}\n{table}\n{match['end']}"

    return _MARKED.sub(made_anew, text)
