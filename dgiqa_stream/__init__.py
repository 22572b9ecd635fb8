"""Real-time, no-reference quality of live video: frames in, scores from 0 to 100 out.

The public names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgiqa_stream.config import StreamConfig, load_config
    from dgiqa_stream.errors import (
        BackendUnavailable,
        ConfigError,
        DeviceLost,
        DgiqaError,
        FrameLost,
        ModelError,
        SinkError,
        SourceError,
        SourceUnavailable,
        SourceUnsupported,
    )
    from dgiqa_stream.manifest import ModelManifest
    from dgiqa_stream.pipeline import Monitor
    from dgiqa_stream.pooling import POOLERS
    from dgiqa_stream.scorer import Scorer, load_scorer
    from dgiqa_stream.sources import open_source
    from dgiqa_stream.subscriber import Subscriber
    from dgiqa_stream.telemetry import Telemetry
    from dgiqa_stream.types import (
        Crop,
        Frame,
        FrameInfo,
        FrameScore,
        Planes,
        StreamInfo,
        WindowScore,
    )

_HOMES = {
    "config": ("StreamConfig", "load_config"),
    "errors": (
        "BackendUnavailable",
        "ConfigError",
        "DeviceLost",
        "DgiqaError",
        "FrameLost",
        "ModelError",
        "SinkError",
        "SourceError",
        "SourceUnavailable",
        "SourceUnsupported",
    ),
    "manifest": ("ModelManifest",),
    "pipeline": ("Monitor",),
    "pooling": ("POOLERS",),
    "scorer": ("Scorer", "load_scorer"),
    "sources": ("open_source",),
    "subscriber": ("Subscriber",),
    "telemetry": ("Telemetry",),
    "types": ("Crop", "Frame", "FrameInfo", "FrameScore", "Planes", "StreamInfo", "WindowScore"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "POOLERS",
    "BackendUnavailable",
    "ConfigError",
    "Crop",
    "DeviceLost",
    "DgiqaError",
    "Frame",
    "FrameInfo",
    "FrameLost",
    "FrameScore",
    "ModelError",
    "ModelManifest",
    "Monitor",
    "Planes",
    "Scorer",
    "SinkError",
    "SourceError",
    "SourceUnavailable",
    "SourceUnsupported",
    "StreamConfig",
    "StreamInfo",
    "Subscriber",
    "Telemetry",
    "WindowScore",
    "load_config",
    "load_scorer",
    "open_source",
]


if not TYPE_CHECKING:  # a type checker should refuse a name that is not above

    def __getattr__(name: str) -> object:
        """Load a public name's module on first use."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"dgiqa_stream.{_HOME_OF[name]}")
        value: object = getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """The public names, loaded or not."""
        return sorted({*globals(), *__all__})
