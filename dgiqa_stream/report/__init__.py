"""Reports of recordings and comparisons: a self-contained HTML page, the score curve as PNG.

The page loads nothing: styles, charts and pictures are in the file. matplotlib draws the charts;
it comes with ``pip install 'dgiqa-stream[report]'``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dgiqa_stream.errors import SinkError
from dgiqa_stream.report._charts import require_matplotlib, save_png
from dgiqa_stream.report._comparison import write_comparison
from dgiqa_stream.report._page import page_of
from dgiqa_stream.report._story import tell

if TYPE_CHECKING:
    from dgiqa_stream.recording import Recording

__all__ = ["require_matplotlib", "write_comparison", "write_html", "write_png"]

_MOST_CURVES = 12


def write_html(recording: Recording, out: Path) -> None:
    """Write the report of a recording; an existing file is replaced.

    Pictures of the worst frames come from the recording, or from the scored files where they still
    exist. Raises :class:`~dgiqa_stream.errors.SinkError` where matplotlib is missing or ``out``
    cannot be written.
    """
    require_matplotlib()
    page = page_of(recording)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as exc:
        raise SinkError(f"cannot write the report {out}: {exc.strerror}; choose another") from exc


def write_png(recording: Recording, out: Path) -> None:
    """Write the score curves of a recording, one below the other; at most the first twelve.

    Raises :class:`~dgiqa_stream.errors.SinkError` where matplotlib is missing, where nothing in the
    recording has a time, or where ``out`` cannot be written.
    """
    require_matplotlib()
    stories = [tell(t) for t in recording.tracks if t.frames and not t.is_still]
    if not stories:
        raise SinkError(
            f"{recording.path} has no scores over time: there is no curve to draw; leave --png out"
        )
    try:
        save_png(stories[:_MOST_CURVES], out)
    except OSError as exc:
        raise SinkError(f"cannot write the plot {out}: {exc.strerror}; choose another") from exc
