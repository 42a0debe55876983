"""The ASGI application: each request to its route, its method and its answer."""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from typing import TypeVar

import grpc
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Router
from starlette.routing import Route as StarletteRoute
from starlette.types import Message, Receive, Scope, Send

from serving.errors import Forbidden, ServingError, Unauthenticated
from serving.rpc.status import status_of
from serving.transport.headers import Metadata, Status
from serving.transport.memory import Memory
from serving.transport.methods import UNDECIDED, Door, Peer, StreamMethod, Table
from serving.web.body import BodyReader
from serving.web.browsers import HEADERS, PAGE_POLICY, check_origin
from serving.web.conversions import Conversions
from serving.web.exchange import Connected, Exchange, OneAnswer
from serving.web.incoming import JSON, BodyLimits, Incoming, Reply
from serving.web.json_messages import write_json
from serving.web.page import PageFile
from serving.web.problems import CLIENT_GONE, PROBLEM, Problem, invalid, problem_of
from serving.web.routes import DESCRIBE, DOCUMENT, REFUSED, ROUTES, Body, Route

#: The header with the seconds after which the client needs no answer.
TIMEOUT = "x-request-timeout"
#: The paths of the documentation, their methods and media types.
DOCUMENTS = (("/openapi.json", DESCRIBE, JSON), ("/docs", DOCUMENT, "text/html; charset=utf-8"))
_REQUEST_ID, _AUTHORIZATION = "x-request-id", "authorization"
# The headers that methods see as gRPC's metadata.
_METADATA = (_AUTHORIZATION, _REQUEST_ID, "traceparent", "tracestate")
_MAX_ID_CHARACTERS = 64
_MAX_TIMEOUT_SECONDS = 1e8
_MAX_QUERY_PARAMETERS = 64  # as many as a form's
# Larger messages are converted in a thread, since that would delay other requests.
_SLOW_BYTES = 16384
# A longer answer is sent in parts of this size: what its client has not taken stays in the counted memory.
_PART_BYTES = 16384
_INTERNAL_TEXT = "internal error; the server's log has the details"
_API_HEADERS = {**HEADERS, "Cache-Control": "no-store"}
_PAGE_HEADERS = {**HEADERS, "Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}

Outcome = TypeVar("Outcome")
Respond = Callable[["Visit"], Awaitable[Response]]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """The conditions of requests.

    table: the methods, protected. max_body_bytes, limit_text: the largest body, and the text about it. memory: of all
    bodies and answers, which other servers may share. evicted: called for each request that finds no room, or ends for
    the sake of others. local_names: see check_origin. unready: returns the reason why no request is taken now, or "".
    counted: called with each route, "" for none, and the status. refused: called with the path, client, metadata, code
    and text of a request that no method has seen. admit: checks a header authorization that no method knows yet; raises
    ServingError.
    """

    table: Table
    limits: BodyLimits
    max_body_bytes: int
    limit_text: str
    memory: Memory
    evicted: Callable[[], None]
    local_names: bool
    unready: Callable[[], str]
    counted: Callable[[str, int], None]
    refused: Callable[[str, Peer, Metadata, grpc.StatusCode, str], None]
    admit: Callable[[str | None, Peer], Awaitable[None]]


class Visit:
    """A request under way: its parts, and what is known of its answer."""

    def __init__(self, scope: Scope, receive: Receive, terms: Terms) -> None:
        self.scope = scope
        self.request = Request(scope, receive)
        headers = self.request.headers
        self.identifier = headers.get(_REQUEST_ID, "")[:_MAX_ID_CHARACTERS] or secrets.token_hex(8)
        named = [(name, value) for name, value in headers.items() if name in _METADATA and name != _REQUEST_ID]
        self.metadata: Metadata = (*named, (_REQUEST_ID, self.identifier))
        self.connection: Connected = scope["state"]["connection"]
        length = headers.get("content-length", "")
        self.body = BodyReader(
            receive, length, self.connection, terms.memory, terms.evicted, terms.max_body_bytes, terms.limit_text
        )
        self.route = ""
        self.status = CLIENT_GONE

    @property
    def path(self) -> str:
        """Return the path, as the client chose it."""
        path: str = self.scope["path"]
        return path

    def exchange(self) -> Exchange:
        """Return the context for a method. Raises Problem."""
        return Exchange(self.connection, self.metadata, _timeout(self.request.headers))


class Application:
    """The application. page: the files for everyone, by path."""

    def __init__(self, terms: Terms, page: Mapping[str, PageFile]) -> None:
        self._terms = terms
        self.memory = terms.memory
        self._conversions = Conversions()
        #: The requests under way.
        self.under_way = 0
        self.draining = False
        routes: list[BaseRoute] = [
            _route("GET", "/v2/health/live", self._live),
            _route("GET", "/v2/health/ready", self._ready),
            *(_route("GET", path, _sender_of(file)) for path, file in page.items()),
        ]
        for path, method, media in DOCUMENTS:
            if method in terms.table:
                routes.append(_route("GET", path, self._without_message(method, media)))
        for path, method in REFUSED:
            routes.extend(_route(verb, path, self._without_message(method, JSON)) for verb in ("GET", "POST"))
        # A path without parameters goes before the patterns that match it too.
        for route in sorted(ROUTES, key=lambda one: len(one.places)):
            routes.append(_route(route.verb, route.path, self._endpoint(route)))
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by ASGI's protocol."""
        visit = Visit(scope, receive, self._terms)
        scope["app"] = self  # so that the router raises its errors
        scope["state"]["visit"] = visit

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                added = [(b"date", formatdate(usegmt=True).encode())]
                added.append((b"x-request-id", visit.identifier.encode("latin-1", "replace")))
                if self.draining:
                    added.append((b"connection", b"close"))
                message = {**message, "headers": [*added, *message["headers"]]}
            elif len(message.get("body", b"")) > _PART_BYTES:
                await _send_in_parts(visit.body, message["body"], send)
                return
            await send(message)

        self.under_way += 1
        try:
            await visit.connection.in_turns(self._visit(visit, answer))
        except (ClientDisconnect, asyncio.CancelledError):  # the client has gone, or the server's stop has ended it
            visit.status = CLIENT_GONE
        finally:
            visit.body.release()
            scope["state"].clear()  # of what knows the scope
            self.under_way -= 1
            self._terms.counted(visit.route, visit.status)

    def close(self) -> None:
        """End the thread."""
        self._conversions.close()

    async def _visit(self, visit: Visit, answer: Send) -> None:
        scope, receive = visit.scope, visit.request.receive
        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                text = "this port speaks HTTP/1.1; gRPC has a port of its own"
                raise Problem(505, text, headers={"Connection": "close"})
            if {"transfer-encoding", "content-length"} <= set(visit.request.headers):
                # A proxy may have taken the other one for the body's end (RFC 9112, section 6.1).
                text = "transfer-encoding: came with content-length; expected one of the two"
                raise Problem(400, text, headers={"Connection": "close"})
            check_origin(scope["method"], visit.request.headers, self._terms.local_names)
            if self.draining:
                text = "the server is stopping; send the request to another one"
                raise Problem(503, text, grpc.StatusCode.UNAVAILABLE)
            await self._router(scope, receive, answer)
            return
        except HTTPException as error:
            problem = _problem_of_router(error)
        except Problem as raised:
            problem = raised.alone()
        except ClientDisconnect:
            raise
        except Exception:
            _logger.exception("a request failed")
            problem = Problem(500, _INTERNAL_TEXT, grpc.StatusCode.INTERNAL)
        if not problem.noted:
            self._terms.refused(visit.path, visit.connection.peer, visit.metadata, problem.code, problem.detail)
        headers = {**_API_HEADERS, **problem.headers}
        if not await visit.body.discard():
            headers["Connection"] = "close"
        content = problem.body(with_error=visit.path.startswith("/v2"))
        await Response(content, problem.status, headers, PROBLEM)(scope, receive, answer)

    def _endpoint(self, route: Route) -> Respond:
        """Return the function that answers the requests of a route."""

        async def respond(visit: Visit) -> Response:
            exchange, method = visit.exchange(), self._method(route.method)
            await self._ask_door(method, exchange)
            body = await visit.body.read(exchange.left)
            # A small body may be packed from a large one.
            slow = len(body) > _SLOW_BYTES or "content-encoding" in visit.request.headers
            write, data = await self._convert(visit, slow, partial(self._prepare, route, visit, body))
            del body
            visit.body.hold(len(data))
            calling = exchange.call(method, data)
            del data  # which the method may free once it is parsed
            with visit.body.at_work(exchange.give_up):
                outcome = await calling
            if isinstance(outcome, Status):
                raise problem_of(outcome)
            reply = await self._convert(visit, len(outcome) > _SLOW_BYTES, partial(write, outcome))
            visit.body.hold(len(reply.body))
            return _response(reply)

        return respond

    def _prepare(self, route: Route, visit: Visit, body: bytes) -> tuple[Callable[[bytes], Reply], bytes]:
        """Return the writer of a request's answer, and the bytes for its method. Raises Problem."""
        headers = visit.request.headers
        unpacked = visit.body.unpack(body, headers.get("content-encoding", "").lower())
        if unpacked and route.body is Body.NONE:
            raise invalid("body", f"{len(unpacked)} bytes; expected none")
        if (given := visit.scope["query_string"].count(b"&") + 1) > _MAX_QUERY_PARAMETERS:
            raise invalid("query", f"{given} parameters; expected at most {_MAX_QUERY_PARAMETERS}")
        query = visit.request.query_params.multi_items()
        prepared = route.prepare(Incoming(visit.request.path_params, query, headers, unpacked, self._terms.limits))
        return prepared.write, prepared.message.SerializeToString()

    def _without_message(self, name: str, media: str) -> Respond:
        """Return the function that answers with what a method returns for an empty message, protected as it is."""

        async def respond(visit: Visit) -> Response:
            exchange, method = visit.exchange(), self._method(name)
            await self._ask_door(method, exchange)
            await visit.body.discard()
            outcome = await exchange.call(method, b"")
            if isinstance(outcome, Status):
                raise problem_of(outcome)
            return Response(outcome, headers=_PAGE_HEADERS, media_type=media)

        return respond

    async def _live(self, visit: Visit) -> Response:
        await visit.body.discard()
        return _response(Reply(write_json({"live": True})))

    async def _ready(self, visit: Visit) -> Response:
        await visit.body.discard()
        reason = self._terms.unready()
        return _response(Reply(write_json({"ready": not reason}), status=503 if reason else 200))

    def _method(self, name: str) -> OneAnswer:
        method = self._terms.table.get(name)
        if method is None or isinstance(method, StreamMethod):
            raise Problem(501, f"this server has no {name[1:]}", grpc.StatusCode.UNIMPLEMENTED)
        return method

    async def _ask_door(self, method: OneAnswer, exchange: Exchange) -> None:
        """Raise Problem if the method's door refuses a request, before its body is read.

        An unknown token is checked first, so that a stranger does not learn what a body means.
        """
        refusal: Status | None = None
        for _ in range(2):
            if not (method.door and (status := _asked(method.door, exchange))):
                return
            if status is not UNDECIDED:
                raise problem_of(status)
            try:
                await self._terms.admit(_authorization(exchange.invocation_metadata()), exchange.peer)
            except (Unauthenticated, Forbidden) as error:
                refusal = status_of(error)  # the door knows the token now, and counts the refusal
            except ServingError as error:
                raise problem_of(status_of(error)) from None
        if refusal:  # the tokens have changed meanwhile, and the door has forgotten it
            raise problem_of(refusal)

    async def _convert(self, visit: Visit, slow: bool, convert: Callable[[], Outcome]) -> Outcome:
        """Return a conversion's result. slow: in the thread, since the message is large."""
        if not slow:
            return convert()

        def attempt() -> Outcome | Problem:
            try:
                return convert()
            except Problem as problem:
                return problem.alone()

        outcome = await self._conversions.run(visit.connection.peer.connection, attempt, visit.connection.watch)
        if isinstance(outcome, Problem):
            raise outcome
        return outcome


async def _send_in_parts(request: BodyReader, body: bytes, send: Send) -> None:
    """Send an answer, each part when the client has taken most of those before."""
    for begin in range(0, len(body), _PART_BYTES):
        request.waits_for_client()
        await send({"type": "http.response.body", "body": body[begin : begin + _PART_BYTES], "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _route(verb: str, path: str, respond: Respond) -> StarletteRoute:
    """Return a route for the router. respond: answers a visit."""

    async def endpoint(request: Request) -> Response:
        visit: Visit = request.state.visit
        visit.route = path
        response = await respond(visit)
        if not await visit.body.discard():
            response.headers["Connection"] = "close"
        return response

    return StarletteRoute(path, endpoint, methods=[verb])


def _sender_of(file: PageFile) -> Respond:
    """Return the function that answers with a file."""

    async def respond(visit: Visit) -> Response:
        headers = {**_PAGE_HEADERS, "ETag": file.tag}
        if visit.request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media)

    return respond


def _asked(door: Door, exchange: Exchange) -> Status | None:
    """Return a door's answer to a request."""
    return door(exchange.timeout, exchange.invocation_metadata(), 0, exchange.peer)


def _authorization(metadata: Metadata) -> str | None:
    """Return the authorization header, or None. Several become one that is not valid."""
    found = [str(value) for name, value in metadata if name == _AUTHORIZATION]
    return ", ".join(found) if found else None


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, {**_API_HEADERS, **reply.headers}, reply.media)


def _problem_of_router(error: HTTPException) -> Problem:
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        headers = {"Allow": allowed}
        return Problem(405, f"method: expected {allowed}", grpc.StatusCode.UNIMPLEMENTED, headers=headers)
    return Problem(404, "path: not here; /openapi.json lists the paths", grpc.StatusCode.UNIMPLEMENTED)


def _timeout(headers: Headers) -> float | None:
    """Return the seconds after which the client needs no answer, or None. Raises Problem."""
    text = headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MAX_TIMEOUT_SECONDS:  # also if it is no number
        raise invalid(TIMEOUT, f"{text[:_MAX_ID_CHARACTERS]!r}; expected seconds, more than 0")
    return seconds
