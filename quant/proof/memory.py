"""Peak memory of one model in a process of its own: open it, score one batch, and tell.

``python -m quant.proof.memory MODEL BATCH`` prints JSON; :func:`peak_memory` runs that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgiqa_stream.errors import ModelError

_LIMIT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Highest resident set of a process, in bytes."""

    peak_bytes: int
    before_bytes: int
    """The same after the imports, before the model was opened."""

    @property
    def model_bytes(self) -> int:
        """What opening and running the model added."""
        return self.peak_bytes - self.before_bytes


def peak_memory(model: Path, *, batch: int = 1) -> PeakMemory:
    """Measure in a new process; raises :class:`ModelError` where the model does not run there."""
    command = [sys.executable, "-m", __name__, str(model), str(batch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise ModelError(
            f"{model.name} did not score {batch} pictures within {_LIMIT_SECONDS} s"
        ) from exc
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"{model.name} did not run in a process of its own: {last}")
    return PeakMemory(**json.loads(done.stdout))


def _resident_peak_bytes() -> int:
    """Of this process alone: its ``ru_maxrss`` may still be that of the one that forked it."""
    try:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Open the model that the arguments name, score noise, write what that took."""
    import onnxruntime  # noqa: F401  (its own memory is not the model's)

    from dgiqa_stream.scorer import load_scorer
    from dgiqa_stream.types import FrameBatch

    model, batch = sys.argv[1], int(sys.argv[2])
    before = _resident_peak_bytes()
    with load_scorer(model, device="cpu") as scorer:
        rng = np.random.default_rng(0)
        views = {
            view.name: rng.integers(0, 256, (batch, *view.shape), dtype=np.uint8)
            for view in scorer.manifest.preprocess.views
        }
        scorer.infer(FrameBatch(views))
    found = {"peak_bytes": _resident_peak_bytes(), "before_bytes": before}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
