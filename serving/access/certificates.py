"""TLS: the server's certificate, and the authorities that sign clients' certificates."""

import ssl
from pathlib import Path
from typing import NamedTuple

from serving.access.files import AccessError, Renewed

# Key exchange with forward secrecy and authenticated encryption (AEAD); for TLS 1.2, since 1.3 has no others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class _Loaded(NamedTuple):
    """The content of the certificate files, and the contexts that are made of it, for gRPC and for HTTP."""

    chain: bytes
    key: bytes
    authorities: bytes
    grpc: ssl.SSLContext
    http: ssl.SSLContext


class Certificates:
    """The server's certificate. Files that change are read again; open connections keep what they have.

    cert, key: paths of PEM files, the chain and its private key. client_ca: path of the authorities whose clients may
    call, or "" for clients without certificates. On gRPC's ports a client then must have a certificate. On the HTTP
    port it may have one, so that probes need none.

    Raises AccessError if the files are no certificates or do not belong together, OSError if one cannot be read.
    """

    def __init__(self, cert: str, key: str, client_ca: str = "") -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        paths = [cert, key, *([client_ca] if client_ca else [])]
        self._files = Renewed("the TLS certificates", paths, self._load)

    @property
    def mutual(self) -> bool:
        """Return True if clients must have certificates."""
        return bool(self._client_ca)

    def grpc_context(self) -> ssl.SSLContext:
        """Return the context of a new gRPC connection."""
        return self._files.content.grpc

    def http_context(self) -> ssl.SSLContext:
        """Return the context of a new HTTP connection."""
        return self._files.content.http

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Return the chain, its private key, and the authorities of clients or b"", in PEM."""
        loaded = self._files.content
        return loaded.chain, loaded.key, loaded.authorities

    def renew(self) -> None:
        """Read the files now if one of them has changed."""
        self._files.check()

    def _load(self) -> _Loaded:
        authorities = Path(self._client_ca).read_bytes() if self._client_ca else b""
        required = ssl.CERT_REQUIRED if self._client_ca else ssl.CERT_NONE
        optional = ssl.CERT_OPTIONAL if self._client_ca else ssl.CERT_NONE
        return _Loaded(
            Path(self._cert).read_bytes(),
            Path(self._key).read_bytes(),
            authorities,
            self._context("h2", required),
            self._context("http/1.1", optional),
        )

    def _context(self, protocol: str, client: ssl.VerifyMode) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols([protocol])
        context.verify_mode = client
        try:
            # A key with a password would be asked for on the terminal; an empty password makes it an error.
            context.load_cert_chain(self._cert, self._key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise AccessError(
                f"tls_cert and tls_key: {self._cert!r} and {self._key!r}; expected a certificate chain and its private "
                f"key without a password, both PEM ({getattr(error, 'reason', None) or 'not readable'})"
            ) from error
        if self._client_ca:
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise AccessError(
                    f"tls_client_ca: {self._client_ca!r}; expected certificates of authorities in PEM"
                ) from error
        return context
