"""The pyramids a teacher can look through: timm's, and the MobileNetV2 the student starts from.

A pyramid takes ImageNet-normalised RGB (B, 3, H, W) and gives feature maps that get smaller; a
teacher reads the last four. Weights are random unless asked for otherwise.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError
from distill.models.trunks import (
    CHANNELS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INPUT_MEAN,
    INPUT_STD,
    Trunk,
    load_imagenet_,
)

SWIN = "swin_tiny_patch4_window7_224"
MOBILENETV2 = "mobilenetv2"
NUM_STAGES = 4


class MobileNetPyramid(nn.Module):
    """MobileNetV2 (Gluon's variant) up to its last bottleneck, at strides 4, 8, 16 and 32."""

    STAGE_ENDS = (2, 9, 12, 16)
    """Bottlenecks after which the next one halves the picture, and the last."""

    def __init__(self) -> None:
        super().__init__()
        trunk = Trunk(normalised=True)
        self.stem, self.blocks = trunk.stem, trunk.blocks  # the last convolution is not read
        # ImageNet's normalised colour, as it comes, to the trunk's own: x * gain + shift
        std, mean = torch.tensor(IMAGENET_STD) * 255, torch.tensor(IMAGENET_MEAN) * 255
        self.register_buffer("gain", (std / INPUT_STD)[:, None, None], persistent=False)
        self.register_buffer(
            "shift", ((mean - INPUT_MEAN) / INPUT_STD)[:, None, None], persistent=False
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return tuple(CHANNELS[j] for j in self.STAGE_ENDS)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to 24, 64, 96 and 320 channels, (B, C_j, H/s, W/s) for s in 4, 8, 16, 32."""
        maps = []
        x = F.relu(self.stem(x * self.gain + self.shift))  # (B, 32, H/2, W/2)
        for j, block in enumerate(self.blocks):
            x = block(x)  # (B, C_j, H/2..H/32, W/2..W/32)
            if j in self.STAGE_ENDS:
                maps.append(x)
        return maps


def make_pyramid(name: str, *, pretrained: bool = False) -> nn.Module:
    """A pyramid by name: ``mobilenetv2`` or any timm network with ``features_only``.

    ``pretrained`` lets timm fetch its weights. Raises :class:`ConfigError` for a name that timm
    does not know or that gives fewer than four maps, :class:`ModelError` where weights cannot be
    fetched, and :class:`BackendUnavailable` without timm.
    """
    if name == MOBILENETV2:
        return MobileNetPyramid()
    try:
        import timm
    except ImportError as exc:
        raise BackendUnavailable(
            f"backbone {name!r} needs {exc.name!r}: pip install 'dgiqa-stream[teacher]'"
        ) from exc
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), MOBILENETV2], 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"unknown backbone {name!r}; {hint}")
    hush_hub()
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, features_only=True)
    except OSError as exc:
        raise not_fetched(name, exc) from exc
    except (RuntimeError, AssertionError, AttributeError, TypeError) as exc:
        # what timm raises, by kind of network, where one cannot give features
        raise ConfigError(f"backbone {name} gives no feature maps: choose another") from exc
    if len(net.feature_info.channels()) < NUM_STAGES:
        raise ConfigError(
            f"backbone {name} gives {len(net.feature_info.channels())} feature maps, and a "
            f"teacher reads {NUM_STAGES}: choose another"
        )
    return net


def pyramid_channels(net: nn.Module) -> list[int]:
    """Channels of the four maps that :func:`pyramid_maps` gives."""
    if isinstance(net, MobileNetPyramid):
        return list(net.channels)
    return list(net.feature_info.channels()[-NUM_STAGES:])


def pyramid_maps(net: nn.Module, x: Tensor) -> list[Tensor]:
    """(B, 3, H, W) to the last four maps, each (B, C_j, H_j, W_j) whatever the network's layout."""
    layout: Literal["NCHW", "NHWC"] = getattr(net, "output_fmt", "NCHW")
    maps = net(x)[-NUM_STAGES:]
    return [m.permute(0, 3, 1, 2) for m in maps] if layout == "NHWC" else list(maps)


def load_mobilenetv2_(net: nn.Module, weights: Path) -> None:
    """Fill a :class:`MobileNetPyramid` from the ImageNet ``.npz``.

    Raises ``ValueError`` where the file or the network is something else.
    """
    if not isinstance(net, MobileNetPyramid):
        raise ValueError(f"{weights} fits backbone {MOBILENETV2}, not {type(net).__name__}")
    trunk = Trunk(normalised=True)
    load_imagenet_(trunk, weights)
    net.stem.load_state_dict(trunk.stem.state_dict())
    net.blocks.load_state_dict(trunk.blocks.state_dict())


def hush_hub() -> None:
    """Keep the hub's library from telling of each of its attempts: the last one is told."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def not_fetched(name: str, exc: OSError) -> ModelError:
    """What to say where timm found no weights of a network."""
    reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return ModelError(
        f"timm cannot fetch weights of {name} ({reason}): download them where there is a network, "
        "then give the file (--backbone, --vit), or set pretrained = false"
    )
