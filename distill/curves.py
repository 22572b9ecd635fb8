"""The curves of a training run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.shards import whole_or_none
from distill.run_folder import LOG, VALIDATION, read_table

CURVES = "curves.png"
_DOTS_PER_INCH = 110
_NUM_COLOURS = 10
_STYLES = ("-", "--", ":")


def draw_curves(folder: Path) -> bool:
    """Write ``curves.png`` from a run's tables; False where matplotlib or all rows are missing.

    Above the weighted losses, logarithmic; below the figures of validation.
    """
    losses, figures = read_table(folder / LOG), read_table(folder / VALIDATION)
    if not losses and not figures:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    _draw(above, losses, "weighted loss")
    if any(value > 0 for values in losses.values() for value in values):
        above.set_yscale("log", nonpositive="mask")
    _draw(below, figures, "validation")
    below.set_xlabel("step")
    with whole_or_none(folder / CURVES) as partial:
        figure.savefig(partial, dpi=_DOTS_PER_INCH, format="png")
    return True


def _draw(axes: Any, table: dict[str, list[float]], title: str) -> None:
    for number, (name, values) in enumerate(table.items()):
        if name == "step":
            continue
        of_all = name in ("loss", "srcc")
        axes.plot(
            table["step"],
            values,
            label=name,
            linewidth=2 if of_all else 1,
            color="black" if of_all else f"C{number % _NUM_COLOURS}",
            linestyle=_STYLES[number // _NUM_COLOURS % len(_STYLES)],
            marker="." if len(values) < 2 else None,
        )
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    if len(table) > 1:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
