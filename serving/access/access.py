"""The server's access: certificates, tokens and guard, from the settings."""

import logging
import ssl
import time
from collections.abc import Callable

from serving.access.certificates import Certificates
from serving.access.files import AccessError
from serving.access.guard import ClientLimits, Guard, Refused
from serving.access.tokens import METRICS, PREDICT, Tokens
from serving.settings import Settings
from serving.transport.methods import Peer, is_loopback

_FILES = ("tls_cert", "tls_key", "tls_client_ca", "tokens")  # the settings that are paths

_logger = logging.getLogger(__name__)


class Access:
    """Who may call a server. refused: see serving.access.guard.Refused.

    Raises AccessError if a file is wrong or cannot be read.
    """

    def __init__(self, settings: Settings, refused: Refused) -> None:
        cert, key, authorities = settings.tls_cert, settings.tls_key, settings.tls_client_ca
        try:
            self.certificates = Certificates(cert, key, authorities) if cert else None
            self._tokens = Tokens(settings.tokens) if settings.tokens else None
        except OSError as error:
            names = [name for name in _FILES if getattr(settings, name) == error.filename]
            raise AccessError(f"{' or '.join(names)}: {error.filename!r} cannot be read: {error.strerror}") from error
        limits = ClientLimits(settings.client_calls or None, settings.client_rate or None)
        self.guard = Guard(self._tokens, bool(settings.tls_client_ca), limits, refused, time.monotonic)

    @property
    def http_context(self) -> Callable[[], ssl.SSLContext] | None:
        """Return the function that gives the context of a new HTTP connection; None for no encryption."""
        return self.certificates.http_context if self.certificates else None

    async def admit(self, authorization: str | None, peer: Peer) -> None:
        """Let a client call methods, or raise a ServingError."""
        await self.guard.admit(authorization, peer, PREDICT)

    async def admit_to_metrics(self, authorization: str | None, peer: Peer) -> None:
        """Let a client read the metrics, or raise a ServingError."""
        await self.guard.admit(authorization, peer, METRICS)

    def renew(self) -> None:
        """Read the files now that have changed."""
        for files in (self.certificates, self._tokens):
            if files:
                files.renew()

    def warn(self, host: str) -> None:
        """Log a warning if others can reach the server, and it does not protect its calls."""
        if is_loopback(host):
            return
        everyone = not self._tokens and not (self.certificates and self.certificates.mutual)
        if self._tokens and not self.certificates:
            _logger.warning("without TLS, tokens are readable in the network; --tls-cert and --tls-key encrypt")
        elif everyone and not self.certificates:
            _logger.warning("everyone who reaches %s may call, and nothing is encrypted (--insecure)", host or "a port")
        elif everyone:
            _logger.warning("everyone who reaches %s may call; --tokens and --tls-client-ca limit it", host or "a port")
