"""Addresses of servers as people write them, and their form for gRPC."""

import ipaddress
import re

from serving.client.errors import InvalidRequest, brief

DEFAULT_PORT = 8001
_MAX_PORT = 65535
# The names that gRPC itself resolves.
_GRPC_SCHEMES = ("unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:", "vsock:", "google-c2p:")
_PLAIN_SCHEMES = frozenset({"grpc", "http", "tcp"})
_ENCRYPTED_SCHEMES = frozenset({"grpcs", "https"})
_EXPECTED = "expected HOST:PORT or unix:PATH"
_HOST = re.compile(r"[\w.-]+")
_IPV6 = re.compile(r"[0-9a-f:.]+(%\w+)?", re.IGNORECASE)
_BRACKETS = re.compile(r"(\[[^\]]*\])(?::(.*))?")


def target_of(address: str, tls: bool) -> str:
    """Return the name of a server for gRPC: HOST:PORT, or one that begins with a scheme of gRPC.

    The schemes of URLs are left out, and a missing port is DEFAULT_PORT. Raises InvalidRequest, which says in one line
    what is wrong.
    """
    if not isinstance(address, str):
        raise _refused(address, _EXPECTED)
    text = address.strip()
    if not text:
        raise InvalidRequest(f"address: empty; {_EXPECTED}", field="address")
    if text.startswith("/") and not text.startswith("//"):
        return f"unix:{text}"
    if text.startswith(_GRPC_SCHEMES):
        return _checked(text)
    if text.startswith("dns:"):
        head, _, name = text.rpartition("/") if "/" in text else text.partition(":")
        return f"{head}{'/' if '/' in text else ':'}{_host_and_port(name, address)}"
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme.lower() in _ENCRYPTED_SCHEMES and not tls:
            raise _refused(address, "expected tls=True or certificates with this scheme")
        if scheme.lower() not in _PLAIN_SCHEMES | _ENCRYPTED_SCHEMES:
            raise _refused(address, f"{_EXPECTED}, with grpc:// or nothing before it")
        text = rest
    return _host_and_port(text.removesuffix("/"), address)


def is_local(target: str) -> bool:
    """Return True if the name of a server for gRPC stays on this machine: a Unix socket, or a loopback address."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    plain = target
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        plain = plain.removeprefix(scheme)
    plain = plain.lstrip("/")
    host = plain[1:].partition("]")[0] if plain.startswith("[") else plain.rpartition(":")[0] or plain
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(target: str) -> str:
    """Return a name that gRPC itself resolves. Raises InvalidRequest for one that it would take for none."""
    scheme, _, rest = target.partition(":")
    if scheme == "unix" and rest.startswith("//") and not rest.startswith("///"):
        raise _refused(target, "expected unix:PATH or unix:///PATH")
    if scheme in ("ipv4", "ipv6"):
        for one in rest.split(","):
            host = one.partition("]")[0].lstrip("[") if scheme == "ipv6" else one.partition(":")[0]
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise _refused(target, f"expected {scheme}: and IP addresses with commas between them") from None
    return target


def _host_and_port(text: str, address: str) -> str:
    """Return HOST:PORT. address: as it was given, for the error. Raises InvalidRequest."""
    if "@" in text:
        raise _refused("...", f"{_EXPECTED}, without a user and a password")
    if any(character in text for character in "/?#"):
        raise _refused(address, f"{_EXPECTED}, without a path")
    if bracketed := _BRACKETS.fullmatch(text):
        host, port = bracketed[1], bracketed[2]
    elif text.count(":") > 1:
        if _IPV6.fullmatch(text):
            raise _refused(address, "expected brackets around an IPv6 address: [ADDRESS]:PORT")
        raise _refused(address, f"{_EXPECTED}, with grpc:// or nothing before it")
    else:
        host, colon, rest = text.partition(":")
        port = rest if colon else None
    if not (bracketed or _HOST.fullmatch(host)) or host == "[]" or any(map(str.isspace, host)):
        raise _refused(address, f"{_EXPECTED}, with a host")
    if port is not None and not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) <= _MAX_PORT):
        raise _refused(address, f"expected a port from 1 to {_MAX_PORT}")
    return f"{host}:{DEFAULT_PORT if port is None else port}"


def _refused(address: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"address: {brief(str(address))}; {expected}", field="address")
