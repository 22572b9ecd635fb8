"""Pictures of a few pixels, packs of them, and a recipe that trains in seconds."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from dgiqa_stream.preprocess import ViewSpec
from distill.data.build import content_split
from distill.data.degrade import PICTURE_LADDERS
from distill.data.packed import Record, as_planes_420, write_pack
from distill.data.shards import Manifest, ShardRecord, ShardWriter, write_json
from distill.recipe import DataConfig, LossConfig, Recipe, TrainConfig

Rgb = NDArray[np.uint8]
WEIGHTS = "mobilenetv2_imagenet_bn_fp32.npz"


def use_one_thread() -> None:
    """For torch and OpenCV: the machine may be busy, and sums keep their order."""
    cv2.setNumThreads(1)
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread from the first test on."""
    use_one_thread()


@pytest.fixture(autouse=True)
def one_thread_again():
    """One thread for the next test, too, where a command took all cores."""
    yield
    use_one_thread()


def textured(seed: int, height: int = 96, width: int = 128) -> Rgb:
    """Coloured structure at every scale, from a few pixels to the whole picture."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24, 48):
        grid = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / cells**0.3
    return np.clip(128 + 45 * total, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Rgb]:
    """``make_picture(seed, height, width)``: uint8 RGB with structure at every scale."""
    return textured


@pytest.fixture(scope="session")
def small_views() -> list[ViewSpec]:
    """The student's two views, of 64 pixels."""
    return [
        ViewSpec("whole", "whole", 64, 64),
        ViewSpec("fragments", "fragments", 64, 64, rows=2, columns=2),
    ]


@pytest.fixture(scope="session")
def recipe(small_views) -> Recipe:
    """Everything of a real recipe, in a few pictures a step."""
    train = TrainConfig(
        seed=3,
        num_epochs=2,
        rated_batch=4,
        ladder_groups=1,
        ladder_levels=2,
        head_epochs=5,
        trunk_rate=1e-3,
        head_rate=1e-3,
        warmup_steps=2,
        weight_decay=0.02,
        dropout=0.3,
        ema_decay=0.9,
        plcc_weight=0.3,
        ladder_weight=0.5,
        ladder_margin=0.2,
        smallest_crop=0.85,
    )
    return Recipe(
        name="tiny", views=small_views, data=DataConfig(num_validation=4, seed=3), train=train
    )


def toml_of(recipe: Recipe) -> str:
    """A recipe as its file has it."""

    def value(v: object) -> str:
        return str(v).lower() if isinstance(v, bool) else repr(v)

    def keys(table: dict[str, object]) -> list[str]:
        return [f"{k} = {value(v)}" for k, v in table.items() if v is not None]

    made = msgspec.to_builtins(recipe)
    lines = [f"name = {made['name']!r}"]
    for view in made["views"]:
        lines += ["[[views]]", *keys(view)]
    for table in ("data", "model", "imitate", "train", "losses"):
        lines += [f"[{table}]", *keys(made[table])]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def recipe_text() -> Callable[[Recipe], str]:
    """``recipe_text(recipe)``: its TOML."""
    return toml_of


@pytest.fixture(scope="session")
def recipe_file(recipe, tmp_path_factory) -> Path:
    """The recipe as TOML."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(toml_of(recipe))
    return path


def content_names(split: str, number: int) -> list[str]:
    """Names of clean pictures that fall into a split."""
    names = (f"content{i}" for i in range(1000))
    return [name for name in names if content_split(f"{name}.webp") == split][:number]


@pytest.fixture(scope="session")
def contents() -> Callable[[str, int], list[str]]:
    """``contents(split, number)``: names of clean pictures that fall into a split."""
    return content_names


def ladder_pictures(name: str, seed: int, split: str):
    """A clean picture and six levels each of blur and noise."""
    rgb = textured(seed)
    rng = np.random.default_rng(seed)
    yield Record(f"{name}/clean/0", name, split, degradation="clean"), as_planes_420(rgb)
    for kind in ("blur", "noise"):
        degrade, num_levels = PICTURE_LADDERS[kind]
        for level in range(1, num_levels + 1):
            record = Record(f"{name}/{kind}/{level}", name, split, degradation=kind, level=level)
            yield record, as_planes_420(degrade(rgb, level, rng))


@pytest.fixture(scope="session")
def packs(tmp_path_factory) -> Path:
    """``rated`` (16 for training, 4 for validation) and ``ladders`` (2 contents and 1)."""
    folder = tmp_path_factory.mktemp("packs")
    rng = np.random.default_rng(9)
    rated = []
    for i in range(20):
        mos, split = float(rng.uniform()), "train" if i < 16 else "validation"
        blurred = cv2.GaussianBlur(textured(i), (0, 0), 0.3 + 3 * (1 - mos))
        rated.append((Record(f"{i}.jpg", f"{i}.jpg", split, mos=mos), as_planes_420(blurred)))
    about = {"made_by": "test", "settings": {}}
    write_pack(folder / "rated", rated, **about)
    ladders = []
    for split, number in (("train", 2), ("validation", 1)):
        for i, name in enumerate(content_names(split, number)):
            ladders += ladder_pictures(name, 100 + i, split)
    write_pack(folder / "ladders", ladders, **about)
    return folder


def shard_pictures():
    """Records and pictures: 12 and 4 rated ones, then ladders of blur of 2 and 1 contents."""
    rng = np.random.default_rng(9)
    for i in range(16):
        mos, split = float(rng.uniform()), "train" if i < 12 else "validation"
        blurred = cv2.GaussianBlur(textured(i), (0, 0), 0.3 + 3 * (1 - mos))
        yield ShardRecord(f"set/{i}.jpg", f"set/{i}.jpg", split, "set", mos=mos), blurred
    degrade, num_levels = PICTURE_LADDERS["blur"]
    for i, split in enumerate(("train", "train", "validation")):
        content, rgb = f"clean{i}", textured(100 + i)
        for level in range(num_levels + 1):
            yield (
                ShardRecord(
                    f"{content}/blur/{level}" if level else f"{content}/clean",
                    content,
                    split,
                    "pristine",
                    pseudo_mos=1 - level / 8,
                    confidence=0.8,
                    ladder=f"{content}/blur" if level else "",
                    degradation="blur" if level else "clean",
                    level=level,
                ),
                degrade(rgb, level, rng) if level else rgb,
            )


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """``write_shards(folder, pictures)``: whole shards of at most 120 kB with their manifest."""

    def write(folder: Path, pictures) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(folder, "shard-00000", max_bytes=120_000)
        splits: dict[str, int] = {}
        for record, rgb in pictures:
            writer.add(record, rgb)
            splits[record.split] = splits.get(record.split, 0) + 1
        writer.flush()
        about = {"made_by": "test", "settings": {}, "sources": [], "versions": {}}
        manifest = Manifest(num_pictures=splits, shards=writer.written, left_out=[], **about)
        write_json(folder / "manifest.json", manifest)
        return folder

    return write


@pytest.fixture(scope="session")
def shards(write_shards, tmp_path_factory) -> Path:
    """Rated pictures and ladders with pseudo-MOS, in several shards."""
    return write_shards(tmp_path_factory.mktemp("shards") / "s", shard_pictures())


@pytest.fixture(scope="session")
def teacher():
    """A DGIQA in narrow, of random weights."""
    torch = pytest.importorskip("torch")
    from distill.models.teacher import Dgiqa, TeacherSpec
    from distill.models.teacher_file import LoadedTeacher

    torch.manual_seed(6)
    spec = TeacherSpec("mobilenetv2", (8, 8, 16, 16), 4, 24)
    return LoadedTeacher(Dgiqa(spec).eval(), "0.0.1", "a" * 64, 1)


@pytest.fixture(scope="session")
def label(teacher) -> Callable[..., Path]:
    """``label(shards, folder)``: the teacher's labels by two crops, classical depth."""
    from distill.data.depth import ClassicalDepth
    from distill.labelling import label_shards
    from distill.teacher_score import GridProtocol

    def make(shards: Path, folder: Path, *, by=teacher, **options) -> Path:
        options = {"teacher_name": "t.safetensors", "made_by": "test", **options}
        label_shards(by, ClassicalDepth(), GridProtocol(1, 2), shards, folder, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def labels(label, shards, tmp_path_factory) -> Path:
    """The teacher's labels of :func:`shards`."""
    return label(shards, tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="session")
def taught_recipe(recipe) -> Recipe:
    """The recipe with every loss there is."""
    losses = LossConfig(
        teacher_score=0.5, fused=0.2, pooled=0.2, attention=0.1, gated=0.1, relation_distance=0.1,
        relation_similarity=0.1, rank_teacher=0.2, rank_mos=0.2, rank_pseudo_mos=0.2,
        pseudo_mos=0.3, falls=0.2, gated_score=0.1, insensitivity=0.1, contrast=0.1,
        confidence_temperature=0.05,
    )  # fmt: skip
    train = msgspec.structs.replace(recipe.train, unrated_batch=3, ladders_from_clean=True)
    return msgspec.structs.replace(recipe, train=train, losses=losses)


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """``reference_mobilenet.py``, which needs torch."""
    pytest.importorskip("torch")
    path = Path(__file__).with_name("reference_mobilenet.py")
    spec = importlib.util.spec_from_file_location("reference_mobilenet", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def backbone(reference, tmp_path_factory) -> Path:
    """MobileNetV2's ``.npz``: generated, or the published one where ``DGIQA_WEIGHTS`` says."""
    if "DGIQA_WEIGHTS" in os.environ:
        return Path(os.environ["DGIQA_WEIGHTS"]) / WEIGHTS
    path = tmp_path_factory.mktemp("backbone") / WEIGHTS
    np.savez(path, **reference.plausible_weights(5))
    return path
