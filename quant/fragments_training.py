"""A run of ``dgiqa-quant fragments``: its pictures, its steps and the student that comes of it.

Only commands import this module, as it joins training to compression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgiqa_stream.errors import ConfigError
from distill.compute import Compute
from distill.data.loader import Look, read_ahead, views_of
from distill.models.fragment_trunk import FragmentTrunk, folded
from distill.models.student import Student, normalised_view
from distill.models.trunks import Trunk
from distill.optimising import learning_rate_share, take_step
from distill.run_folder import CHECKPOINT, LOG, RunFolder
from distill.say import say
from quant.fragments import Beside, FragmentsConfig, Lesson, Lessons, lesson_loss
from quant.head import Features, HeadConfig, corrected, head_of, logits_of, wanted_logits
from quant.looks import Looks

_CHECKPOINT_EVERY_STEPS = 100
_LOG_EVERY_STEPS = 20
_WARMUP_SHARE = 0.1
_SMALLEST_STD = 1e-3
_AS_SERVED = (0.0, 0.0, 1.0, 1.0)


class Teaching:
    """One run of teaching a fragment trunk, taken up again from its folder."""

    def __init__(
        self,
        looks: Looks,
        features: Features,
        wanted: NDArray[np.float32],
        *,
        settings: tuple[FragmentsConfig, HeadConfig],
        folder: RunFolder,
        compute: Compute,
        about: Mapping[str, Any],
    ) -> None:
        """``wanted``: logits (N,); ``about`` says what a run that goes on must share.

        Raises :class:`ConfigError` where the run was begun with something else.
        """
        self._config, self._head = settings
        self._folder, self._compute, self._about = folder, compute, dict(about)
        self._looks, self._features = looks, features
        self._wanted = torch.from_numpy(wanted)
        self._kinds, self._num_kinds = _kinds_of(looks)
        if folder.has_checkpoint():
            self._refuse_other(folder.load_checkpoint())

    def student(self, trunk: Trunk, last: int | None) -> Student:
        """Every step that is left, up to ``last``; the student that comes of it.

        Its whole view passes ``trunk``, whose features the looks have. Raises
        ``FloatingPointError`` where a loss is no longer a number.
        """
        num_given = trunk.num_shared_features + trunk.num_late_features
        _, _, of_int8 = corrected(self._features)
        of_float = self._features.of_float
        mean, std = of_float[:, :num_given].mean(0), of_float[:, :num_given].std(0)
        std = np.maximum(std, _SMALLEST_STD)
        given = [torch.from_numpy((x[:, :num_given] - mean) / std) for x in (of_float, of_int8)]
        torch.manual_seed(self._config.seed)
        made = FragmentTrunk(self._config.widths, normalised=True)
        net = Beside(
            made,
            num_own=made.num_features,
            num_given=num_given,
            num_kinds=self._num_kinds,
            config=self._config,
        )
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._teach(net.to(self._compute.device), torch.stack(given), last)
        net.cpu().eval()
        hidden = net.hidden_state()
        student = Student(trunk=trunk, fragment_trunk=folded(made), head_width=len(hidden["bias"]))
        norm = net.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        own_std = torch.sqrt(norm.running_var + norm.eps)
        student.hidden.load_state_dict(hidden)
        student.quality.load_state_dict(net.quality_state())
        student.feature_mean.copy_(torch.cat([torch.from_numpy(mean), norm.running_mean]))
        student.feature_std.copy_(torch.cat([torch.from_numpy(std), own_std]))
        return student.eval()

    def _teach(self, net: Beside, given: Tensor, last: int | None) -> None:
        """``given``: float, then INT8 features (2, N, F), standardised."""
        config, device = self._config, self._compute.device
        optimiser = torch.optim.AdamW(
            net.parameters(), config.rate, weight_decay=config.weight_decay
        )
        warmup = max(1, round(_WARMUP_SHARE * config.num_steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda s: learning_rate_share(s, config.num_steps, warmup)
        )
        scaler, first = self._compute.scaler(), 0
        parts: dict[str, Any] = {"net": net, "optimiser": optimiser, "schedule": schedule}
        parts["scaler"] = scaler
        if self._folder.has_checkpoint():
            state = self._folder.load_checkpoint()
            first = int(state["step"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        self._folder.forget_after(first)
        end = max(first, config.num_steps if last is None else last)
        net.train()
        for number, (lesson, cut) in enumerate(self._steps(first, end), first):
            torch.manual_seed(config.seed + number)  # of dropout, for a run that goes on
            chosen = lesson.chosen
            pictures = normalised_view(torch.from_numpy(cut).to(device))
            said = net(given[:, chosen].to(device), pictures, self._compute.autocast())
            wanted, kinds = self._wanted[chosen].to(device), self._kinds[chosen].to(device)
            worse_by = lesson.worse_by.to(device)
            loss = lesson_loss(said, wanted, kinds, worse_by, config, self._head)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            told = f"at step {number}: lower the rate in [fragments], in another --run folder"
            parameters = net.parameters()
            if take_step(optimiser, scaler, parameters, loss, may_pass_over=True, told=told):
                schedule.step()
            done = number + 1
            if done % _LOG_EVERY_STEPS == 0:
                self._folder.log(LOG, {"step": done, "loss": loss.item()})
                say(f"step {done}/{end}  loss {loss.item():.4f}")
            if done % _CHECKPOINT_EVERY_STEPS == 0 or done == end:
                state = {name: part.state_dict() for name, part in parts.items()}
                self._folder.save({**state, "step": done, "about": self._about}, CHECKPOINT)

    def _steps(self, first: int, end: int) -> Iterator[tuple[Lesson, NDArray[np.uint8]]]:
        """Lessons with their fragments, uint8 (N, H, W, 3), cut ahead of who asks for them."""
        if first >= end:
            return
        lessons = Lessons(self._features.labels, self._config)
        pictures = _Pictures(self._looks, self._config)

        def step(number: int) -> tuple[Lesson, NDArray[np.uint8]]:
            lesson = lessons(number)
            return lesson, pictures.at(lesson.chosen.tolist(), lesson.rng)

        yield from read_ahead(step, first, end)

    def _refuse_other(self, begun: Mapping[str, Any]) -> None:
        for name, value in self._about.items():
            if begun.get("about", {}).get(name) != value:
                raise ConfigError(
                    f"{self._folder.folder} was begun with something else as {name}: give the same "
                    "again, or another --run folder"
                )


def wanted_of(
    reference: onnx.ModelProto,
    features: Features,
    head: HeadConfig,
    config: FragmentsConfig,
    falls: NDArray[np.float64] | None,
) -> NDArray[np.float32]:
    """Logits (N,): what the head's teacher says, and of rated pictures partly what people said.

    ``falls``: logits (N,) of who says how far ladders fall, or None for the head of ``reference``.
    """
    wanted = wanted_logits(features, head, own=head_of(reference), former=falls)
    rated = ~np.isnan(features.labels.mos)
    people = logits_of(features.labels.mos[rated].astype(np.float64))
    wanted[rated] += config.rating_share * (people - wanted[rated])
    return wanted.astype(np.float32)


class _Pictures:
    """Fragments of any look: of rated pictures at new places each time, of ladders at a few."""

    def __init__(self, looks: Looks, config: FragmentsConfig) -> None:
        self._looks, self._places = looks, config.places
        self._view = next(v for v in looks.views if v.kind == "fragments")
        self._first = int((looks.labels.ladder < 0).sum())  # of ladders, which come last
        numbers = looks.labels.ladder[self._first :]
        num_ladders = int(numbers.max(initial=-1)) + 1
        rng = np.random.default_rng([config.seed, 1])
        jitters = [self._jitters(rng, config.places) for _ in range(num_ladders)]
        self._of_ladders = np.empty((len(numbers), config.places, *self._view.shape), np.uint8)
        for at, number in enumerate(numbers.tolist()):
            self._of_ladders[at] = self._cut(self._first + at, jitters[number])

    def at(self, chosen: Sequence[int], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Those of some looks, (N, H, W, 3), all mirrored in the same way or not at all."""
        place = int(rng.integers(self._places))
        cut = np.stack(
            [
                self._cut(look, self._jitters(rng, 1))[0]
                if look < self._first
                else self._of_ladders[look - self._first, place]
                for look in chosen
            ]
        )
        across, down = rng.integers(2, size=2).tolist()
        return np.ascontiguousarray(cut[:, :: 1 - 2 * down, :: 1 - 2 * across])

    def _jitters(self, rng: np.random.Generator, number: int) -> NDArray[np.float64]:
        return rng.uniform(0, 1, (number, self._view.rows, self._view.columns, 2))

    def _cut(self, number: int, jitters: NDArray[np.float64]) -> NDArray[np.uint8]:
        """One look's fragments at each of some places, (P, H, W, 3)."""
        pack, record, look = self._looks.drawn[number]
        share, is_mirrored = (look.crop_share, look.mirrored) if look else (_AS_SERVED, False)
        planes, name = pack.planes(record), self._view.name
        moved = [Look(share, is_mirrored, jitter) for jitter in jitters]
        return np.stack([views_of(planes, [self._view], each)[name] for each in moved])


def _kinds_of(looks: Looks) -> tuple[Tensor, int]:
    """The number of each look's kind of damage (N,), -1 for a rated picture; how many there are."""
    named = [
        record.degradation if ladder >= 0 else ""
        for (_, record, _), ladder in zip(looks.drawn, looks.labels.ladder, strict=True)
    ]
    numbers = {name: number for number, name in enumerate(sorted(set(named) - {""}))}
    return torch.tensor([numbers.get(name, -1) for name in named]), max(1, len(numbers))
