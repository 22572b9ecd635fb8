"""The floors of compression, measured: INT8 against FP32, a teacher's crop, a frame's cost.

    python benchmarks/compression.py --packs PACKS [--float student-fp32] [--int8 student]
        [--teacher TEACHER.safetensors] [--parts student crop frame agreement] [--rounds 30]

* ``student``: inference alone at batch 1 and 8 with 1 and 2 threads, models run in turn; bytes;
  the change of scores and of SRCC with MOS on validation pictures of ``--packs``. The official
  test part is not read.
* ``crop``: the published DGIQA on one crop, whole FP32 against ``dgiqa-light.toml`` in FP32 and
  INT8. Weights are random: bytes and time do not depend on them.
* ``frame``: CPU seconds of one 1080p frame by the INT8 student, views and all, against the
  published teacher: one depth map by Depth Anything's large network and 20 crops, of which
  ``--crops`` are measured and multiplied.
* ``agreement``: SRCC of the INT8 student with ``--teacher`` (a file of ``dgiqa-distill teach``, or
  any model by name or ``.onnx``; may be repeated) on validation pictures and ladders: with the
  teachers that could be trained, for the published weights could not be had.

A part that is not asked for keeps what the file has of it; each says its own command, date and
load. Writes ``benchmarks/results/compression.json`` with every floor beside what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _bench as bench
import numpy as np

from dgiqa_stream import load_scorer
from dgiqa_stream.correlation import srcc
from dgiqa_stream.manifest import load_model
from quant.proof.agreement import agreement
from quant.proof.artefacts import Artefact, NamedPicture, score_all, scorer_artefact
from quant.proof.commands.rated import RatedPictures, mos_figures, rated_pictures
from quant.proof.latency import LatencySettings, measure_latency

PARTS = ("student", "crop", "frame", "agreement")
PUBLISHED_CROPS = 20
FRAME = (1080, 1920, 3)
_STUDENT_FRAMES = 30


def student(arguments: argparse.Namespace) -> dict[str, Any]:
    """INT8 against FP32: time, bytes, scores."""
    models = [load_model(arguments.float), load_model(arguments.int8)]
    settings = LatencySettings(num_rounds=arguments.rounds)
    bench.say("latency")
    _, latency = measure_latency(models, settings)
    bench.say("scores")
    rated = rated_pictures(arguments.packs, num_rated=arguments.num_rated, num_ladders=1)
    number = len(rated.rated_records)
    names, (reference, scores) = score_all(
        [scorer_artefact(model.path) for model in models], first_of(rated, number)
    )
    sizes = [model.manifest.size_bytes for model in models]
    apart = agreement(reference, scores, names)
    of_mos = mos_figures(reference, scores, rated.mos)
    return {
        "models": [model_json(m) for m in models],
        "latency": [rounded(asdict(one)) for one in latency],
        "bytes_ratio": round(sizes[1] / sizes[0], 4),
        "scores": rounded(asdict(apart)),
        "mos": of_mos,
        "floors": floors(
            ("times_faster", min(one.times_faster for one in latency), ">=", 2.0),
            ("bytes_ratio", sizes[1] / sizes[0], "<=", 0.3),
            ("mean_points", apart.mean_points, "<=", 0.5),
            ("p99_points", apart.p99_points, "<=", 2.0),
            ("srcc_lost", -of_mos["difference"]["value"], "<=", 0.003),
        ),
    }


def crop(arguments: argparse.Namespace) -> dict[str, Any]:
    """A crop of the published teacher, factored and INT8, against FP32."""
    from _teacher_crop import measure_crop

    found = measure_crop(arguments.teacher_rounds, (1, 2))
    times = [of["light_int8"]["times_faster"] for of in found["by_threads"].values()]
    return {
        **found,
        "floors": floors(
            ("times_faster", min(times), ">=", 2.0),
            ("megabytes", found["size_bytes"]["light_int8"] / 1e6, "<=", 80.0),
        ),
    }


def frame(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU of a frame by the student, and by the published teacher with its depth."""
    picture = np.random.default_rng(1).integers(0, 256, FRAME, dtype=np.uint8)
    with load_scorer(arguments.int8, device="cpu", num_threads=1) as scorer:
        cheap = cpu_seconds(lambda: scorer.score(picture), times=_STUDENT_FRAMES)
    bench.say(f"student: {1e3 * cheap:.2f} ms")
    depth, one_crop = teacher_cpu(picture, arguments.crops)
    bench.say(f"teacher: depth {depth:.1f} s, a crop {one_crop:.2f} s")
    dear = depth + PUBLISHED_CROPS * one_crop
    return {
        "model": model_json(load_model(arguments.int8)),
        "student_cpu_seconds": round(cheap, 5),
        "teacher_cpu_seconds": round(dear, 2),
        "teacher": {
            "depth_cpu_seconds": round(depth, 2),
            "crop_cpu_seconds": round(one_crop, 3),
            "crops_measured": arguments.crops,
            "crops": PUBLISHED_CROPS,
            "weights": "random; Depth Anything large and DGIQA with Swin-T, FP32 in torch",
        },
        "floors": floors(("times_cheaper", dear / cheap, ">=", 1000.0)),
    }


def teacher_cpu(picture: np.ndarray, num_crops: int) -> tuple[float, float]:
    """CPU seconds of the depth map of a picture, and of one crop."""
    import torch
    from _networks import depth_network

    from distill.models.teacher import CROP_PX, Dgiqa

    torch.set_num_threads(1)
    with torch.inference_mode():
        depth = depth_cpu(depth_network(), picture)
        model = Dgiqa().eval()
        seen = torch.zeros(num_crops, 3, CROP_PX, CROP_PX)
        return depth, cpu_seconds(lambda: model(seen, seen), times=1) / num_crops


def depth_cpu(network: Callable[[np.ndarray], object], picture: np.ndarray) -> float:
    """CPU seconds of one depth map; the network is freed afterwards."""
    return cpu_seconds(lambda: network(picture), times=1, warm=False)


def agreed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The student's order of unseen pictures against teachers' order of them."""
    rated = rated_pictures(
        arguments.packs, num_rated=arguments.num_agreed, num_ladders=arguments.num_ladders
    )
    number = len(rated.rated_records)
    names, (scores,) = score_all([scorer_artefact(load_model(arguments.int8).path)], rated)
    found = []
    for teacher in arguments.teacher:
        bench.say(f"{Path(teacher).name} scores {len(names)} pictures")
        _, (wanted,) = score_all([open_judge(teacher, arguments.teacher_crops)], rated)
        found.append(
            {
                "teacher": Path(teacher).name,
                "srcc": round(srcc(scores, wanted), 4),
                "srcc_rated": round(srcc(scores[:number], wanted[:number]), 4),
                "srcc_ladders": round(srcc(scores[number:], wanted[number:]), 4),
                "teacher_with_mos": round(srcc(wanted[:number], rated.mos), 4),
                "student_with_mos": round(srcc(scores[:number], rated.mos), 4),
            }
        )
    return {
        "model": model_json(load_model(arguments.int8)),
        "num_pictures": {"rated": number, "ladders": len(names) - number},
        "teacher_crops": arguments.teacher_crops,
        "teachers": found,
        "floors": floors(("srcc", max(t["srcc"] for t in found), ">=", 0.9)),
    }


def open_judge(teacher: str, num_crops: int) -> Artefact:
    """A model as one function of pictures, or a taught teacher with the depth that it knows."""
    if not teacher.endswith(".safetensors"):
        return scorer_artefact(load_model(teacher).path)
    import torch

    from dgiqa_stream.preprocess import reduced_rgb
    from distill.data.depth import ClassicalDepth
    from distill.models.official import open_teacher
    from distill.teacher_score import make_protocol, score_picture

    torch.set_num_threads(1)
    loaded, depth = open_teacher(Path(teacher)), ClassicalDepth()
    if loaded.depth != depth.identity:
        raise SystemExit(f"{Path(teacher).name} learnt with depth by {loaded.depth!r}: not here")
    protocol = make_protocol("grid", num_crops=num_crops)

    def predict(pictures: Sequence[Any]) -> np.ndarray:
        rgbs = [reduced_rgb(p, longest_px=max(p.size)) for p in pictures]
        told = [score_picture(loaded.model, rgb, depth(rgb), protocol=protocol) for rgb in rgbs]
        return np.array([t.score for t in told])

    return Artefact(Path(teacher).name, "teacher", loaded.sha256, predict)


def cpu_seconds(call: Callable[[], object], *, times: int, warm: bool = True) -> float:
    """CPU of one call, all threads, the mean over so many."""
    if warm:
        call()
    begin = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begin) / times


def first_of(rated: RatedPictures, number: int) -> Iterable[NamedPicture]:
    """The rated pictures alone."""
    for index, named in enumerate(rated):
        if index == number:
            return
        yield named


def floors(*wanted: tuple[str, float, str, float]) -> list[dict[str, Any]]:
    """What was found beside what is asked for."""
    return [
        {
            "name": name,
            "found": round(float(found), 4),
            "floor": f"{sign} {bound:g}",
            "met": bool(found >= bound if sign == ">=" else found <= bound),
        }
        for name, found, sign, bound in wanted
    ]


def model_json(model: Any) -> dict[str, Any]:
    """Which one it was."""
    names = ("id", "version", "precision", "sha256", "size_bytes", "num_parameters")
    return {name: getattr(model.manifest, name) for name in names}


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """To four digits, for JSON."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}


MEASURED: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "student": student,
    "crop": crop,
    "frame": frame,
    "agreement": agreed,
}


def measured_now(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A part with its own command, date and load, as the file may have others of other days."""
    bench.say(part)
    load = round(os.getloadavg()[0], 2)
    found = MEASURED[part](arguments)
    made = bench.made_by("compression.py")
    return {
        "command": made["command"],
        "date": made["date"],
        "load_average": [load, round(os.getloadavg()[0], 2)],
        **found,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=Path, help="Of `dgiqa-distill data`: ratings, ladders.")
    parser.add_argument("--float", default="student-fp32", help="Shipped name or .onnx.")
    parser.add_argument("--int8", default="student", help="Shipped name or .onnx.")
    parser.add_argument("--teacher", action="append", help="A file of `teach`, a name or .onnx.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--num-rated", type=int, default=1000, help="Validation pictures.")
    parser.add_argument("--num-agreed", type=int, default=200, help="Of `agreement`.")
    parser.add_argument("--num-ladders", type=int, default=20, help="Of `agreement`.")
    parser.add_argument("--teacher-rounds", type=int, default=7)
    parser.add_argument("--teacher-crops", type=int, default=1, help="A square number.")
    parser.add_argument("--crops", type=int, default=4, help="Of the published teacher, measured.")
    parser.add_argument("-o", "--output", type=Path, default=bench.RESULTS / "compression.json")
    arguments = parser.parse_args(words)
    if arguments.packs is None and {"student", "agreement"} & set(arguments.parts):
        parser.error("--packs is needed for student and agreement")
    if not arguments.teacher and "agreement" in arguments.parts:
        parser.error("--teacher is needed for agreement: a file of `teach`, a name or .onnx")
    parts = kept_parts(arguments.output)
    for part in arguments.parts:
        parts[part] = measured_now(part, arguments)
        found = {name: parts[name] for name in PARTS if name in parts}
        bench.write("compression.py", found, arguments.output, "torch", "timm", "transformers")


def kept_parts(output: Path) -> dict[str, Any]:
    """What the file has already."""
    if not output.is_file():
        return {}
    was = json.loads(output.read_text())
    return {name: was[name] for name in PARTS if name in was}


if __name__ == "__main__":
    main()
