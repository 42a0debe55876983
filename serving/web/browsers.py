"""The protection of the server from foreign pages in browsers, and the headers that restrict its own pages."""

from collections.abc import Mapping
from urllib.parse import urlsplit

import grpc

from serving.transport.methods import is_loopback
from serving.web.problems import Problem

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
#: The headers of every answer.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
#: The policy of a page: scripts, styles and requests of this server alone, and pictures that its scripts make.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def check_origin(method: str, headers: Mapping[str, str], local_names: bool) -> None:
    """Refuse a request that a foreign page makes in a browser. Other clients send no such headers. Raises Problem.

    local_names: also refuse names in ``Host`` that do not stand for this machine. A foreign page can let its own name
    stand for this machine's address (DNS rebinding), and would then be no foreign page.
    """
    host = headers.get("host", "")
    if local_names and host and not _is_local(host):
        raise Problem(
            421,
            f"host: {host[:64]!r}; expected localhost or an address, since the server listens on this machine alone "
            "and has no tokens",
            grpc.StatusCode.PERMISSION_DENIED,
        )
    if method in _SAFE_METHODS:
        return
    site, origin = headers.get("sec-fetch-site", ""), headers.get("origin", "")
    if site:
        if site in ("same-origin", "none"):
            return
    elif not origin or (origin != "null" and host and _place_of(origin) == host.lower()):
        return
    raise Problem(
        403, "origin: another page; expected a request of this server's own pages", grpc.StatusCode.PERMISSION_DENIED
    )


def _place_of(origin: str) -> str:
    """Return the host and port of an origin in lower case, or "" if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    """Return True if a Host header has a name of this machine, or an address, which no page can choose."""
    name = host.lower()
    if name.startswith("["):
        return True
    name = name.rpartition(":")[0] or name
    address = name.replace(".", "")
    return (address.isascii() and address.isdecimal()) or is_loopback(name) or name.endswith(".localhost")
