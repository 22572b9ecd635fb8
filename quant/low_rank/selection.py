"""Which layers of a model may be factored, and changes that are undone where something fails."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgiqa_stream.errors import ConfigError, ModelError
from quant.low_rank.attention import SplitAttention, can_split
from quant.low_rank.config import LowRankConfig
from quant.low_rank.layers import Layer, kind_of, replace_


class Changes:
    """Modules put in place of others in one model, and the way back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._former: list[tuple[str, nn.Module]] = []

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module at a name."""
        self._former.append((name, replace_(self._model, name, module)))

    def undo(self, name: str | None = None) -> None:
        """Put back what was at a name, or everything."""
        for place, module in reversed(self._former):
            if name in (None, place):
                replace_(self._model, place, module)
        self._former = [f for f in self._former if name not in (None, f[0])]


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[Changes]:
    """Changes, and new statistics of BatchNorms, that stay only where the block ends well."""
    changes = Changes(model)
    kept = [(b, b.clone()) for b in _statistics(model)]
    try:
        yield changes
    except BaseException:
        changes.undo()
        with torch.no_grad():
            for now, before in kept:
                now.copy_(before)
        raise


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """Everything that BatchNorms hold beside their parameters."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            yield from module.buffers(recurse=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; each module's own mode comes back."""
    modes, mode = {m: m.training for m in model.modules()}, model.training
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, mode)


def split_attentions_(model: nn.Module, changes: Changes) -> list[str]:
    """Give every attention layers for query, key, value and output; the names of those split."""
    names = [
        name
        for name, m in model.named_modules()
        if type(m) is nn.MultiheadAttention and can_split(m)
    ]
    for name in names:
        source = model.get_submodule(name)
        assert isinstance(source, nn.MultiheadAttention)
        changes.replace(name, SplitAttention(source))
    return names


def selected_layers(model: nn.Module, config: LowRankConfig) -> dict[str, Layer]:
    """The layers that a config names, in the model's order.

    A module that stands at two places is none: its weights belong to both. Raises
    :class:`ConfigError` for a pattern that matches nothing at all, :class:`ModelError` for a name
    of something that cannot be factored.
    """
    modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n]
    places = Counter(id(m) for _, m in modules)
    for pattern in config.include:
        _check_pattern(pattern, dict(modules), key="include")
        if [n for n, _ in modules if fnmatchcase(n, pattern)] == [pattern]:
            _check_kind(pattern, model.get_submodule(pattern))
    for pattern in config.exclude:
        _check_pattern(pattern, dict(modules), key="exclude")
    return {
        name: m
        for name, m in modules
        if kind_of(m) is not None
        and isinstance(m, nn.Linear | nn.Conv2d)
        and places[id(m)] == 1
        and any(fnmatchcase(name, p) for p in config.include)
        and not any(fnmatchcase(name, p) for p in config.exclude)
    }


def _check_pattern(pattern: str, modules: dict[str, nn.Module], *, key: str) -> None:
    if any(fnmatchcase(n, pattern) for n in modules):
        return
    near = difflib.get_close_matches(pattern, modules, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else "see model.named_modules()"
    raise ConfigError(f"{key} {pattern!r} matches no module of the model; {hint}")


def _check_kind(name: str, module: nn.Module) -> None:
    if kind_of(module) is None:
        raise ModelError(
            f"{name} is a {type(module).__name__} and cannot be factored: name a "
            "plain nn.Linear or nn.Conv2d, of nn.MultiheadAttention its q, k, v or out (fold or "
            "unwrap anything else first)"
        )
