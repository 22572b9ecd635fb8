"""``python -m dgiqa_stream``: the same commands as ``dgiqa-stream``."""

from __future__ import annotations

from dgiqa_stream.cli import main

if __name__ == "__main__":
    main()
