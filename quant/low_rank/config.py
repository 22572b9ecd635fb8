"""How a model is factorized: one frozen config, kept in the artefact's history."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dgiqa_stream.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]
Steps = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Energy = Annotated[float, msgspec.Meta(gt=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class LowRankConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which layers are factored, in which norm, and how their ranks are found."""

    weighting: Literal["inputs", "none"] = "inputs"
    """``inputs`` minimises the error of a layer's output on calibration data, ``none`` that of its
    weights: plain SVD and Tucker, the baseline."""
    choice: Literal["energy", "fixed", "sensitivity"] = "energy"
    """How ranks are found: by the energy each layer keeps, one rank for all, or by what each layer
    does to the score, under a budget."""
    energy: Energy = 0.98
    """Share of a layer's weighted squared singular values that ``energy`` keeps."""
    rank: Count = 256
    """The rank of ``fixed``; of grouped convolutions, in each group."""
    max_macs: Count | None = None
    """Budget of ``sensitivity``: multiply-adds of all convolutions and linear layers, one input."""
    max_parameters: Count | None = None
    """Budget of ``sensitivity``: parameters of the whole model."""
    max_latency_seconds: Positive | None = None
    """Budget of ``sensitivity``: time of one calibration batch, as predicted from single layers."""
    rank_shares: tuple[Share, ...] = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2)
    """Ranks that ``sensitivity`` tries, as shares of the largest rank that a layer can have."""
    multiple: Count = 16
    """Ranks are rounded to it, as kernels like their channels."""
    smallest_saving: Share = 0.05
    """Of a layer's parameters and multiply-adds: one that would save less is left alone."""
    include: tuple[str, ...] = ("*",)
    """Names of layers that may be factored, with ``*`` and ``?``."""
    exclude: tuple[str, ...] = ()
    """Names of layers that may not, likewise."""
    num_sweeps: Count = 4
    """Alternating sweeps of a Tucker decomposition."""
    damping: Positive = 1e-4
    """Added to the input covariance's diagonal, as a share of its mean: what calibration data do
    not show is not forgotten."""
    largest_covariance_side: Count = 1200
    """Inputs of a k x k convolution (channels times k squared) up to which the covariance of whole
    windows is used; above, that of channels."""
    reestimate_batchnorm: bool = True
    """Whether BatchNorms get new statistics from the calibration data afterwards."""
    version: int = 1

    def __post_init__(self) -> None:
        """Refuse a budget without a use for it, and a search without a budget."""
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if self.choice == "sensitivity" and len(budgets) != 1:
            raise ConfigError(
                f"choice 'sensitivity' has {len(budgets)} budgets and needs one: set one of "
                f"{', '.join(BUDGETS)}"
            )
        if self.choice != "sensitivity" and budgets:
            raise ConfigError(
                f"{budgets[0]} is set and choice is {self.choice!r}: only 'sensitivity' has a "
                "budget"
            )
        if not self.include or not self.rank_shares:
            raise ConfigError("include and rank_shares must name something: they are empty")

    @property
    def budget(self) -> tuple[str, float]:
        """Name and value of what a search must stay below."""
        name = next(name for name in BUDGETS if getattr(self, name) is not None)
        return name, float(getattr(self, name))


BUDGETS = ("max_macs", "max_parameters", "max_latency_seconds")


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training pictures that a student's layers are measured on."""

    num_pictures: Count = 64
    batch: Count = 16
    seed: int = 1


class FineTuneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A short distillation from the float model afterwards; none with 0 steps."""

    num_steps: Steps = 0
    batch: Count = 16
    rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1e-3
    """Largest step of each tensor, as a share of its own RMS."""
    feature_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Of the squared difference of standardised features, beside that of logits."""
    smallest_crop: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.85
    seed: int = 1


class LowRankRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One factorized artefact: what it is measured on, how it is factored and tuned."""

    calibration: DataConfig = DataConfig()
    low_rank: LowRankConfig = LowRankConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()


def load_low_rank_recipe(path: Path) -> LowRankRecipe:
    """Read a TOML file; raises :class:`ConfigError` where it is none or has an unknown key."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), LowRankRecipe)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"no recipe at {path}: give a file such as configs/quant/dgiqa-light.toml"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
