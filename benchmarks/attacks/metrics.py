"""Attacks on the port of metrics and health, which has a thread of its own in the process that serves."""

from collections.abc import Callable
from functools import partial
from itertools import count

from benchmarks.attacks.connections import hello
from benchmarks.attacks.link import Attack, Link, Pieces
from benchmarks.attacks.web import head

#: As many connections as the port serves at once, and many more.
_CONNECTIONS, _CROWD = 32, 1000
_NAMES = 500
_HANDSHAKE_SECONDS = 0.02
_TOKEN_CHARACTERS = 80


def _ask(link: Link, path: str, *more: str) -> Pieces:
    """Ask for a page. The server ends the connection, and a new one takes its place."""
    yield head(path, 0, *more, verb="GET")


def _half_heads(link: Link) -> Pieces:
    yield b"GET /metrics HTTP/1.1\r\nHo"


def _unread(link: Link) -> Pieces:
    """Ask for a page, and read nothing."""
    link.reads = False
    yield head("/metrics", 0, verb="GET")


def _handshakes(link: Link) -> Pieces:
    """Begin a handshake, wait until the server has signed, and hang up."""
    yield hello()
    yield _HANDSHAKE_SECONDS
    link.hang_up()


_numbers = count()


def _wrong_tokens(link: Link) -> Pieces:
    """Ask with another token each time."""
    token = f"Authorization: Bearer good.{id(link):x}{next(_numbers):x}".ljust(_TOKEN_CHARACTERS, "x")
    yield head("/metrics", 0, token, verb="GET")


def _metrics(name: str, script: Callable[[Link], Pieces], least: int = _CONNECTIONS, server: str = "plain") -> Attack:
    return Attack(f"metrics, {name}", script, speaks=False, least=least, server=server, port="metrics")


METRICS = (
    _metrics("pages", partial(_ask, path="/metrics")),
    _metrics("names", partial(_ask, path="/metrics?" + "name[]=capsnet_ready&" * (_NAMES // 2))),
    _metrics("liveness", partial(_ask, path="/livez")),
    _metrics("half heads", _half_heads, _CROWD),
    _metrics("not read", _unread, _CROWD),
    _metrics("handshakes", _handshakes, _CONNECTIONS, "tls"),
    _metrics("wrong tokens", _wrong_tokens, _CONNECTIONS, "tokens"),
)
