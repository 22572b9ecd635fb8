"""ZeroMQ addresses as people write them: ``tcp://``, ``ipc://``, and who binds."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

from dgiqa_stream.errors import ConfigError

Role = Literal["pub", "sub"]
_GRAMMAR = "tcp://HOST:PORT or ipc://PATH, with {role}+bind: or {role}+connect: before it at will"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a socket binds or connects."""

    address: str
    """What ZeroMQ is given: ``tcp://HOST:PORT`` or ``ipc://PATH``."""
    binds: bool

    @property
    def host(self) -> str:
        """The host of a TCP address without brackets; empty for ipc."""
        if not self.address.startswith("tcp://"):
            return ""
        return self.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")

    @property
    def ipc_path(self) -> str:
        """The path of an ipc address, ``*`` for one that ZeroMQ chooses; empty for TCP."""
        return self.address.removeprefix("ipc://") if self.address.startswith("ipc://") else ""

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is an IPv6 address."""
        return ":" in self.host

    @property
    def is_local(self) -> bool:
        """Whether only this machine can be at the other end."""
        if self.ipc_path or self.host in ("localhost", "lo"):
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # an interface, a wildcard or a name
            return False


def parse_endpoint(text: str, *, role: Role) -> Endpoint:
    """Read an endpoint; a plain address binds for ``pub`` and connects for ``sub``.

    Raises :class:`ConfigError` naming the rule.
    """
    prefix, mark, address = text.partition(":")
    binds = role == "pub"
    shown = f"publish.endpoint {text!r}" if binds else f"endpoint {text!r}"
    if mark and "+" in prefix:
        binds = _binds(shown, prefix, role)
    else:
        address = text
    scheme, _, place = address.partition("://")
    if scheme == "tcp":
        _check_tcp(shown, place, binds)
    elif scheme != "ipc" or not place or place.startswith("@") or (place == "*" and not binds):
        raise ConfigError(f"{shown} is not {_GRAMMAR.format(role=role)}")
    return Endpoint(address, binds)


def _binds(shown: str, prefix: str, role: Role) -> bool:
    spoken, _, verb = prefix.partition("+")
    if spoken != role or verb not in ("bind", "connect"):
        raise ConfigError(f"{shown}: {prefix}: is not one of {role}+bind:, {role}+connect: here")
    return verb == "bind"


def _check_tcp(shown: str, place: str, binds: bool) -> None:
    host, _, port = place.rpartition(":")
    if not host or (host == "*" and not binds):
        raise ConfigError(f"{shown} is not tcp://HOST:PORT: the host is missing")
    if port == "*" and binds:
        return
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        free = ", or * for a free one" if binds else ""
        raise ConfigError(f"{shown}: port {port!r} is not 1 to 65535{free}")
