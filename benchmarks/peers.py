"""What other measures of quality cost on the same frames: CPU per 1080p frame beyond decoding it.

    python benchmarks/peers.py [--clip reference_1080p30.mp4] [--seconds 4] [--rounds 3]

Everything runs in turn in each round. What decodes by itself is measured less a run that only
decodes with the same program; CPU is user and system time of all threads, less a run over one
frame. The slow ones see a few frames, once. A peer that is not on this machine is left out, with
the reason: ffmpeg filters need ``ffmpeg``, NIQE and BRISQUE ``pyiqa``, DGIQA the extra ``teacher``.
Writes ``benchmarks/results/peers.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _bench as bench

FFMPEG = "ffmpeg"
DECODE, OURS, FFMPEG_DECODE = "decode alone (PyAV)", "dgiqa-stream", "decode alone (ffmpeg)"


class Peer(NamedTuple):
    """A measure of quality, and what kind it is."""

    name: str
    kind: Literal["ours", "filter", "network"]
    word: str
    """The model, the filter of ffmpeg, or the name in ``_networks.py``."""
    needs_reference: bool = False
    learned_from_people: bool = False
    runs_live: bool = True


PEERS = (
    Peer(OURS, "ours", "student", learned_from_people=True),
    Peer("blockdetect", "filter", "blockdetect"),
    Peer("signalstats", "filter", "signalstats"),
    Peer("blurdetect", "filter", "blurdetect"),
    Peer("siti", "filter", "siti"),
    Peer("VMAF", "filter", "libvmaf", needs_reference=True, learned_from_people=True),
    Peer("BRISQUE", "network", "brisque", learned_from_people=True, runs_live=False),
    Peer("NIQE", "network", "niqe", runs_live=False),
    Peer("DGIQA, as published", "network", "dgiqa", learned_from_people=True, runs_live=False),
)


def cpu_of(peer: Peer, clip: Path, seconds: float) -> float:
    """CPU seconds of a program that decodes, and measures what ``peer`` does."""
    if peer.kind == "ours":
        return bench.run_code(bench.SCORE, clip, str(seconds), peer.word).cpu_seconds
    return _ffmpeg(clip, seconds, peer)


def decoding_cpu(kind: str, clip: Path, seconds: float) -> float:
    """CPU seconds of the same program where it only decodes."""
    if kind == "ours":
        return bench.run_code(bench.DECODE, clip, str(seconds)).cpu_seconds
    return _ffmpeg(clip, seconds, None)


def _ffmpeg(clip: Path, seconds: float, peer: Peer | None) -> float:
    files = ["-i", clip, *(["-i", clip] if peer and peer.needs_reference else [])]
    graph = ["-lavfi", peer.word] if peer else []
    limit = ["-frames:v", str(max(1, round(seconds * bench.CLIP_FPS)))]
    command = [FFMPEG, "-v", "error", "-nostdin", *files, *graph, *limit, "-f", "null", "-"]
    return bench.run(*command).cpu_seconds


def why_not(peer: Peer) -> str:
    """Why a filter cannot be measured here; empty where it can."""
    if shutil.which(FFMPEG) is None:
        return "ffmpeg is not installed"
    known = bench.run(FFMPEG, "-v", "error", "-filters").output
    return "" if f" {peer.word} " in known else f"this ffmpeg has no {peer.word}"


def fast(
    peers: Sequence[Peer], clip: Path, seconds: float, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU ms per frame of each peer beyond decoding, and of decoding, in every round."""
    num_frames = round(seconds * bench.CLIP_FPS)
    short = float(bench.NO_FRAMES_SECONDS)
    kinds = {p.kind for p in peers}
    start = {p.name: cpu_of(p, clip, short) for p in peers}
    start_decoding = {kind: decoding_cpu(kind, clip, short) for kind in kinds}
    beyond: dict[str, list[float]] = {p.name: [] for p in peers}
    decoding: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        bench.say(f"round {number + 1} of {rounds}")
        base = {kind: decoding_cpu(kind, clip, seconds) - start_decoding[kind] for kind in kinds}
        for kind, cpu in base.items():
            decoding[kind].append(1e3 * cpu / num_frames)
        for peer in peers:
            num_decoded = 2 if peer.needs_reference else 1
            cpu = cpu_of(peer, clip, seconds) - start[peer.name] - num_decoded * base[peer.kind]
            beyond[peer.name].append(1e3 * cpu / num_frames)
    return beyond, decoding


def slow(peer: Peer, clip: Path, num_frames: int) -> dict[str, Any]:
    """What a network takes; ``skipped`` says why it could not be run."""
    bench.say(peer.name)
    script = str(bench.HERE / "_networks.py")
    done = subprocess.run(
        [sys.executable, script, peer.word, str(clip), str(num_frames)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "cpu_ms_per_frame": round(found["cpu_ms_per_frame"])}
    said = done.stderr.strip().splitlines()[-1]
    if not said.startswith(("ModuleNotFoundError", "ImportError")):
        raise RuntimeError(f"{peer.name}: {done.stderr}")
    return {"skipped": said.partition(": ")[2]}


def measure(clip: Path, seconds: float, rounds: int, num_slow_frames: int) -> dict[str, Any]:
    """Every peer that is here, and why the others are not."""
    reasons = {p.name: why_not(p) for p in PEERS if p.kind == "filter"}
    quick = [p for p in PEERS if p.kind != "network" and not reasons.get(p.name)]
    beyond, decoding = fast(quick, clip, seconds, rounds)
    rows, skipped = [], []
    for peer in PEERS:
        if peer.kind == "network":
            found = slow(peer, clip, num_slow_frames)
        elif reasons.get(peer.name):
            found = {"skipped": reasons[peer.name]}
        else:
            found = {"cpu_ms_per_frame": round(statistics.median(beyond[peer.name]), 1)}
        row = {"name": peer.name, **found}
        if "skipped" in found:
            skipped.append(row)
        else:
            facts = peer._asdict()
            kinds = ("needs_reference", "learned_from_people", "runs_live")
            rows.append({**row, **{name: facts[name] for name in kinds}})
    return {
        "num_frames": round(seconds * bench.CLIP_FPS),
        "rounds": rounds,
        "cpu_ms_per_frame_decode": {
            kind: round(statistics.median(ms), 2) for kind, ms in sorted(decoding.items())
        },
        "peers": rows,
        "skipped": skipped,
    }


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench.add_common(parser, "peers.json", rounds=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--slow-frames", type=int, default=2, help="Of the slow ones.")
    arguments = parser.parse_args()
    with bench.clip_of(arguments.clip, arguments.seconds + 1) as clip:
        found = measure(clip, arguments.seconds, arguments.rounds, arguments.slow_frames)
    if shutil.which(FFMPEG):
        found = {"ffmpeg": bench.run(FFMPEG, "-version").output.split()[2], **found}
    packages = ("torch", "timm", "transformers", "pyiqa")
    bench.write("peers.py", found, arguments.output, *packages)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
