"""Attacks on the HTTP port: slow and silent clients, costly heads and bodies, and answers that nobody reads."""

import base64
import json
from collections.abc import Callable
from functools import cache, partial
from itertools import count

from benchmarks.attacks.link import INK, Attack, Link, Pieces
from benchmarks.attacks.packed import empty_gzip

_CONNECTIONS = 1000
_FEW_CONNECTIONS = 8
_REQUESTS_A_PIECE = 500
_SHORT_HEADERS = 3000
_TINY_CHUNKS = 8000
_NUMBERS = 1_500_000
_CONTAINERS = 3000
_PARTS = 20_000
_FORM_BYTES = 12 * 2**20
_EXPLAINED_IMAGES = 8
_HANDSHAKES = 100
_TOKEN_CHARACTERS = 80
_EXTENSION_BYTES = 2000
_EXTENSIONS = 100
_CLASSES = 10
_HEAD_CHARACTERS = 15_900
_NAMES = 400_000
_INK = base64.b64encode(INK).decode()


def head(path: str, length: int | None, *more: str, verb: str = "POST") -> bytes:
    """Return the head of a request. length: of its body, or None for chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join((f"{verb} {path} HTTP/1.1", "Host: localhost", size, *more, "", "")).encode()


def post(path: str, body: bytes, media: str = "application/json") -> bytes:
    """Return a request with a body."""
    return head(path, len(body), f"Content-Type: {media}") + body


def _once(link: Link, start: Callable[[], bytes]) -> Pieces:
    """Send the start of something, and then nothing."""
    yield start()


def _byte_by_byte(link: Link, start: bytes) -> Pieces:
    yield start
    while True:
        yield b"x"
        yield 1.0


def again(link: Link, make: Callable[[], bytes]) -> Pieces:
    """Send one request again and again, without a wait for its answer."""
    request = make()
    while True:
        yield request


def _unread(link: Link, make: Callable[[], bytes], times: int) -> Pieces:
    """Ask for answers, and read none."""
    link.reads = False
    for _ in range(times):
        yield make()


def _pipelined() -> bytes:
    return head("/v1/model", 0, verb="GET") * _REQUESTS_A_PIECE


def _short_headers() -> bytes:
    return head("/v1/model", 0, *["a:"] * _SHORT_HEADERS, verb="GET")


def _tiny_chunks() -> bytes:
    return head("/v1/classify", None, "Content-Type: image/png") + b"1\r\nx\r\n" * _TINY_CHUNKS + b"0\r\n\r\n"


@cache
def _numbers() -> bytes:
    """Return tensors of millions of numbers in JSON."""
    tensor = f'{{"name":"images","datatype":"UINT8","shape":[1],"data":[{",".join(["0"] * _NUMBERS)}]}}'
    return post("/v2/models/capsnet-mnist/infer", f'{{"inputs":[{tensor}]}}'.encode())


@cache
def _containers() -> bytes:
    return post("/v1/classify", b'{"images":[' + b",".join([b'{"pixels":""}'] * _CONTAINERS) + b"]}")


@cache
def _names() -> bytes:
    return post("/v1/classify", b"{" + b",".join(b'"%d":0' % number for number in range(_NAMES)) + b"}")


@cache
def _form(part: bytes) -> bytes:
    """Return a form of many parts, or of parts that are costly to search for their ends."""
    body = (part * (_FORM_BYTES // len(part))) + b"--edge--\r\n"
    return post("/v1/classify", body, "multipart/form-data; boundary=edge")


@cache
def _explain(parts: str) -> bytes:
    """Return a request for as much of an explanation as the server answers at once."""
    asked = {
        "images": [{"pixels": _INK}] * _EXPLAINED_IMAGES,
        "classes": list(range(_CLASSES)),
        "parts": [f"EXPLANATION_PART_{part}" for part in parts.split()],
    }
    return post("/v1/explain", json.dumps(asked).encode())


def _explained_in_part() -> bytes:
    return _explain("ROUTING CONTRIBUTIONS")


def _explained() -> bytes:
    return _explain("ROUTING CONTRIBUTIONS RELEVANCE")


def _media_types() -> bytes:
    """Return a request whose media type has thousands of parameters, in a text without an end."""
    return head("/v1/classify", 1, 'Content-Type: image/png;"' + ";" * _HEAD_CHARACTERS) + b"x"


def _queries() -> bytes:
    return head("/v1/model?" + "%41&" * (_HEAD_CHARACTERS // 4), 0, verb="GET")


def _slow_chunks(link: Link) -> Pieces:
    """Send a body in chunks without an end, a byte a second."""
    yield head("/v1/classify", None, "Content-Type: image/png")
    while True:
        yield b"1\r\nx\r\n"
        yield 1.0


def _long_extensions() -> bytes:
    """Return a body in chunks whose sizes have long extensions, which nobody reads."""
    chunk = b"1;" + b"x" * _EXTENSION_BYTES + b"\r\nx\r\n"
    return head("/v1/classify", None, "Content-Type: image/png") + chunk * _EXTENSIONS + b"0\r\n\r\n"


def _upgrades() -> bytes:
    """Return requests for another protocol."""
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
    return head("/v1/model", 0, *upgrade, verb="GET") * _REQUESTS_A_PIECE


def _expectations(link: Link) -> Pieces:
    """Ask whether a body may come, and hang up."""
    yield head("/v1/classify", 1000, "Content-Type: image/png", "Expect: 100-continue")
    yield 0.01
    link.hang_up()


def _documents() -> bytes:
    return head("/openapi.json", 0, verb="GET") * _REQUESTS_A_PIECE


@cache
def _empty_blocks() -> bytes:
    """Return a body that takes long to unpack, and is nothing then."""
    body = empty_gzip(_FORM_BYTES)
    return head("/v1/classify", len(body), "Content-Type: application/json", "Content-Encoding: gzip") + body


def _gone(link: Link, make: Callable[[], bytes]) -> Pieces:
    """Hang up as soon as a request is sent."""
    yield make()
    yield 0.001
    link.hang_up()


def _wrong_tokens(link: Link) -> Pieces:
    """Send requests, each with another token that the server has never seen, and with a body that takes long."""
    body = _numbers().partition(b"\r\n\r\n")[2]
    for number in count():
        token = f"Authorization: Bearer good.{id(link):x}{number:x}".ljust(_TOKEN_CHARACTERS, "x")
        yield head("/v2/models/capsnet-mnist/infer", len(body), token) + body


@cache
def _explained_numbers(name: str) -> bytes:
    """Return a request for an explanation with a list of more than a million numbers."""
    numbers = ",".join(["1"] * _NUMBERS)
    return post("/v1/explain", f'{{"images":[{{"pixels":"{_INK}"}}],"{name}":[{numbers}]}}'.encode())


def on_http(
    name: str, script: Callable[[Link], Pieces], times: int = 1, server: str = "plain", least: int = 1
) -> Attack:
    """Return an attack on the HTTP port."""
    return Attack(f"HTTP, {name}", script, speaks=False, times=times, least=least, server=server, port="http")


_EMPTY_PART = b'--edge\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
_LINE_ENDS = b'--edge\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + b"\r\n--edg" * 2**12

WEB = (
    on_http("slow heads", partial(_once, start=lambda: b"GET /v1/model HTTP/1.1\r\nHo"), _CONNECTIONS),
    on_http("slow bodies", partial(_byte_by_byte, start=head("/v1/classify", 1000)), _CONNECTIONS),
    on_http("idle connections", partial(_once, start=lambda: head("/v1/model", 0, verb="GET")), 5 * _CONNECTIONS),
    on_http("pipelined requests", partial(again, make=_pipelined)),
    on_http("unknown paths", partial(again, make=lambda: head("/%0aX/" + "y" * 9000, 0, verb="GET") * 20)),
    on_http("many headers", partial(again, make=_short_headers)),
    on_http("tiny chunks", partial(again, make=_tiny_chunks)),
    on_http("long media types", partial(again, make=_media_types)),
    on_http("long queries", partial(again, make=_queries)),
    on_http("numbers in JSON", partial(again, make=_numbers), least=_FEW_CONNECTIONS),
    on_http("objects in JSON", partial(again, make=_containers), least=_FEW_CONNECTIONS),
    on_http("names in JSON", partial(again, make=_names), least=_FEW_CONNECTIONS),
    on_http("many parts", partial(again, make=partial(_form, _EMPTY_PART)), least=_FEW_CONNECTIONS),
    on_http("parts without an end", partial(again, make=partial(_form, _LINE_ENDS)), least=_FEW_CONNECTIONS),
    on_http("explanations", partial(again, make=_explained), least=_FEW_CONNECTIONS),
    on_http("explanations, hung up", partial(_gone, make=_explained), least=_FEW_CONNECTIONS),
    on_http("explanations, not read", partial(_unread, make=_explained_in_part, times=2), 100),
    on_http("slow heads over TLS", partial(_once, start=lambda: b"GET /v1/model HTTP/1.1\r\nHo"), _CONNECTIONS, "tls"),
    on_http("numbers in JSON over TLS", partial(again, make=_numbers), server="tls", least=_FEW_CONNECTIONS),
    on_http("explanations over TLS, not read", partial(_unread, make=_explained_in_part, times=2), 100, "tls"),
    on_http("handshakes", partial(_gone, make=_pipelined), _HANDSHAKES, "tls"),
    on_http("wrong tokens", _wrong_tokens, server="tokens", least=_FEW_CONNECTIONS),
    on_http("numbers in JSON without a token", partial(again, make=_numbers), server="tokens", least=_FEW_CONNECTIONS),
    on_http("slow chunks", _slow_chunks, _CONNECTIONS),
    on_http("long extensions", partial(again, make=_long_extensions)),
    on_http("upgrades", partial(again, make=_upgrades)),
    on_http("expectations", _expectations, _HANDSHAKES),
    on_http("documents, not read", partial(_unread, make=_documents, times=2), _HANDSHAKES),
    on_http("classes in JSON", partial(again, make=partial(_explained_numbers, "classes")), least=_FEW_CONNECTIONS),
    on_http("parts in JSON", partial(again, make=partial(_explained_numbers, "parts")), least=_FEW_CONNECTIONS),
    on_http("empty blocks", partial(again, make=_empty_blocks), least=_FEW_CONNECTIONS),
)  # fmt: skip
