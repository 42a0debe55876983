"""The guard of the methods and pages: it lets in only clients that may call, within their limits."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from serving.access.quotas import Quotas
from serving.access.tokens import MAX_TOKEN_CHARACTERS, Identity, TooManyChecks
from serving.errors import ClientLimit, Forbidden, ServingError, Unauthenticated
from serving.transport.call import INTERNAL_TEXT
from serving.transport.headers import Metadata, Status
from serving.transport.methods import (
    UNDECIDED,
    Abort,
    CallbackMethod,
    Context,
    Door,
    Method,
    Peer,
    StreamMethod,
    Table,
    UnaryMethod,
    client_of,
)
from serving.transport.rounds import Result

_BEARER = re.compile(r"Bearer ([!-~]+)", re.IGNORECASE)
_AUTHORIZATION = "authorization"
_LOOK_SECONDS = 1.0  # between looks at the token of an open stream
#: Seconds in which the stream of a client whose token was removed still takes requests.
REMOVED_SECONDS = 30.0

_logger = logging.getLogger(__name__)

#: A function that counts and logs a refused call: its path and client, and the error. It returns the status to send.
Refused = Callable[[str, Peer, Metadata, ServingError], Status]


class KnownTokens(Protocol):
    """The tokens of clients; see serving.access.tokens.Tokens."""

    def remembered(self, token: str, /) -> tuple[bool, Identity | None]:
        """Return if a token was checked before, and its identity, None if it is wrong."""

    def begin_check(self, token: str, client: str, /) -> object:
        """Begin to check a token, for ``check``. Raises TooManyChecks."""

    async def check(self, token: str, client: str, /) -> Identity | None:
        """Return the identity of a token, or None if it is wrong. client: of ``client_of``. Raises TooManyChecks."""

    def of_certificate(self, subject: str, /) -> Identity | None:
        """Return the identity of a certificate's common name, or None."""


@dataclass(frozen=True)
class ClientLimits:
    """The limits of each client, by identity or else by address. None: no limit.

    calls: the most calls in flight. rate: the most calls a second.
    """

    calls: float | None = None
    rate: float | None = None


class Guard:
    """The check of each call, before its method sees it.

    tokens: None if the server has none. mutual: clients have certificates; without tokens each of them has every role.
    Without both, everyone may call. refused: see Refused. now: returns seconds of any clock.
    """

    def __init__(
        self,
        tokens: KnownTokens | None,
        mutual: bool,
        limits: ClientLimits,
        refused: Refused,
        now: Callable[[], float],
    ) -> None:
        self._tokens = tokens
        self._mutual = mutual
        self._limits = limits
        self.refused = refused
        self._quotas = Quotas(now)

    @property
    def has_tokens(self) -> bool:
        return self._tokens is not None

    def protect(self, table: Table, role: str) -> dict[str, Method]:
        """Return the methods so that only clients with this role reach them."""
        if not self._tokens and not self._mutual and self._limits == ClientLimits():
            return dict(table)
        return {path: self._protected(path, method, role) for path, method in table.items()}

    async def admit(self, authorization: str | None, peer: Peer, role: str) -> None:
        """Let a client of HTTP pass, or raise Unauthenticated, Forbidden or ClientLimit.

        authorization: the value of the header, or None. Any thread's event loop may use it.
        """
        if self._tokens or self._mutual:
            await self._identify(authorization, peer, role)

    def _protected(self, path: str, method: Method, role: str) -> Method:
        gate = _Gate(self, path, role)
        door = gate.door(method.door) if self._tokens or self._mutual else method.door
        match method:
            case CallbackMethod():
                return replace(method, begin=gate.callback(method), door=door)
            case UnaryMethod():
                return replace(method, answer=gate.unary(method), door=door)
            case StreamMethod():
                return replace(method, answers=gate.stream(method), door=door)

    def at_once(self, authorization: str | None, peer: Peer, role: str) -> Identity | None:
        """Return the identity of a client, or None if its token must be checked. Raises Unauthenticated and Forbidden.

        Without tokens, a client with a certificate has every role, and so has everyone without certificates.
        """
        if not self._tokens:
            if self._mutual and not peer.subject:
                raise Unauthenticated(
                    "certificate: none came with one common name; expected one that this server's authorities signed"
                )
            return Identity(
                f"certificate {peer.subject}" if peer.subject else client_of(peer.address), frozenset((role,))
            )
        if authorization is None:
            identity = self._tokens.of_certificate(peer.subject)
            if identity is None:
                raise Unauthenticated("authorization: missing; expected Bearer and a token")
            return _with_role(identity, role)
        known, identity = self._tokens.remembered(_token_of(authorization))
        if not known:
            return None
        if identity is None:
            raise _wrong_token()
        return _with_role(identity, role)

    async def _identify(self, authorization: str | None, peer: Peer, role: str) -> Identity:
        """Return the identity of a client. Raises Unauthenticated, Forbidden and ClientLimit."""
        if identity := self.at_once(authorization, peer, role):
            return identity
        assert self._tokens and authorization
        try:
            checked = await self._tokens.check(_token_of(authorization), client_of(peer.address))
        except TooManyChecks:
            raise _too_many() from None
        if checked is None:
            raise _wrong_token()
        return _with_role(checked, role)

    def begin_check(self, metadata: Metadata, peer: Peer) -> None:
        """Begin to check a token that is not known yet, while the message comes. Raises ClientLimit.

        So nobody sends whole messages with tokens that are too many to be checked.
        """
        authorization = authorization_of(metadata)
        assert self._tokens and authorization
        try:
            self._tokens.begin_check(_token_of(authorization), client_of(peer.address))
        except TooManyChecks:
            raise _too_many() from None

    async def enter(self, context: Context, role: str) -> str:
        """Let a call in, and return the client's name for ``leave``. Raises a ServingError."""
        return self.count(await self._identify(authorization_of(context.invocation_metadata()), context.peer, role))

    def count(self, identity: Identity) -> str:
        """Count a call, and return the client's name for ``leave``. Raises ClientLimit."""
        calls = self._limits.calls if identity.calls is None else identity.calls
        rate = self._limits.rate if identity.rate is None else identity.rate
        if reason := self._quotas.begin(identity.name, calls, rate):
            raise ClientLimit(f"{reason}; try again later")
        return identity.name

    def leave(self, name: str) -> None:
        """Note the end of a call."""
        self._quotas.end(name)

    def refuse(self, path: str, context: Context, error: ServingError) -> Status:
        """Return the status of a refused call."""
        return self.refused(path, context.peer, context.invocation_metadata(), error)


class _Gate:
    """The guard of one method."""

    def __init__(self, guard: Guard, path: str, role: str) -> None:
        self._guard = guard
        self._path = path
        self._role = role

    def door(self, inner: Door | None) -> Door:
        """Return a door that knows tokens. The inner door is asked only for clients that may call."""

        def decide(timeout: float | None, metadata: Metadata, expected: int, peer: Peer) -> Status | None:
            try:
                identity = self._guard.at_once(authorization_of(metadata), peer, self._role)
                if identity is None:
                    self._guard.begin_check(metadata, peer)
                    return UNDECIDED
            except ServingError as error:
                return self._guard.refused(self._path, peer, metadata, error)
            return inner(timeout, metadata, expected, peer._replace(name=identity.name)) if inner else None

        return decide

    def callback(self, method: CallbackMethod) -> Callable[[bytes, Context], None]:
        """Return the function that begins a call of the method."""
        guard = self._guard

        def begin(data: bytes, context: Context) -> None:
            try:
                identity = guard.at_once(authorization_of(context.invocation_metadata()), context.peer, self._role)
                name = guard.count(identity) if identity else ""
            except ServingError as error:
                raise Abort(guard.refuse(self._path, context, error)) from None
            if name:
                _begin(method, data, _Counted(context, guard, name))
                return
            task = asyncio.get_running_loop().create_task(context.in_turns(self._begin_later(method, data, context)))
            context.given_up = task.cancel

        return begin

    async def _begin_later(self, method: CallbackMethod, data: bytes, context: Context) -> None:
        try:
            name = await self._enter(context)
            if context.over:
                self._guard.leave(name)
                return
            _begin(method, data, _Counted(context, self._guard, name))
        except Abort as abort:
            context.finish(abort.status.code, abort.status.text, abort.status.metadata)
        except Exception:
            _logger.exception("a handler failed")
            context.finish(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

    def unary(self, method: UnaryMethod) -> Callable[[bytes, Context], Coroutine[None, None, bytes | None]]:
        """Return the function that answers a call of the method."""

        async def answer(data: bytes, context: Context) -> bytes | None:
            counted = _Counted(context, self._guard, await self._enter(context))
            answering = method.answer(data, counted)
            del data  # which the method may free once it is parsed
            try:
                return await answering
            finally:
                counted.leave()

        return answer

    def stream(self, method: StreamMethod) -> Callable[[AsyncIterator[bytes], Context], AsyncIterator[bytes]]:
        """Return the function that answers the messages of a call of the method."""

        async def answers(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            counted = _Counted(context, self._guard, await self._enter(context))
            admitted = _Admitted(messages, self._guard, context, self._role) if self._guard.has_tokens else messages
            try:
                async with aclosing(method.answers(admitted, counted)) as inner:  # type: ignore[type-var]
                    async for answer in inner:
                        yield answer
                        del answer  # while the next one is waited for, which may never come
            except ServingError as error:
                raise Abort(self._guard.refuse(self._path, context, error)) from None
            finally:
                counted.leave()

        return answers

    async def _enter(self, context: Context) -> str:
        try:
            return await self._guard.enter(context, self._role)
        except ServingError as error:
            raise Abort(self._guard.refuse(self._path, context, error)) from None


class _Admitted:
    """The messages of a stream, until its client may not call and REMOVED_SECONDS have passed.

    The end of the messages is an Unauthenticated or a Forbidden. Answers that are under way still come.
    """

    def __init__(self, messages: AsyncIterator[bytes], guard: Guard, context: Context, role: str) -> None:
        self._messages = messages
        self._guard = guard
        self._metadata = context.invocation_metadata()
        self._peer = context.peer
        self._role = role
        self._look_at = time.monotonic() + _LOOK_SECONDS
        self._end_at: float | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        message = await anext(self._messages)
        if (now := time.monotonic()) >= self._look_at:
            self._look(now)
        return message

    def _look(self, now: float) -> None:
        self._look_at = now + _LOOK_SECONDS
        try:
            if self._guard.at_once(authorization_of(self._metadata), self._peer, self._role):
                self._end_at = None
            else:
                self._guard.begin_check(self._metadata, self._peer)  # the next look has the result
        except (Unauthenticated, Forbidden):
            self._end_at = self._end_at or now + REMOVED_SECONDS
            if now >= self._end_at:
                raise
        except ClientLimit:
            return  # a later look


class _Counted:
    """The context of a counted call: its end, whatever ends it, ends the count."""

    def __init__(self, context: Context, guard: Guard, name: str) -> None:
        self.given_up: Callable[[], object] | None = None
        self.undecided = context.undecided = False
        self._context = context
        self._guard = guard
        self._name = name
        self._counts = True
        context.given_up = self._gone

    @property
    def deadline(self) -> float | None:
        return self._context.deadline

    @property
    def expired(self) -> bool:
        return self._context.expired

    @property
    def over(self) -> bool:
        return self._context.over

    @property
    def peer(self) -> Peer:
        return self._context.peer._replace(name=self._name)

    def invocation_metadata(self) -> Metadata:
        return self._context.invocation_metadata()

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        return self._context.in_turns(work)

    def keep(self, size: int) -> None:
        self._context.keep(size)

    def answer(self, data: bytes) -> None:
        self.leave()
        self._context.answer(data)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        self.leave()
        self._context.finish(code, text, metadata)

    def leave(self) -> None:
        """End the count, once."""
        if self._counts:
            self._counts = False
            self._guard.leave(self._name)

    def _gone(self) -> None:
        self.leave()
        if given_up := self.given_up:
            self.given_up = None
            given_up()


def authorization_of(metadata: Metadata) -> str | None:
    """Return the authorization header of a call, or None. Several become one that is not valid."""
    found = [value for key, value in metadata if key == _AUTHORIZATION and isinstance(value, str)]
    return ", ".join(found) if found else None


def _token_of(authorization: str) -> str:
    """Return the token of an authorization header. Raises Unauthenticated."""
    found = _BEARER.fullmatch(authorization)
    if not found or len(authorization) > MAX_TOKEN_CHARACTERS:
        raise Unauthenticated("authorization: expected Bearer and a token")
    return found[1]


def _begin(method: CallbackMethod, data: bytes, counted: _Counted) -> None:
    try:
        method.begin(data, counted)
    except BaseException:
        counted.leave()
        raise


def _with_role(identity: Identity, role: str) -> Identity:
    if role not in identity.roles:
        raise Forbidden(f"{identity.name} may not call this method; it needs the role {role}")
    return identity


def _too_many() -> ClientLimit:
    return ClientLimit("authorization: too many new tokens are being checked; try again later")


def _wrong_token() -> Unauthenticated:
    return Unauthenticated("authorization: the token is not valid")
