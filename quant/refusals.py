"""What several commands refuse before they begin."""

from __future__ import annotations

from pathlib import Path

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.manifest import LoadedModel


def refuse_unwritable(output: Path) -> None:
    """Raise :class:`ConfigError` before the work, not after it."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"-o {output} cannot be written: name a file in a folder that is there")


def refuse_other_precisions(reference: LoadedModel, quantised: LoadedModel) -> None:
    """Raise :class:`ConfigError` unless they are a float model and an INT8 one, in this order."""
    found = (reference.manifest.precision, quantised.manifest.precision)
    if found != ("fp32", "int8"):
        raise ConfigError(
            f"{reference.path.name} and {quantised.path.name} are {found[0]} and {found[1]}: give "
            "the float model, then the INT8 one made from it"
        )
