"""The settings of a channel to a server: address, TLS, token, load balancing, and the retries that grpc makes."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.addresses import is_local, target_of
from serving.client.errors import InvalidRequest, brief

SERVICE = pb.DESCRIPTOR.services_by_name["CapsNetService"].full_name
#: grpc makes at most five attempts.
MAX_RETRIES = 4
FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0
BACKOFF_FACTOR = 2.0
_PEM_BEGIN = b"-----BEGIN "

Pem = bytes | str | os.PathLike[str]
Token = str | Callable[[], str]


@dataclass(frozen=True)
class ChannelSettings:
    """The arguments from which grpc makes a channel.

    credentials: None for plaintext. plaintext_token: the token that each call carries if there is no TLS.
    """

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]
    plaintext_token: Token | None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that each call carries."""
        if self.plaintext_token is None:
            return ()
        return (("authorization", f"Bearer {_text_of(self.plaintext_token)}"),)


def channel_settings(
    address: str,
    *,
    tls: bool | Pem,
    client_certificate: tuple[Pem, Pem] | None,
    server_name: str,
    token: Token | None,
    allow_plaintext_token: bool,
    retries: int,
) -> ChannelSettings:
    """Return the channel's settings for a client's settings.

    Raises InvalidRequest if these are wrong or contradict each other, or if a file cannot be read.
    """
    if not (isinstance(retries, int) and 0 <= retries <= MAX_RETRIES):
        raise InvalidRequest(f"retries: {retries!r}; expected 0 to {MAX_RETRIES}", field="retries")
    if token is not None and not (isinstance(token, str) or callable(token)):
        raise InvalidRequest(
            f"token: {type(token).__name__}; expected a text, or a function that returns one", field="token"
        )
    target = target_of(address, tls is not False)
    local = is_local(target)
    if tls is False:
        if client_certificate or server_name:
            raise InvalidRequest("client_certificate and server_name need TLS: give tls=True or root certificates")
        if token is not None and not local and not allow_plaintext_token:
            raise InvalidRequest(
                f"token: would go unencrypted to {target}; use TLS, or allow_plaintext_token=True if the network "
                "itself is safe"
            )
        credentials = None
    else:
        chain, key = _pair(client_certificate)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=None if tls is True else _pem(tls, "tls"), private_key=key, certificate_chain=chain
        )
        if token is not None:
            credentials = grpc.composite_channel_credentials(
                credentials,
                grpc.metadata_call_credentials(_BearerToken(token)),
            )
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.enable_retries", int(retries > 0)),
        # grpc does not retry a larger call. Its default is a quarter of a megabyte.
        ("grpc.per_rpc_retry_buffer_size", 2**30),
        ("grpc.service_config", json.dumps(_service_config(retries))),
        ("grpc.initial_reconnect_backoff_ms", round(1000 * FIRST_BACKOFF_SECONDS)),
        ("grpc.max_reconnect_backoff_ms", round(1000 * MAX_BACKOFF_SECONDS)),
        # Each client has its own connections, which close when the client closes.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if local:
        options.append(("grpc.enable_http_proxy", 0))
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return ChannelSettings(target, credentials, tuple(options), token if credentials is None else None)


def _service_config(retries: int) -> dict[str, Any]:
    """Return the service config: round robin among an address's healthy servers, and the retries of unary calls.

    The client itself retries streams, since grpc does not resume a stream.
    """
    balancing = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    if not retries:
        return balancing
    policy = {
        "maxAttempts": retries + 1,
        "initialBackoff": f"{FIRST_BACKOFF_SECONDS}s",
        "maxBackoff": f"{MAX_BACKOFF_SECONDS}s",
        "backoffMultiplier": BACKOFF_FACTOR,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    methods = [{"service": SERVICE, "method": name} for name in ("Classify", "Explain", "GetModel", "Reconstruct")]
    return {**balancing, "methodConfig": [{"name": methods, "retryPolicy": policy}]}


class _BearerToken(grpc.AuthMetadataPlugin):
    """Adds the token to each call. grpc calls it over TLS only."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            value = _text_of(self._token)
        except Exception as error:
            callback((), error)
        else:
            callback((("authorization", f"Bearer {value}"),), None)


def _text_of(token: Token) -> str:
    """Return a token. Raises InvalidRequest for one that no header can carry, without showing it."""
    value = token() if callable(token) else token
    if isinstance(value, str) and value.isascii() and value.isprintable() and value:
        return value
    if value == "":
        raise InvalidRequest("token: empty; expected a token, or no argument token at all", field="token")
    raise InvalidRequest("token: it has characters that no header takes; expected printable ASCII", field="token")


def _pair(certificate: tuple[Pem, Pem] | None) -> tuple[bytes | None, bytes | None]:
    """Return the chain and the private key of a client's certificate. Raises InvalidRequest."""
    if certificate is None:
        return None, None
    if isinstance(certificate, bytes | str | os.PathLike) or len(certificate) != 2:
        raise InvalidRequest("client_certificate: expected two, the chain and the private key")
    chain, key = (_pem(one, "client_certificate") for one in certificate)
    return chain, key


def _pem(source: Pem, name: str) -> bytes:
    """Return the content of a PEM file, given by path or as bytes. Raises InvalidRequest."""
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or brief(str(error))
        raise InvalidRequest(f"{name}: {brief(str(source))}: {reason}", field=name) from error
    if _PEM_BEGIN not in content:  # gRPC would only say later that TLS fails
        shown = "the bytes" if isinstance(source, bytes) else brief(str(source))
        raise InvalidRequest(f"{name}: nothing in PEM is in {shown}; expected {_PEM_BEGIN.decode()}...", field=name)
    return content
