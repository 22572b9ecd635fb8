"""The table of steps that a chain is made of, each one of this program's other commands.

A new step is one function and one line in :data:`STEPS`, in the place where it comes in the chain.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dgiqa_stream.errors import ConfigError, ModelError
from dgiqa_stream.manifest import load_model, manifest_path
from distill.data.training_data import open_packs
from distill.recipe import load_recipe
from quant.low_rank.config import load_low_rank_recipe
from quant.proof.artefacts import sha256_of
from quant.proof.chain import Files, Step
from quant.ptq import load_int8_config

WEIGHTS = (".pt", ".safetensors")


@dataclass(frozen=True, slots=True)
class ChainRequest:
    """What ``dgiqa-quant compress`` was asked for."""

    model: Path
    recipe: Path
    packs: Path
    shards: Path | None = None
    trained_by: tuple[Path, ...] = ()
    fine_tuning: Path | None = None
    low_rank: Path | None = None
    version: str = "0.0.0"
    skip: tuple[str, ...] = ()
    num_steps: int | None = None

    def tables(self) -> dict[str, Any]:
        """The recipe's own; raises :class:`ConfigError` for one with an unknown key."""
        load_int8_config(self.recipe)
        return tomllib.loads(self.recipe.read_text(encoding="utf-8"))

    def chosen(self) -> list[str]:
        """The steps that recipe, model and options ask for, in their order.

        Raises :class:`ConfigError` for a ``--skip`` of no step.
        """
        unknown = sorted(set(self.skip) - set(STEPS))
        if unknown:
            raise ConfigError(f"--skip {unknown[0]}: the steps are {', '.join(STEPS)}")
        tables = self.tables()
        is_trained = self.model.suffix in WEIGHTS
        wanted = {
            "factorize": self.low_rank is not None,
            "qat": "qat" in tables and is_trained,
            "export": is_trained,
            "int8": "quantize" in tables,
            "refit": "head" in tables,
            "sure": "sure" in tables,
        }
        return [name for name in STEPS if wanted[name] and name not in self.skip]


def files_of(request: ChainRequest, ranges: Path | None) -> Files:
    """The files that the chain begins with; raises :class:`ModelError` for a wrong one."""
    if request.model.suffix in WEIGHTS:
        if not request.model.is_file():
            raise ModelError(f"no weights at {request.model}: give best.pt of a training run")
        return {"weights": request.model}
    model = load_model(request.model)
    if model.manifest.precision != "fp32":
        raise ModelError(
            f"{model.path.name} is {model.manifest.precision}: compression begins with a float "
            "model, fp32"
        )
    return {"float": model.path, **({"ranges": ranges} if ranges is not None else {})}


def steps_of(request: ChainRequest) -> list[Step]:
    """The chain; raises :class:`ConfigError` where an option that a step needs is missing."""
    chosen = request.chosen()
    _check(request, chosen)
    tables, data = request.tables(), _identity(request)
    steps = []
    for name in chosen:
        made = STEPS[name]
        settings = {
            "tables": {table: tables.get(table) for table in made.tables},
            "options": made.options(request),
            "data": data if made.needs_pictures else None,
        }
        steps.append(Step(name, settings, made.reads, partial(made.run, request), made.resumes))
    return steps


def _check(request: ChainRequest, chosen: list[str]) -> None:
    open_packs(request.packs)
    if not chosen:
        raise ConfigError(f"{request.recipe.name} asks for no step that {request.model} can take")
    if {"refit", "sure"} & set(chosen) and "int8" not in chosen:
        raise ConfigError("refit and sure need the INT8 model: add [quantize], or --skip both")
    if {"export", "factorize"} & set(chosen) and not request.trained_by:
        raise ConfigError(f"{request.model.name} needs --trained-by, the recipe of its training")
    if "qat" in chosen and ("factorize" in chosen or request.model.suffix != ".pt"):
        raise ConfigError("qat takes the .pt of a training run, not a factored one: --skip qat")
    if "qat" in chosen and request.fine_tuning is None:
        raise ConfigError(
            f"{request.recipe.name} has [qat]: add --fine-tuning, its recipe, or --skip qat"
        )
    fine_tuning = [request.fine_tuning] if request.fine_tuning is not None else []
    for recipe in (*request.trained_by, *fine_tuning):
        load_recipe(recipe)
    if request.low_rank is not None:
        load_low_rank_recipe(request.low_rank)


def _identity(request: ChainRequest) -> dict[str, str]:
    """Of the training pictures."""
    indexes = [request.packs / name / "index.json" for name in ("rated", "ladders")]
    if request.shards is not None:
        indexes += sorted(request.shards.glob("*.json"))
    return {f"{path.parent.name}/{path.name}": sha256_of(path) for path in indexes}


@dataclass(frozen=True, slots=True)
class Known:
    """A step before it is bound to a request."""

    tables: tuple[str, ...]
    """Of the recipe, that it obeys."""
    reads: tuple[str, ...]
    run: Callable[[ChainRequest, Files, Path], Files]
    options: Callable[[ChainRequest], Any] = lambda _: None
    """What else it obeys, ready for JSON."""
    needs_pictures: bool = True
    resumes: bool = False


def _factorize(request: ChainRequest, files: Files, folder: Path) -> Files:
    from quant.low_rank.command import factorize

    assert request.low_rank is not None
    made = folder / "factored.safetensors"
    factorize(
        files["weights"],
        recipe=request.trained_by[-1],
        config=request.low_rank,
        packs=request.packs,
        output=made,
        shards=request.shards,
    )
    return {"weights": made}


def _qat(request: ChainRequest, files: Files, folder: Path) -> Files:
    from quant.cli import qat

    assert request.fine_tuning is not None
    qat(
        files["weights"],
        recipe=request.fine_tuning,
        config=request.recipe,
        packs=request.packs,
        run=folder,
        shards=request.shards,
        steps=request.num_steps,
    )
    return {"weights": folder / "best.pt", "ranges": folder / "ranges.json"}


def _export(request: ChainRequest, files: Files, folder: Path) -> Files:
    from quant.cli import export

    is_rounded = "ranges" in files
    recipes = list(request.trained_by)
    if is_rounded and request.fine_tuning is not None:
        recipes.append(request.fine_tuning)
    made = folder / "fp32.onnx"
    export(
        files["weights"],
        recipe=recipes,
        output=made,
        version=request.version,
        snap_weights=is_rounded,
    )
    return {"float": made}


def _int8(request: ChainRequest, files: Files, folder: Path) -> Files:
    from quant.cli import int8

    made = folder / "int8.onnx"
    int8(
        files["float"],
        config=request.recipe,
        packs=request.packs,
        output=made,
        shards=request.shards,
        ranges=files.get("ranges"),
    )
    return {"int8": made}


def _refit(request: ChainRequest, files: Files, folder: Path) -> Files:
    from quant.refit_command import refit

    whole, small = _copies(files, folder)
    shards = [request.shards] if request.shards else None
    refit(whole, small, config=request.recipe, packs=request.packs, shards=shards)
    return {"float": whole, "int8": small}


def _sure(request: ChainRequest, files: Files, folder: Path) -> Files:
    from quant.sure_command import sure

    whole, small = _copies(files, folder)
    shards = [request.shards] if request.shards else None
    sure(whole, small, config=request.recipe, packs=request.packs, shards=shards)
    return {"float": whole, "int8": small}


def _copies(files: Files, folder: Path) -> tuple[Path, Path]:
    """Both models with their manifests, for a step that rewrites them."""
    made = folder / "fp32.onnx", folder / "int8.onnx"
    for role, target in zip(("float", "int8"), made, strict=True):
        shutil.copyfile(files[role], target)
        shutil.copyfile(manifest_path(files[role]), manifest_path(target))
    return made


def _recipes(request: ChainRequest) -> list[str]:
    """Of the training and the fine-tuning, by content."""
    paths = [*request.trained_by, *([request.fine_tuning] if request.fine_tuning else [])]
    return [sha256_of(path) for path in paths]


def _low_rank_settings(request: ChainRequest) -> Any:
    import msgspec

    assert request.low_rank is not None
    return [msgspec.to_builtins(load_low_rank_recipe(request.low_rank)), _recipes(request)]


STEPS: Mapping[str, Known] = MappingProxyType(
    {  # in the order of the chain
        "factorize": Known((), ("weights",), _factorize, _low_rank_settings),
        "qat": Known(
            ("qat",), ("weights",), _qat, lambda r: [_recipes(r), r.num_steps], resumes=True
        ),
        "export": Known(
            (),
            ("weights", "ranges"),
            _export,
            lambda r: [_recipes(r), r.version],
            needs_pictures=False,
        ),
        "int8": Known(("calibration", "quantize"), ("float", "ranges"), _int8),
        "refit": Known(("head",), ("float", "int8"), _refit),
        "sure": Known(("sure", "head"), ("float", "int8"), _sure),
    }
)
"""By name; what each obeys and reads decides whether a finished one is skipped."""
