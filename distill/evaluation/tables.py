"""What goes in and out of an evaluation: rated files as CSV, a JSON result, a markdown table."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dgiqa_stream.errors import ConfigError
from distill.data.datasets import RatedItem
from distill.data.label_files import HOW_TO_GO_ON, Missing
from distill.evaluate import provenance
from distill.evaluation.floors import floors_table
from distill.say import say

_REQUIRED = ("path", "mos")


def read_table(
    table: Path, *, worst: float = 0.0, best: float = 1.0, missing: Missing = "refuse"
) -> list[RatedItem]:
    """Rated files of a CSV with the columns ``path`` and ``mos``.

    ``name`` (else the path), ``content`` (else the name), ``degradation``, ``level`` and ``split``
    may be there; paths are relative to the table. ``worst`` and ``best`` are the ends of its MOS;
    worst may be above best. ``missing`` says what to do where a path has no file. Raises
    ``ValueError`` naming the line that cannot be right, and ``FileNotFoundError`` naming the files
    that are missing.
    """
    if worst == best:
        raise ConfigError(f"MOS from {worst} to {best} has no span: give its worst and best value")
    with table.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        lacking = [c for c in _REQUIRED if c not in (rows.fieldnames or [])]
        if lacking:
            raise ValueError(f"{table.name} has no column {lacking}: needed are {list(_REQUIRED)}")
        items = [_item(table, number, row, worst, best) for number, row in enumerate(rows, 2)]
    absent = [item for item in items if not item.path.is_file()]
    told = f"{len(absent)} of {len(items)} files of {table.name} are not there, first "
    if absent and (missing == "refuse" or len(absent) == len(items)):
        raise FileNotFoundError(
            f"{told}{absent[0].path.name!r}: paths are relative to the table. {HOW_TO_GO_ON}"
        )
    if absent:
        say(f"{told}{absent[0].path.name!r}: left out")
    twice = [name for name, times in Counter(item.name for item in items).items() if times > 1]
    if twice:
        raise ValueError(f"{table.name} names {twice[0]!r} more than once")
    gone = {item.name for item in absent}
    return [item for item in items if item.name not in gone]


def _item(
    table: Path, number: int, row: Mapping[str, str | None], worst: float, best: float
) -> RatedItem:
    def text(column: str) -> str:
        return (row.get(column) or "").strip()

    try:
        mos = (float(text("mos")) - worst) / (best - worst)
        level = int(text("level")) if text("level") else None
    except ValueError as exc:
        raise ValueError(f"{table.name}, line {number}: {exc}") from exc
    if not text("path") or not 0.0 <= mos <= 1.0:
        raise ValueError(
            f"{table.name}, line {number}: needs a path, and a mos within {worst}..{best}, not "
            f"{text('mos')!r}"
        )
    name = text("name") or text("path")
    return RatedItem(
        name=name,
        path=table.parent / text("path"),
        content=text("content") or name,
        mos=mos,
        mos_std=None,
        split=text("split") or "test",
        degradation=text("degradation"),
        level=level,
    )


def write_result(result: Mapping[str, Any], path: Path, *, command: str) -> None:
    """JSON with the versions and the command that made it; written beside, then renamed."""
    made = provenance(command)
    for package in ("scipy", "torch"):
        try:
            made["packages"][package] = version(package)
        except PackageNotFoundError:
            made["packages"][package] = "not installed"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({**made, **result}, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read_result(path: Path) -> dict[str, Any]:
    """A result that :func:`write_result` wrote; raises ``ValueError`` for anything else."""
    try:
        result: Any = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ValueError(f"{path.name} is no JSON: {exc}") from exc
    if not isinstance(result, dict) or result.get("kind") not in _MARKDOWN:
        raise ValueError(f"{path.name} is no result of an evaluation of {sorted(_MARKDOWN)}")
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result, made from its JSON alone, with the command that made it."""
    made = f"Made by `{result['command']}`." if "command" in result else ""
    lines = _MARKDOWN[result["kind"]](result)
    return "\n".join([*lines, *([made] if made else [])]).rstrip() + "\n"


def _pictures(result: Mapping[str, Any]) -> list[str]:
    rows, ladders = [], []
    for name, found in result["models"].items():
        rows.append([name, "all", *_figures(found["agreement"])])
        rows += [[name, kind, *_figures(a)] for kind, a in found["degradations"].items()]
        ladders += [[name, *_ladder(row)] for row in found["ladders"]]
    lines = [f"**{result['set']}**, {result['num_pictures']} pictures, 95 % intervals", ""]
    lines += _table(["model", "degradation", *_HEADS], rows)
    if ladders:
        heads = ["model", "degradation", "in training", "ladders", "steps falling", "drop, points"]
        lines += _table(heads, ladders)
    if result["differences"]:
        pairs = [
            [name, _estimate(d["srcc"]), f"{d['p_value']:.3f}"]
            for name, d in result["differences"].items()
        ]
        lines += _table(["difference", "SRCC", "p"], pairs)
    return lines + _left_out(result)


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """A line of what was not judged, where there is any; older results do not say."""
    names = list(result.get("left_out", ()))
    return [f"Left out: {', '.join(names)}.", ""] if names else []


def _clips(result: Mapping[str, Any]) -> list[str]:
    rows = [[pooler, *_figures(found)] for pooler, found in result["poolers"].items()]
    lines = [f"**{result['set']}**, {result['num_clips']} clips, 95 % intervals", ""]
    lines += _table(["pooling", *_HEADS], rows)
    return lines + _left_out(result)


def _robustness(result: Mapping[str, Any]) -> list[str]:
    """The floors, then every ladder: those say where a share comes from."""
    sections = result["sections"]
    found = {
        **sections.get("codecs", {}).get("by_codec", {}),
        **sections.get("degradations", {}).get("by_kind", {}),
    }
    lines = [f"**{result['model']['id']}** {result['model']['version']}, 95 % intervals", ""]
    lines += [floors_table([result])]
    if found:
        lines += _table(_FALLS, [_fall(name, row) for name, row in found.items()])
    return lines + [f"Not measured: {name}: {why}." for name, why in result["left_out"].items()]


def _leave_out(result: Mapping[str, Any]) -> list[str]:
    """Every kind of damage, and together those that the head of their turn was not taught."""
    rows = [_fall(name, row) for name, row in result["by_kind"].items()]
    rows.append(_fall("all that the trunk did not know", result["unseen"]))
    return [f"**{result['model']['id']}**, 95 % intervals", "", *_table(_FALLS, rows)]


def _fall(name: str, row: Mapping[str, Any]) -> list[str]:
    seen = {True: "yes", False: "no", None: ""}[row["in_training"]]
    share = row["share_falling"]
    shown = f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    return [name, seen, str(row["num_contents"]), shown, f"{row['drop_points']['value']:.1f}"]


_MARKDOWN = {
    "pictures": _pictures,
    "clips": _clips,
    "robustness": _robustness,
    "leave_out": _leave_out,
}
_FALLS = ["ladder", "in training", "contents", "steps falling", "drop, points"]
_HEADS = ["n", "SRCC", "PLCC (logistic 4)", "PLCC (logistic 5)", "KRCC", "RMSE (logistic 5)"]


def _figures(found: Mapping[str, Any]) -> list[str]:
    curves = found["curves"]
    marks = {k: "" if curves[k]["converged"] else " †" for k in ("logistic4", "logistic5")}
    return [
        str(found["num_pictures"]),
        _estimate(found["srcc"]),
        _estimate(found["plcc_logistic4"]) + marks["logistic4"],
        _estimate(found["plcc_logistic5"]) + marks["logistic5"],
        _estimate(found["krcc"]),
        _estimate(found["rmse_logistic5"]) + marks["logistic5"],
    ]


def _estimate(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "–"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _ladder(row: Mapping[str, Any]) -> list[str]:
    seen = {True: "yes", False: "no", None: "both"}[row["in_training"]]
    share, drop = f"{100 * row['share_falling']:.1f} %", f"{row['mean_drop_points']:.1f}"
    return [row["degradation"], seen, str(row["num_ladders"]), share, drop]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    text = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
    ]
    if any(cell.endswith("†") for row in rows for cell in row):
        text += ["", "† a straight line: the logistic did not converge"]
    return [*text, ""]
