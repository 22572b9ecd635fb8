"""Which options FFmpeg knows: it ignores the others without a word.

PyAV neither lists options nor tells which ones were left over, so FFmpeg's own tables are asked,
in the libraries that PyAV has loaded. They say that an option exists, not that the format or
protocol of one stream heeds it.
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.urls import redact_text

_FOR_WRITING, _FOR_READING = 1, 2  # AV_OPT_FLAG_ENCODING_PARAM, AV_OPT_FLAG_DECODING_PARAM
_ALSO_IN_FORMATS_AND_PROTOCOLS = 1 | 2  # AV_OPT_SEARCH_CHILDREN | AV_OPT_SEARCH_FAKE_OBJ


_WHERE = "see FFmpeg's formats and protocols"
_SIMILAR = 0.8  # of difflib's ratio: a slip of the fingers, not another word


def refuse_unknown_options(options: Mapping[str, str], *, key: str, advice: str = "") -> None:
    """Raise :class:`ConfigError` for an option that FFmpeg would ignore, naming a similar one.

    ``key`` is the setting that holds them, ``advice`` what to do where none is similar. Where
    FFmpeg cannot be asked (its symbols are not reachable), nothing is refused.
    """
    library = _libraries() if options else None
    for name in options if library else ():
        if not _is_known(library, name):
            near = difflib.get_close_matches(name, _names(library), 1, _SIMILAR)
            hint = f"did you mean {near[0]}?" if near else advice or _WHERE
            raise ConfigError(f"{key}: FFmpeg has no option {redact_text(name)!r}; {hint}")


@functools.cache
def _libraries() -> Any:
    """FFmpeg's functions: a symbol is also looked up in what PyAV's module was linked to."""
    import av.container.core

    try:
        library = ctypes.CDLL(av.container.core.__file__)
        library.avformat_get_class.restype = ctypes.c_void_p
        library.av_opt_find2.restype = ctypes.c_void_p
        library.av_opt_next.restype = ctypes.c_void_p
        library.av_opt_child_class_iterate.restype = ctypes.c_void_p
    except (OSError, AttributeError):  # built or loaded in another way
        return None
    return library


def _is_known(library: Any, name: str) -> bool:
    """Whether something that reads has the option; a few are marked neither way."""
    return _has(library, name, _FOR_READING) or (
        _has(library, name, 0) and not _has(library, name, _FOR_WRITING)
    )


def _has(library: Any, name: str, flags: int) -> bool:
    general = ctypes.c_void_p(library.avformat_get_class())
    found = library.av_opt_find2(
        ctypes.byref(general), os.fsencode(name), None, flags, _ALSO_IN_FORMATS_AND_PROTOCOLS, None
    )
    return bool(found)


def _names(library: Any) -> list[str]:
    """Every option that something that reads has."""
    found = {name for kind in _classes(library) for name in _names_of(library, kind)}
    return sorted(name for name in found if _is_known(library, name))


def _classes(library: Any) -> Iterator[ctypes.c_void_p]:
    """The classes with options: the general one, then those of formats and protocols."""
    general = ctypes.c_void_p(library.avformat_get_class())
    yield general
    cursor = ctypes.c_void_p()
    while child := library.av_opt_child_class_iterate(general, ctypes.byref(cursor)):
        yield ctypes.c_void_p(child)


def _names_of(library: Any, kind: ctypes.c_void_p) -> Iterator[str]:
    option = None
    while option := library.av_opt_next(ctypes.byref(kind), ctypes.c_void_p(option)):
        name = ctypes.cast(option, ctypes.POINTER(ctypes.c_char_p))[0]  # AVOption's first field
        yield name.decode()
