"""Attacks by connections: many, slow, silent or short."""

import ssl
from functools import cache, partial

from benchmarks.attacks.link import CLASSIFY, WAIT_SECONDS, Attack, Link, Pieces, block, data, headers, request
from serving.transport import frames

#: Connections of the slow attacks for each one that is asked for.
_SLOW_CONNECTIONS = 1000
_IDLE_CONNECTIONS = 5000
#: Connections at a time of the attacks that hang up at once.
_SHORT_CONNECTIONS = 100
_HALF_MESSAGE_BYTES = 100
_IMAGES_OF_A_CALL = 64
_HANDSHAKE_SECONDS = 0.02
_PINGS_A_PIECE = 20


def _silent(link: Link, start: bytes = b"") -> Pieces:
    """Send the start of something, and then nothing."""
    yield start or 0.0


def _byte_by_byte(link: Link) -> Pieces:
    """Send a whole call, a byte a second."""
    yield frames.PREFACE + frames.settings({})
    for byte in headers(1, CLASSIFY) + data(1, request()):
        yield bytes([byte])
        yield 1.0


def _half_headers(link: Link) -> Pieces:
    yield from link.ready()  # a reply to the server's settings would break the header block
    yield frames.frame(frames.HEADERS, 0, 1, block(CLASSIFY))


def _half_message(link: Link) -> Pieces:
    yield headers(1, CLASSIFY) + data(1, request()[:_HALF_MESSAGE_BYTES], end=False)


def _churn(link: Link) -> Pieces:
    """Hang up as soon as the server has answered."""
    yield from link.ready()
    link.hang_up()


def _one_call(link: Link, images: int) -> Pieces:
    """Make one call, and hang up once it is answered."""
    yield from link.ready()
    stream, sent = link.open(), request(images)
    yield headers(stream, CLASSIFY) + data(stream, sent)
    while stream in link.windows:
        yield WAIT_SECONDS
    link.hang_up()


@cache
def hello() -> bytes:
    """Return the bytes by which a client begins a TLS handshake. The same bytes make the server sign each time."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server has ended")


def _handshakes(link: Link) -> Pieces:
    """Begin a handshake, wait until the server has signed, and hang up."""
    yield hello()
    yield _HANDSHAKE_SECONDS
    link.hang_up()


def _ping(link: Link) -> Pieces:
    """Send a frame again and again, which is cut into records of a byte."""
    yield from link.ready()
    while True:
        yield frames.frame(frames.PING, 0, 0, bytes(8)) * _PINGS_A_PIECE


CONNECTIONS = (
    Attack("TLS, records of 1 byte", _ping, server="tls", record_bytes=1),
    Attack("slow preface", partial(_silent, start=frames.PREFACE[:10]), speaks=False, times=_SLOW_CONNECTIONS),
    Attack("slow headers", _half_headers, times=_SLOW_CONNECTIONS),
    Attack("slow messages", _half_message, times=_SLOW_CONNECTIONS),
    Attack("a byte a second", _byte_by_byte, speaks=False, times=_SLOW_CONNECTIONS),
    Attack("idle connections", _silent, times=_IDLE_CONNECTIONS),
    Attack("connection churn", _churn, times=_SHORT_CONNECTIONS),
    Attack("a call a connection", partial(_one_call, images=1), times=_SHORT_CONNECTIONS),
    Attack("a large call a connection", partial(_one_call, images=_IMAGES_OF_A_CALL), times=_SHORT_CONNECTIONS),
    Attack("TLS, silent", _silent, speaks=False, times=_SLOW_CONNECTIONS, server="tls"),
    Attack("TLS, handshakes", _handshakes, speaks=False, times=_SHORT_CONNECTIONS, server="tls"),
)
