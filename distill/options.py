"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.")]
Depth = Annotated[
    str | None, typer.Option(help="As of `score`; the published network unless given.")
]
DepthCache = Annotated[Path | None, typer.Option(help="Folder that keeps a depth network's maps.")]
