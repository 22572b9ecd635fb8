"""The option that chooses poolers."""

from __future__ import annotations

from typing import Annotated

import typer

Pools = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        metavar="NAME",
        help="Only these pooled values, as p5,vqpool; may be repeated. "
        "mean, low5, ewma and hysteresis always come.",
    ),
]


def names_of(options: list[str] | None) -> list[str] | None:
    """The names of all options, each one or several with commas between; None where none is."""
    words = [word.strip() for option in options or () for word in option.split(",")]
    return [word for word in words if word] if options else None
