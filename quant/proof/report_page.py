"""A report for people: markdown tables and the front of accuracy against latency, from its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.proof.figures import latency_at

_MEGA = 1e6
_MOST_LAYERS = 5


def markdown(report: Mapping[str, Any]) -> str:
    """The tables, with what they hold for and the command that made them."""
    artefacts = report["artefacts"]
    lines = [
        f"# Compression of {artefacts[0]['id']} {artefacts[0]['version']}",
        "",
        f"Against `{report['reference']}`. Made by `{report['command']}` on {report['date']}.",
        "",
        *_table(_WEIGHT_HEADS, [_weight(a) for a in artefacts]),
        *_table(_SCORE_HEADS, [_scores(a) for a in artefacts]),
        *_latencies(artefacts),
        *_layers(artefacts),
        _machine(report["machine"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


_WEIGHT_HEADS = ["model", "parameters", "MACs, M", "MB", "peak memory, MB", "convolutions in float"]
_SCORE_HEADS = [
    "model",
    "mean |delta|",
    "p99",
    "max",
    "SRCC with MOS",
    "difference",
    "ladder steps falling",
    "kept",
]


def _weight(artefact: Mapping[str, Any]) -> list[str]:
    left = artefact["float_convs"]
    total = len(left) + artefact["num_integer_convs"]
    return [
        artefact["name"],
        f"{artefact['num_parameters']:,}",
        f"{artefact['macs'] / _MEGA:.1f}",
        f"{artefact['size_bytes'] / _MEGA:.2f}",
        f"{artefact['memory']['peak_bytes'] / _MEGA:.0f}",
        f"{len(left)} of {total}",
    ]


def _scores(artefact: Mapping[str, Any]) -> list[str]:
    found, mos, ladders = artefact["scores"], artefact["mos"], artefact["ladders"]
    apart = ["", "", ""]
    if found is not None:
        apart = [f"{found[key]:.2f}" for key in ("mean_points", "p99_points", "max_points")]
    of_mos = ["not measured", ""]
    if mos is not None:
        of_mos = [_interval(mos["srcc"]), "" if found is None else _interval(mos["difference"])]
    of_ladders = ["not measured", ""]
    if ladders is not None:
        of_ladders = [_percent(ladders["falling"]), _percent(ladders["kept"])]
    return [artefact["name"], *apart, *of_mos, *of_ladders]


def _interval(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "–"
    if found["low"] is None:
        return f"{found['value']:.4f}"
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _percent(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _latencies(artefacts: Sequence[Mapping[str, Any]]) -> list[str]:
    cases = [(one["batch"], one["threads"]) for one in artefacts[0]["latency"]]
    heads = ["model", *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in cases)]
    rows = [
        [
            artefact["name"],
            *(
                f"{one['median_ms']:.2f} ms, ×{one['times_faster']:.2f}"
                for one in artefact["latency"]
            ),
        ]
        for artefact in artefacts
    ]
    told = (
        "Latency of one batch: median, and how many times faster than the reference, interleaved."
    )
    return [told, "", *_table(heads, rows)]


def _layers(artefacts: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for artefact in artefacts:
        noise = artefact["sqnr"]
        if noise is not None:
            lowest = sorted(noise["layers"], key=lambda layer: layer["sqnr_db"])[:_MOST_LAYERS]
            named = ", ".join(f"{layer['node']} {layer['sqnr_db']:.1f}" for layer in lowest)
            rows.append([artefact["name"], f"{noise['median_db']:.1f}", named])
    if not rows:
        return []
    return [
        "SQNR of layers against the reference, in dB:",
        "",
        *_table(["model", "median", "lowest"], rows),
    ]


def _machine(machine: Mapping[str, Any]) -> str:
    busy = ""
    if machine["load_average"] is not None:
        load = machine["load_average"][0]
        busy = f"; its load average was {load}" + (
            ": others ran beside, trust ratios more than times" if load > 0.5 else ""
        )
    return f"Machine: {machine['cpu']}, {machine['num_cores']} cores{busy}."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [
        "| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines
    ] + [""]


def draw_front(report: Mapping[str, Any], path: Path) -> None:
    """A PNG: each artefact by latency and by agreement, and the front that none is better than.

    Agreement is SRCC with MOS where it was measured, else the mean |delta| score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    artefacts = report["artefacts"]
    by_mos = all(a["mos"] is not None and a["mos"]["srcc"]["value"] is not None for a in artefacts)
    points = [(_ms(a), _good(a, by_mos=by_mos)) for a in artefacts]
    middle = sum(x for x, _ in points) / len(points)
    figure = Figure(figsize=(7, 4.5), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for artefact, (x, y) in zip(artefacts, points, strict=True):
        size = 20 + 12 * math.sqrt(artefact["size_bytes"] / _MEGA)
        axes.scatter(x, y, s=size**1.2, alpha=0.7)
        label = f"{artefact['name']}\n{artefact['size_bytes'] / _MEGA:.1f} MB"
        is_right = x > middle  # its label goes to the left, inside the picture
        axes.annotate(
            label,
            (x, y),
            xytext=(-9 if is_right else 9, 6),
            ha="right" if is_right else "left",
            textcoords="offset points",
            fontsize=8,
        )
        srcc = artefact["mos"]["srcc"] if by_mos else {}
        if srcc.get("low") is not None and srcc.get("high") is not None:
            # a bootstrap's interval need not hold the value itself
            reach = [[max(0.0, y - srcc["low"])], [max(0.0, srcc["high"] - y)]]
            axes.errorbar(x, y, yerr=reach, color="grey", linewidth=0.8, capsize=3, zorder=0)
    best = front(points)
    axes.plot(*zip(*best, strict=True), color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel("median latency of one picture, one thread, ms")
    axes.set_ylabel("SRCC with MOS" if by_mos else "-(mean |delta score|), points")
    axes.set_title(f"{artefacts[0]['id']} {artefacts[0]['version']}")
    axes.margins(0.25)
    axes.grid(visible=True, linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, format="png")


def _ms(artefact: Mapping[str, Any]) -> float:
    return float(latency_at(dict(artefact))["median_ms"])


def _good(artefact: Mapping[str, Any], *, by_mos: bool) -> float:
    if by_mos:
        return float(artefact["mos"]["srcc"]["value"])
    return 0.0 if artefact["scores"] is None else -float(artefact["scores"]["mean_points"])


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is both quicker (x) and better (y) than, quickest first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept
