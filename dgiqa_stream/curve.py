"""CURVE encryption for ZeroMQ: keys from a folder, and the gate that admits known clients.

A publisher's folder holds ``server.key_secret`` and the public ``*.key`` of each client that may
subscribe; a subscriber's holds ``server.key`` and ``client.key_secret``. One folder can be both.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dgiqa_stream.errors import ConfigError

if TYPE_CHECKING:
    import zmq

_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # ZeroMQ RFC 27
_ZAP_DOMAIN = b"dgiqa"
_NUM_ZAP_PARTS = 9  # identity, empty, version, request, domain, address, identity, mechanism, key
_MAX_ANSWERS = 100  # at once, so that a flood of clients cannot hold up publishing

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A publisher's keys and the clients it admits; all in Z85, 40 characters."""

    public: bytes
    secret: bytes = field(repr=False)
    clients: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A subscriber's keys and the publisher it trusts; all in Z85, 40 characters."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


def make_keys(folder: Path, name: str) -> Path:
    """Write ``name.key`` and, readable by its owner alone, ``name.key_secret``; returns the latter.

    ``name`` is ``server`` or a client's. Raises :class:`ConfigError` rather than overwrite a key.
    """
    from zmq.auth import create_certificates

    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):  # nor a path out of the folder
        raise ConfigError(f"{name!r} names no key: use letters, digits, dots, dashes, underscores")
    secret = folder / f"{name}.key_secret"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        create_certificates(folder, name)
    except FileExistsError as exc:
        raise ConfigError(f"{secret} exists: remove it first to replace the key") from exc
    except OSError as exc:
        raise ConfigError(f"cannot write keys to {folder}: {exc.strerror}") from exc
    return secret


def load_server_keys(folder: Path) -> ServerKeys:
    """A publisher's keys; raises :class:`ConfigError` naming the file that is missing or wrong."""
    key = "publish.curve_dir"
    public, secret = _load_pair(folder / "server.key_secret", key)
    others = [path for path in sorted(folder.glob("*.key")) if path.name != "server.key"]
    if not others:
        raise ConfigError(f"{folder} holds no client's *.key: copy each allowed client's there")
    return ServerKeys(public, secret, frozenset(_load(path, key)[0] for path in others))


def load_client_keys(folder: Path) -> ClientKeys:
    """A subscriber's keys; raises :class:`ConfigError` naming the file that is missing or wrong."""
    public, secret = _load_pair(folder / "client.key_secret", "curve_dir")
    return ClientKeys(public, secret, _load(folder / "server.key", "curve_dir")[0])


def secure_server(socket: zmq.Socket[bytes], keys: ServerKeys) -> None:
    """Make a socket, before it binds, admit only what a :class:`ClientGate` admits."""
    import zmq

    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = _ZAP_DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gate nobody, instead of everybody


def secure_client(socket: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Make a socket, before it connects, trust this one publisher."""
    socket.curve_serverkey = keys.server
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret


class ClientGate:
    """Answers ZeroMQ's question whether a client may connect (ZAP, ZeroMQ RFC 27).

    Not pyzmq's ThreadAuthenticator, because that starts a thread: whoever owns the gate calls
    :meth:`answer` a few times a second, and a client waits that long. Not thread-safe.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], clients: frozenset[bytes]) -> None:
        """Serves the sockets of ``context``, which must not bind before."""
        import zmq

        self.num_refused = 0
        self._clients = clients
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ADDRESS)

    def answer(self) -> None:
        """Answer what has been asked so far; never blocks."""
        import zmq

        for _ in range(_MAX_ANSWERS):
            try:
                question = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._verdict(question), zmq.NOBLOCK)

    def close(self) -> None:
        """Release the socket; from then on nobody new is admitted."""
        self._socket.close()

    def _verdict(self, question: list[bytes]) -> list[bytes]:
        from zmq.utils import z85

        route, request, address = question[:2], question[3], question[5]
        known = (
            len(question) == _NUM_ZAP_PARTS
            and question[7] == b"CURVE"
            and z85.encode(question[8]) in self._clients
        )
        if not known:
            self.num_refused += 1
            _log.info("refused a subscriber at %s: unknown key", address.decode("ascii", "replace"))
        status, text = (b"200", b"OK") if known else (b"400", b"unknown key")
        return [*route, b"1.0", request, status, text, b"", b""]


def _load_pair(path: Path, key: str) -> tuple[bytes, bytes]:
    public, secret = _load(path, key)
    if secret is None:
        raise ConfigError(f"{path} holds no secret key: make a pair again")
    return public, secret


def _load(path: Path, key: str) -> tuple[bytes, bytes | None]:
    """A public key and, where the file has it, the secret one; ``key`` is the setting to name."""
    from zmq.auth import load_certificate

    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"{key}: no CURVE key in {path}: copy it there, or make a pair with `dgiqa-stream keys`"
        ) from exc
    if any(part is not None and len(part) != 40 for part in (public, secret)):
        raise ConfigError(f"{key}: {path} holds a damaged key: a key has 40 characters")
    return public, secret
