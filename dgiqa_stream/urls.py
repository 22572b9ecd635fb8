"""Names of sources: their scheme, a safe id, and a form without secrets for messages."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters or more: C:\ is a drive
_OPAQUE = re.compile(r"^(camera|pattern|file):", re.IGNORECASE)
_HOST = re.compile(r"^(\[[0-9A-Fa-f:.%a-z]+\]|[^\s:@/]*)(:\d+)?$")
_SECRET = (
    r"token|key|sig|pass|pwd|secret|auth|credential|session|sess|jwt|streamid|policy|code|hash|user"
)
_SECRET_VALUE = re.compile(rf"([?&;#][^=&;#?]*(?:{_SECRET})[^=&;#?]*=)[^&;]*", re.IGNORECASE)
_URL_IN_TEXT = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_ID_LENGTH = 64


def scheme_of(url: str) -> str:
    """The kind of source: a URL's scheme, ``stdin`` for ``-``, ``sdp``, or ``file`` for a path."""
    if url == "-":
        return "stdin"
    found = _SCHEME.match(url) or _OPAQUE.match(url)
    scheme = found.group(1).lower() if found else "file"
    return "sdp" if scheme == "file" and url.lower().endswith(".sdp") else scheme


def path_of(url: str) -> Path:
    """The local path of a ``file`` or ``sdp`` source, given as a path or as ``file://…``."""
    if url.lower().startswith("file://"):
        return Path(unquote(re.sub(r"^/(?=[A-Za-z]:)", "", urlsplit(url).path)))
    return Path(url[5:]) if url.lower().startswith("file:") else Path(url)


def redact(url: str) -> str:
    """The URL for messages: no ``user:password``, no secret-looking query value, one line."""
    found = _SCHEME.match(url)
    if not found:
        return _CONTROL.sub("?", _SECRET_VALUE.sub(r"\1***", url) if _OPAQUE.match(url) else url)
    rest = url[found.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not _HOST.match(authority):
        # A password may itself hold / ? # or @ unescaped: nothing before the last @ is shown.
        rest = rest.rpartition("@")[2] if "@" in rest else "***"
    return _CONTROL.sub("?", found.group(0) + _SECRET_VALUE.sub(r"\1***", rest))


def redact_text(text: str) -> str:
    """Text of another program with every URL in it redacted, on one line."""
    return _URL_IN_TEXT.sub(lambda found: redact(found.group(0)), _CONTROL.sub(" ", text)).strip()


def stream_id_of(url: str) -> str:
    """A stream's id (``[A-Za-z0-9._-]{1,64}``) from its URL or path, without credentials.

    ``rtsp://admin:pw@cam1:554/live`` gives ``cam1-554-live``, ``/videos/a.mp4`` gives ``a``.
    """
    scheme = scheme_of(url)
    if scheme == "stdin":
        return scheme
    if scheme in ("file", "sdp"):
        name = path_of(url).stem
    elif scheme in ("camera", "pattern"):
        name = url.partition("?")[0]
    else:
        name = re.split(r"[?#]", redact(url).partition("://")[2], maxsplit=1)[0]
    safe = _NOT_IN_ID.sub("-", name).strip("-.")
    if safe and len(safe) <= _MAX_ID_LENGTH:
        return safe
    digest = hashlib.sha256(redact(url).encode("utf-8", "replace")).hexdigest()[:8]
    return f"{safe[: _MAX_ID_LENGTH - 9] or 'stream'}-{digest}"
