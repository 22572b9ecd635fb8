"""The command line: ``dgiqa-stream score | watch | sub | report | compare | models | config | ..``.

Data goes to standard output, everything for people to standard error. Exit codes: 0 fine, 1 below
``--fail-under`` or ``--fail-under-difference``, 2 usage or configuration, 3 nothing could be scored
or compared, 4 some inputs failed, 5 model, backend, output or port, 130 interrupted, by Ctrl-C or
SIGTERM. Where several apply: 130 before 2, 5, 3, 4, 1.
"""

from __future__ import annotations

from dgiqa_stream.cli._interrupts import leave_when_interrupted

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    leave_when_interrupted()  # before anything that takes long to import
    from dgiqa_stream.cli._app import main

    main()
