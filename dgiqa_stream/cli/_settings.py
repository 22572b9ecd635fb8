"""Settings from options and a file, and errors that name what the user wrote: option or key."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dgiqa_stream.errors import DgiqaError

if TYPE_CHECKING:
    from dgiqa_stream.config import StreamConfig

Given = Mapping[str, tuple[str, Any]]
"""A setting's key, as in the file: its option (empty: none sets it alone) and what that said."""


@dataclass(frozen=True, slots=True)
class Wording:
    """Says settings' keys as the options that set them."""

    options: Mapping[str, str]
    """Key, as ``publish.endpoint``: option, as ``--publish``."""

    def __call__(self, text: str) -> str:
        """The text with each key that has an option replaced: ``key = value`` by ``option value``.

        A value ``true`` is left out, because the option of a switch has none.
        """
        if not self.options:
            return text
        keys = "|".join(map(re.escape, self.options))
        pattern = rf"(?<![\w./-])({keys})(?![\w/-])(?:\[\d+\])?( = true\b)?(?: =)?"
        return re.sub(pattern, lambda found: self.options[found[1]], text)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever this package raises in the block is raised in these words."""
        try:
            yield
        except DgiqaError as exc:
            raise type(exc)(self(str(exc))) from exc


def settle(
    settings: StreamConfig, given: Given, *, has_file: bool = False
) -> tuple[StreamConfig, Wording]:
    """The settings with what options named (None: not named) put over them, and their wording.

    An error names the option where one gave the value, or where there is no file to look in.
    Checked as the file is: raises :class:`ConfigError` naming option or key, value and rule.
    """
    import msgspec

    from dgiqa_stream.config import parse_config

    values: dict[str, Any] = msgspec.to_builtins(settings)
    for key, (_, value) in given.items():
        table, _, name = key.partition(".")
        if value is not None:
            values[table][name] = value
    wording = Wording(
        {
            key: option
            for key, (option, value) in given.items()
            if option and (value is not None or not has_file)
        }
    )
    with wording.errors():
        return parse_config(values), wording
