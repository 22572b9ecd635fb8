"""Which streams are watched, and what can be known to be wrong before one is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from dgiqa_stream.cli._outputs import refuse_outputs_that_clash
from dgiqa_stream.errors import ConfigError, DgiqaError

if TYPE_CHECKING:
    from dgiqa_stream.config import StreamConfig, StreamEntry


def entries_of(urls: list[str], ids: list[str], settings: StreamConfig) -> list[StreamEntry]:
    """The streams of the command line, or else of the file; each with an id of its own."""
    from dgiqa_stream.config import StreamEntry

    if ids and len(ids) != len(urls):
        raise ConfigError(f"{len(ids)} --id for {len(urls)} URLs: name each URL, in order, or none")
    named = [StreamEntry(u, i) for u, i in zip_longest(urls, ids)]
    entries = named or list(settings.stream)
    if not entries:
        raise ConfigError("nothing to watch: give a URL, or [[stream]] tables in --config FILE")
    return _with_ids(entries)


def _with_ids(entries: list[StreamEntry]) -> list[StreamEntry]:
    import msgspec

    from dgiqa_stream.config import StreamId
    from dgiqa_stream.urls import stream_id_of

    taken: set[str] = set()
    unique = []
    for entry in entries:
        name = entry.id or stream_id_of(entry.url)
        try:
            msgspec.convert(name, StreamId)
        except msgspec.ValidationError:
            raise ConfigError(
                f"stream id {name!r} is not 1 to 64 letters, digits, dots, dashes or underscores"
            ) from None
        if name in taken:
            raise ConfigError(f"two streams are named {name!r}: give each an id of its own")
        taken.add(name)
        unique.append(msgspec.structs.replace(entry, id=name))
    return unique


def check_entries(entries: list[StreamEntry], settings: StreamConfig) -> None:
    """Raise :class:`ConfigError` for a URL, option or output that cannot be meant."""
    from dgiqa_stream.inputs import refuse_empty
    from dgiqa_stream.sources import check_options

    for entry in entries:
        refuse_empty(entry.url)
        check_options(entry.url, settings.source.options)
        check_options(entry.url, entry.options, key=f"options of the stream {entry.id}")
    refuse_outputs_that_clash(settings, [entry.url for entry in entries])


def check_settings(settings: StreamConfig) -> None:
    """Raise what ``watch`` would raise, as far as it can be known without opening a source or port.

    The model is opened, on its device: another machine may judge otherwise.
    """
    from dgiqa_stream.scorer import scorer_of
    from dgiqa_stream.sinks.zeromq import check_publishing
    from dgiqa_stream.sources import check_scheme

    check_entries(_with_ids(list(settings.stream)), settings)
    for entry in settings.stream:
        check_scheme(entry.url)
    if settings.publish.endpoint:
        check_publishing(settings.publish)
    scorer_of(settings.model).close()


@contextlib.contextmanager
def as_in_file(file: Path) -> Iterator[None]:
    """What is raised in the block names the file, and is about settings: :class:`ConfigError`."""
    try:
        yield
    except DgiqaError as exc:
        raise ConfigError(f"{file}: {exc}") from exc
