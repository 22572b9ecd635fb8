"""A float graph fine-tuned to bear TensorRT's symmetric INT8, its own float scores as the aim.

A range that a student was trained to round to by uint8 steps leaves symmetric int8 half as many
after a Relu. So the shipped float graph learns again with those coarser steps in place, by what it
said without them: pooled features and logit. Gradients pass straight through the rounding, and
each tensor's step is learnt with the weights (Esser et al. 2020, arXiv 1902.08153, section 2). No
label is read, and every output keeps its meaning, for all of them read the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError
from quant.calibration import Views
from quant.calibration_methods import Spans
from quant.correction import head_nodes, replace_constant
from quant.extra_outputs import remove_outputs_
from quant.onnx_module import OnnxModule
from quant.qat import WEIGHT_LEVELS, on_grid, symmetric_scale

_SMALLEST_RMS = 1e-3
_LARGEST_GRADIENT = 5.0
_SAY_EVERY = 10


class TuneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a graph learns its coarser steps. Saved in the artefact's manifest."""

    num_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    """0 leaves the weights alone."""
    batch: Annotated[int, msgspec.Meta(ge=1)] = 8
    rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1e-3
    """Largest step of each tensor, as a share of its own RMS."""
    scale_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-2
    """Largest step of each activation's scale, as a share of it."""
    logit_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Of the squared difference of logits, beside that of standardised features."""
    seed: int = 1


class _Steps(torch.autograd.Function):
    """To the nearest of -127 to 127 times a scale, with gradients for both.

    Values inside the range pass theirs on; the scale's is that of x/s rounded less x/s inside and
    of the end itself beyond. Written out, as autograd's own chain took twice the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        """``x`` of any shape, ``scale`` ()."""
        y = x.div(scale).round_().clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS).mul_(scale)
        ctx.save_for_backward(x, scale, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, scale, y = ctx.saved_tensors
        inside = gradient.masked_fill(x.abs() > WEIGHT_LEVELS * scale, 0)
        of_scale = (gradient * y).sum() - (inside * x).sum()
        return inside, of_scale / scale


class RoundingModule(OnnxModule):
    """A graph that rounds as :func:`~quant.tensorrt.quantize.quantize_for_tensorrt` will.

    Weights of convolutions and what convolutions read are rounded, to whoever reads it; weights,
    biases and the scales of what is read are parameters.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        spans: Spans,
        *,
        fixed: Sequence[str] = (),
        float_nodes: Sequence[str] = (),
    ) -> None:
        """``spans`` has each tensor that a rounded convolution reads; ``fixed`` are not learnt.

        Raises ``ValueError`` where one is missing.
        """
        super().__init__(model)
        convs = [n for n in model.graph.node if n.op_type == "Conv" and n.name not in float_nodes]
        read = list(dict.fromkeys(n.input[0] for n in convs))
        missing = [name for name in read if name not in spans]
        if missing:
            raise ValueError(f"no span of {missing[0]}, which a convolution reads")
        self.on_grid = frozenset(n.input[1] for n in convs)
        self.trained = list(dict.fromkeys(name for n in convs for name in n.input[1:] if name))
        for name in self.trained:
            slot = self._slots[name]
            values = getattr(self, slot)
            delattr(self, slot)
            self.register_parameter(slot, nn.Parameter(values))
        self._places = {name: i for i, name in enumerate(read)}
        start = torch.tensor([symmetric_scale(*spans[name]) for name in read])
        self.log_scales = nn.ParameterList(
            nn.Parameter(s.log(), requires_grad=name not in fixed)
            for name, s in zip(read, start, strict=True)
        )

    def stored(self, name: str) -> Tensor:
        """See :class:`OnnxModule`."""
        value = super().stored(name)
        if name not in self.on_grid:
            return value
        unrounded = value.detach()
        return value + (on_grid(unrounded) - unrounded)  # gradients as if unrounded

    def passed_on(self, name: str, made: Tensor) -> Tensor:
        """See :class:`OnnxModule`."""
        place = self._places.get(name)
        if place is None:
            return made
        rounded: Tensor = _Steps.apply(made, self.log_scales[place].exp())
        return rounded

    def spans(self) -> dict[str, tuple[float, float]]:
        """Of each tensor that is rounded, what its scale reaches."""
        reach = [WEIGHT_LEVELS * float(s.detach().exp()) for s in self.log_scales]
        return {name: (-reach[i], reach[i]) for name, i in self._places.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """What was trained, by the names of the graph; weights of convolutions on their grid."""
        return {name: self.stored(name).detach().numpy() for name in self.trained}


def features_and_logit(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a student's graph whose outputs are its pooled features and its logit."""
    core = onnx.ModelProto.FromString(graph.SerializeToString())
    remove_outputs_(core)
    hidden, quality = head_nodes(core)
    del core.graph.output[:]
    for name in (hidden.input[0], quality.output[0]):
        core.graph.output.append(onnx.ValueInfoProto(name=name))
    return core


def tune_for_tensorrt(
    graph: onnx.ModelProto,
    config: TuneConfig,
    spans: Spans,
    batches: Callable[[int], Views],
    *,
    fixed: Sequence[str] = (),
    float_nodes: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[onnx.ModelProto, Spans]:
    """The graph with other weights, on INT8's grid, and the spans to round its activations by.

    ``batches`` gives the views of a step (uint8, any number of pictures), ``spans`` where the
    scales begin; those of ``fixed`` stay; ``tell`` hears how far it is. Raises :class:`ModelError`
    where the loss is no longer a number.
    """
    core = features_and_logit(graph)
    aim = OnnxModule(core).eval()
    model = RoundingModule(core, spans, fixed=fixed, float_nodes=float_nodes)
    _fit_(model, aim, config, batches, tell)
    tuned = onnx.ModelProto.FromString(graph.SerializeToString())
    for name, values in model.weights().items():
        replace_constant(tuned, name, values)
    return tuned, model.spans()


def _fit_(
    model: RoundingModule,
    aim: OnnxModule,
    config: TuneConfig,
    batches: Callable[[int], Views],
    tell: Callable[[str], None],
) -> None:
    optimiser = torch.optim.Adam(_groups(model, config))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, config.num_steps))
    spread: Tensor | None = None
    for step in range(config.num_steps):
        views = batches(step)
        pictures = [torch.from_numpy(views[name]) for name in aim.input_names]
        with torch.no_grad():
            wanted = aim(*pictures)
        spread = _spread(wanted[0], spread)
        found = model(*pictures)
        of_features = ((found[0] - wanted[0]).square() / spread).mean()
        loss = of_features + config.logit_weight * F.mse_loss(found[1], wanted[1])
        if not torch.isfinite(loss):
            raise ModelError(f"the loss became {loss.item()} at step {step}: lower tune.rate")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
        optimiser.step()
        schedule.step()
        if step % _SAY_EVERY == 0:
            tell(f"step {step}/{config.num_steps}  loss {loss.item():.4f}")


def _spread(features: Tensor, known: Tensor | None) -> Tensor:
    """Variance of each feature over pictures, (F,), averaged over steps; no feature counts alone.

    A feature that hardly varies is not to be learnt to the last digit.
    """
    now = features.var(0, unbiased=False)
    now = now.clamp_min(float(now.mean()) * 1e-2 + 1e-12)
    return now if known is None else 0.9 * known + 0.1 * now


def _groups(model: RoundingModule, config: TuneConfig) -> list[dict[str, Any]]:
    """A rate for each tensor in proportion to its own size: nothing absorbs a step's shift."""
    scales = set(model.log_scales.parameters())
    moving = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p], "lr": config.scale_rate if p in scales else config.rate * _rms(p)}
        for p in moving
    ]


def _rms(values: Tensor) -> float:
    return max(_SMALLEST_RMS, float(values.detach().square().mean().sqrt()))
