"""README's tables, made from what was measured.

    python benchmarks/tables.py             # writes them anew; or those named: cost peers
    python benchmarks/tables.py --check     # exit 1 where they are not what the results give

Between ``<!-- figures of NAME -->`` and ``<!-- end -->`` nothing is written by hand: ``model``
comes from ``distill/results/student-VERSION.json`` of the version that is shipped, ``cost`` and
``peers`` from ``benchmarks/results``. What was not measured has no row.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dgiqa_stream.manifest import ModelManifest, load_model

ROOT = Path(__file__).parents[1]
_SHIPPED, _FLOAT = "student", "student-fp32"
_EVERY_FRAME = ("score_every_frame", "score_every_frame_moving")
_MARKED = re.compile(
    r"^(?P<begin><!-- figures of (?P<name>\w+) -->\n)(?P<table>.*?)(?P<end><!-- end -->)$",
    re.MULTILINE | re.DOTALL,
)
Result = Mapping[str, Any]
Row = Sequence[str]


class Results:
    """Reads results below a checkout."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def benchmark(self, name: str) -> Result:
        """What a benchmark found; empty where it was not run."""
        path = self._root / "benchmarks" / "results" / f"{name}.json"
        found: Result = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def evaluation(self, model: ModelManifest) -> Result:
        """What the evaluation of a version found.

        Raises ``ValueError`` where there is none, or it is of another file than the one given.
        """
        path = self._root / "distill" / "results" / f"{model.id}-{model.version}.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: evaluate {model.id} {model.version} first")
        found: Result = json.loads(path.read_text())
        measured = found["models"][f"{_SHIPPED}.onnx"]["sha256"]
        if measured != model.sha256:
            raise ValueError(
                f"{path.name} is of {measured[:12]}…, and {model.sha256[:12]}… is shipped: "
                "evaluate again"
            )
        return found


def model_table(results: Results) -> str:
    """What the shipped model is, and how far it agrees with people."""
    model = load_model(_SHIPPED).manifest
    size = f"{model.size_bytes / 1e6:.1f} MB"
    found = results.evaluation(model)
    rows = [*_agreement(found.get("biq2021_test", {})), *_ladders(found.get("ladders", {}))]
    head = f"`{model.id}` {model.version}, {model.precision.upper()}, {size}:"
    return f"{head}\n\n{_table(['', ''], rows)}"


def _agreement(found: Result) -> Iterator[Row]:
    ours = found.get(f"{_SHIPPED}.onnx")
    if ours:
        low, high = ours["srcc_interval_95"]
        yield (
            "agreement with people: SRCC on BIQ2021's official test part "
            f"({ours['num_pictures']:,} pictures)",
            f"{ours['srcc']:.3f} (95 % interval {low:.3f} to {high:.3f})",
        )
    difference = found.get("differences", {}).get(f"{_SHIPPED}.onnx - {_FLOAT}.onnx")
    if difference:
        yield (
            "INT8 against float, same pictures",
            f"{difference['mean_points']:.1f} points in the mean",
        )


def _ladders(found: Result) -> Iterator[Row]:
    ladders = found.get("ladders", {})
    if not ladders:
        return
    (num_contents,) = {one["num_contents"] for one in ladders.values()}
    names = {"h264": "H.264"} | {name: name for name in ladders if name != "h264"}
    if crf := found.get("levels", {}).get("h264"):
        names["h264"] += f" CRF {crf[0]:g} to {crf[-1]:g}"
    shares = (f"{100 * one['share_falling']:.1f}".removesuffix(".0") for one in ladders.values())
    yield (
        f"worse versions of one content score lower, {num_contents} unseen contents: "
        + ", ".join(names[name] for name in ladders),
        ", ".join(f"{share} %" for share in shares) + " of neighbouring steps",
    )


def cost_table(results: Results) -> str:
    """What scoring costs beyond decoding: CPU, lag, time to start and memory."""
    rows = [*_every_frame(results), *_streams(results), *_start(results), *_memory(results)]
    if not rows:
        return ""
    used = [results.benchmark(n) for n in (*_EVERY_FRAME, "streams", "start", "memory")]
    return f"{_measured(used)}\n\n{_table(['', 'decoding alone', 'decoding and scoring'], rows)}"


def _every_frame(results: Results) -> Iterator[Row]:
    for result in _EVERY_FRAME:
        if not (found := results.benchmark(result)):
            continue
        ours = found["models"][_SHIPPED]
        name = f"every frame of a file of {found['megabits_per_second']:.1f} Mbit/s"
        yield (
            f"{name}, CPU{_busy(found)}",
            f"{found['cpu_ms_per_frame_decode']:.1f} ms a frame",
            f"{ours['cpu_ms_per_frame_decode_and_score']:.1f} ms a frame",
        )
        yield (
            f"{name}, speed{_busy(found)}",
            f"{found['frames_per_second_decode']:.0f} frames a second",
            f"{ours['frames_per_second']:.0f} frames a second",
        )


def _streams(results: Results) -> Iterator[Row]:
    found = results.benchmark("streams")
    for case in found.get("cases", ()):
        each = " each" if case["num_streams"] > 1 else ""
        name = f"{_counted(case['num_streams'], 'live stream')}, {case['frames_per_second']:g} "
        name += f"scored frames a second{each}"
        if case["num_processes"] > 1:
            name += ", a process each"
        yield name + _busy(found), *(_of_streams(case[kind]) for kind in ("decode", "watch"))


def _of_streams(found: Result) -> str:
    return (
        f"{found['cpu_percent_per_stream']:.0f} % of a core a stream, lag "
        f"{found['lag_p95_ms']:.0f} ms, {found['peak_rss_mb']:.0f} MB"
    )


def _start(results: Results) -> Iterator[Row]:
    if found := results.benchmark("start"):
        yield (
            f"from the start of the process to the first frame{_busy(found)}",
            f"{found['first_frame_seconds_decode']:.2f} s, {found['peak_rss_mb_decode']:.0f} MB",
            f"{found['first_score_seconds']:.2f} s, {found['peak_rss_mb_at_first_score']:.0f} MB",
        )


def _memory(results: Results) -> Iterator[Row]:
    if found := results.benchmark("memory"):
        minutes, warm = found["seconds"] / 60, found["first_seconds"] / 60
        streams = _counted(found["num_streams"], "live stream")
        yield (
            f"{streams} for {minutes:.0f} minutes, growth after the first {warm:.0f}{_busy(found)}",
            "",
            f"{found['growth_mb']:.1f} MB",
        )


def peers_table(results: Results) -> str:
    """What other measures of quality cost on the same frames, and what kind each is."""
    found = results.benchmark("peers")
    if not found:
        return ""
    kinds = ("needs_reference", "learned_from_people", "runs_live")
    rows = [("decoding alone", f"{found['cpu_ms_per_frame_decode']['ours']:.1f}", "", "", "")]
    for peer in sorted(found["peers"], key=lambda p: p["cpu_ms_per_frame"]):
        name = peer["name"] + (f" ({peer['note']})" if peer.get("note") else "")
        is_ours = name == "dgiqa-stream"
        cells = [name, _number(peer["cpu_ms_per_frame"])]
        cells += ["yes" if peer[kind] else "no" for kind in kinds]
        rows.append([f"**{cell}**" for cell in cells] if is_ours else cells)
    heads = ["CPU ms a frame, beyond decoding", "needs a reference", "learnt from people"]
    table = _table(["", *heads, "runs on live streams"], rows)
    left_out = "; ".join(f"{one['name']}: {one['skipped']}" for one in found["skipped"])
    tail = f"\nLeft out: {left_out}.\n" if left_out else ""
    return f"{_measured([found], _busy(found))}\n\n{table}{tail}"


def _measured(used: Sequence[Result], remark: str = "") -> str:
    """On what, when, and of which model where that is no longer the shipped one."""
    there = [found for found in used if found]
    machines = {(r["machine"]["cores"], r["machine"]["processor"]) for r in there}
    said = " and ".join(f"{cores} cores of {name}" for cores, name in sorted(machines))
    said = f"1080p30 H.264 on {said.replace('(R)', '')} ({', '.join(_dates(there))}){remark}"
    shipped = load_model(_SHIPPED).manifest.version
    versions = {r["model"]["version"] for r in there if "model" in r} - {shipped}
    return said + (f", in part of `{_SHIPPED}` {', '.join(sorted(versions))}:" if versions else ":")


def _busy(found: Result) -> str:
    """Said of what ran beside other work; few figures but CPU time mean much then."""
    machine = found["machine"]
    is_busy = machine.get("load_average_at_start", 0.0) > machine["cores"]
    return " (on a busy machine)" if is_busy else ""


def _dates(used: Sequence[Result]) -> list[str]:
    return sorted({found["date"] for found in used})


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _table(heads: Row, rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "".join(
        "|" + "|".join(f" {cell} ".replace("  ", " ") for cell in line) + "|\n" for line in lines
    )


TABLES: Mapping[str, Callable[[Results], str]] = MappingProxyType(
    {"model": model_table, "cost": cost_table, "peers": peers_table}
)


def with_tables(page: str, results: Results, names: Collection[str] = tuple(TABLES)) -> str:
    """A page whose every marked place of these names is made anew.

    Raises ``KeyError`` for a mark that no table has, and ``ValueError`` where there is no mark.
    """
    if not _MARKED.search(page):
        raise ValueError("the page has no <!-- figures of NAME --> with <!-- end --> below it")

    def made_anew(found: re.Match[str]) -> str:
        make = TABLES[found["name"]]
        if found["name"] not in names:
            return found[0]
        return f"{found['begin']}\n{make(results)}\n{found['end']}"

    return _MARKED.sub(made_anew, page)


def main() -> int:
    """Write the tables, or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"All by default: {', '.join(TABLES)}.")
    parser.add_argument("--check", action="store_true", help="Write nothing.")
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    names = arguments.names or tuple(TABLES)
    if unknown := set(names) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    before = arguments.page.read_text(encoding="utf-8")
    try:
        after = with_tables(before, Results(ROOT), names)
    except ValueError as exc:
        parser.error(str(exc))
    if arguments.check:
        return int(before != after)
    arguments.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
