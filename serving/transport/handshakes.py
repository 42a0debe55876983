"""TLS for the native server: its listening socket, a limit on handshakes, and connections only after good ones."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Collection
from typing import Protocol, cast

from serving.transport.connection_limits import most_frequent
from serving.transport.listener import Listener
from serving.transport.methods import Peer, TransportLimits, client_of

#: Seconds within which a client must complete its handshake.
HANDSHAKE_SECONDS = 10.0
_SHUTDOWN_SECONDS = 2.0
_MAX_HANDSHAKES = 256  # under way; above this the oldest one of the client with the most ends
_ALPN = "h2"
#: The results of handshakes: good; not complete in time; given up by the client; without a certificate of the client
#: that is valid; refused by the client, which does not trust the server's certificate; without a common version or
#: cipher; of a client that does not speak TLS, or not HTTP/2; the oldest one when too many were under way; or failed
#: for another reason.
OK, TIMEOUT, GONE, CERTIFICATE, DISTRUST, OLD, NO_TLS, NO_H2, CROWDED, FAILED = HANDSHAKE_RESULTS = (
    "ok", "timeout", "gone", "certificate", "distrust", "old", "no_tls", "no_h2", "crowded", "failed",
)  # fmt: skip
# OpenSSL's reasons.
_RESULTS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": CERTIFICATE, "UNSUPPORTED_PROTOCOL": OLD, "NO_SHARED_CIPHER": OLD,
    "NO_SHARED_GROUP": OLD, "NO_SUITABLE_KEY_SHARE": OLD, "NO_SUITABLE_SIGNATURE_ALGORITHM": OLD,
    "NO_APPLICATION_PROTOCOL": NO_H2, "WRONG_VERSION_NUMBER": NO_TLS, "HTTP_REQUEST": NO_TLS,
    "HTTPS_PROXY_REQUEST": NO_TLS,
}  # fmt: skip


class TlsContexts(Protocol):
    """The source of TLS contexts; see serving.access.certificates.Certificates."""

    @property
    def mutual(self) -> bool:
        """Return True if clients must have certificates."""

    def grpc_context(self) -> ssl.SSLContext:
        """Return the context of a new connection."""

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Return the chain, its private key, and the authorities of clients or b"", in PEM."""


class TlsListener(Listener):
    """A listening socket whose clients must complete a TLS handshake.

    context: returns the context of a new connection. limits: told of each result, one of HANDSHAKE_RESULTS. protocols:
    of these a client must have chosen one by ALPN (RFC 7301); None for no choice.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: Callable[[], ssl.SSLContext],
        connect: Callable[[], asyncio.Protocol],
        limits: TransportLimits,
        refuses: Callable[[str], bool],
        protocols: Collection[str | None] = (_ALPN,),
    ) -> None:
        super().__init__(listening, connect, refuses)
        self._context = context
        self._protocols = protocols
        self._limits = limits

    def _begin(self, accepted: socket.socket, client: Peer) -> None:
        """Begin a handshake, and end the oldest one of the client with the most if there are too many."""
        if len(self._under_way) >= _MAX_HANDSHAKES:
            crowd = most_frequent(client_of(one.address) for one in self._under_way.values())
            oldest = next(task for task, one in self._under_way.items() if client_of(one.address) == crowd)
            its_client = self._under_way.pop(oldest)
            oldest.cancel()
            self._note(CROWDED, its_client)
        super()._begin(accepted, client)

    async def _make(self, accepted: socket.socket, client: Peer) -> None:
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                self._connect,
                accepted,
                ssl=self._context(),
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
            )
        except OSError as error:  # ssl.SSLError is one
            self._note(_result(error), client)
        else:
            secured = cast(ssl.SSLObject, transport.get_extra_info("ssl_object"))
            if secured.selected_alpn_protocol() in self._protocols:
                self._note(OK, client)
                return
            self._note(NO_H2, client)
            transport.abort()

    def _note(self, result: str, client: Peer) -> None:
        self._limits.handshake(result)
        if result != OK:
            self._limits.dropped(f"a TLS handshake has failed: {result}", client)


def _result(error: OSError) -> str:
    """Return the result of a handshake that has raised an error."""
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return CERTIFICATE
        return _RESULTS.get(reason, DISTRUST if "_ALERT_" in reason else FAILED)
    return TIMEOUT if isinstance(error, (ConnectionAbortedError, TimeoutError)) else GONE
