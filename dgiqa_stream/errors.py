"""Everything this package raises on purpose.

* DgiqaError
  + ConfigError            a setting is unknown, missing or out of range
  + SourceError            the stream or file cannot be read
    - SourceUnavailable    cannot be opened or went away; retrying may help
    - SourceUnsupported    opened, but nothing here can decode it
  + ModelError             the model and its manifest disagree, or the model cannot run
    - BackendUnavailable   the engine asked for is not installed or has no device
    - DeviceLost           the device went away while running; this engine is done
    - FrameLost            one picture was on such a device; others can be scored
  + SinkError              scores cannot be written or published

A message names the value, the rule it broke and the next step, and never a password.
"""

from __future__ import annotations


class DgiqaError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(DgiqaError):
    """A setting is unknown, missing or out of range."""


class SourceError(DgiqaError):
    """The stream or file cannot be read."""


class SourceUnavailable(SourceError):
    """The source cannot be opened now, or went away; retrying may help."""


class SourceUnsupported(SourceError):
    """The source was reached, but nothing here can decode it; retrying will not help."""


class ModelError(DgiqaError):
    """The model and its manifest disagree, or the model cannot run."""


class BackendUnavailable(ModelError):
    """The engine asked for is not installed, or the machine has no device for it."""


class DeviceLost(ModelError):
    """The device failed while running and will not come back; another engine may go on."""


class FrameLost(ModelError):
    """A picture that lay on a device cannot be read any more; those that follow can."""


class SinkError(DgiqaError):
    """Scores cannot be written or published."""
