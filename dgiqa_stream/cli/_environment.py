"""Variables of the environment that look like settings of ours and are none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import typer

from dgiqa_stream.cli._shared import say

PREFIX = "DGIQA"
"""Of every option's variable: ``DGIQA_SCORE_FPS`` is ``score --fps``."""

SISTER_PREFIXES = ("DGIQA_DISTILL", "DGIQA_QUANT")
"""Of the options of ``dgiqa-distill`` and ``dgiqa-quant``."""

_WITHOUT_OPTION = frozenset({"DGIQA_ENGINE_CACHE"})  # docs/gpu.md
_OTHERS = frozenset({"DGIQA_VERSION"})  # images often hold one
_OF_TESTS = frozenset({"DGIQA_CHECKOUT", "DGIQA_ODD_MEDIA", "DGIQA_WEIGHTS"})
_SIMILAR = 0.75  # of difflib's ratio: a slip of the fingers, not another word
_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)$")


def warn_of_unknown_variables(app: typer.Typer, names: Iterable[str], *, command: str) -> None:
    """Say of each ``DGIQA_*`` variable that nothing reads which one was probably meant.

    One without a command's name is taken for one of ``command``, where that has such an option.
    """
    suspects = [n for n in names if n.startswith(f"{PREFIX}_") and not _is_another_programs(n)]
    if not suspects:
        return
    known = {*_WITHOUT_OPTION, *_variables(typer.main.get_command(app))}
    for name in sorted(set(suspects) - known):
        say(f"warning: {name} is no setting and is ignored; {_hint(name, known, command)}")


def _is_another_programs(name: str) -> bool:
    if name in _OTHERS | _OF_TESTS or _OF_KUBERNETES.search(name):
        return True
    return name.startswith(tuple(f"{prefix}_" for prefix in SISTER_PREFIXES))


def _variables(group: Any) -> Iterator[str]:
    """The variables of every command's options."""
    for command_name, command in group.commands.items():
        for option in command.params:
            if option.param_type_name == "option":
                yield f"{PREFIX}_{command_name}_{option.name}".upper()
            yield from [option.envvar] if isinstance(option.envvar, str) else option.envvar or ()


def _hint(name: str, known: set[str], command: str) -> str:
    word = name.removeprefix(f"{PREFIX}_")
    ours = f"{PREFIX}_{command.upper()}_{word}"
    if ours in known:
        return f"did you mean {ours}?"
    words = sorted(n.removeprefix(f"{PREFIX}_") for n in known)  # the prefix makes all alike
    near = difflib.get_close_matches(word, words, 1, _SIMILAR)
    return f"did you mean {PREFIX}_{near[0]}?" if near else "see `dgiqa-stream COMMAND --help`"
