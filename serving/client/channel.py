"""How a server is reached: its address, TLS, the token, and what gRPC itself does about retries."""

import ipaddress
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos.capsnet.v1 import capsnet_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["CapsNetService"].full_name
#: gRPC makes no more than five attempts.
MAX_RETRIES = 4
FIRST_BACKOFF = 0.1  # seconds
MAX_BACKOFF = 2.0
BACKOFF_FACTOR = 2.0

Pem = bytes | str | os.PathLike[str]
Token = str | Callable[[], str]


@dataclass(frozen=True)
class Connection:
    """What a channel is made of.

    credentials: None for plaintext. plaintext_token: what to send along with each call where there is no TLS.
    """

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]
    plaintext_token: Token | None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call sends along."""
        if self.plaintext_token is None:
            return ()
        return (("authorization", f"Bearer {_text_of(self.plaintext_token)}"),)


def connection(
    address: str,
    *,
    tls: bool | Pem,
    client_certificate: tuple[Pem, Pem] | None,
    server_name: str,
    token: Token | None,
    allow_plaintext_token: bool,
    retries: int,
) -> Connection:
    """Raises ValueError where these do not fit together, OSError where a file cannot be read."""
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(f"retries: {retries}; expected 0 to {MAX_RETRIES}")
    if not address:
        raise ValueError("address: empty; expected HOST:PORT or unix:PATH")
    local = is_local(address)
    if tls is False:
        if client_certificate or server_name:
            raise ValueError("client_certificate and server_name need TLS: give tls=True or root certificates")
        if token is not None and not local and not allow_plaintext_token:
            raise ValueError(
                f"token: would go unencrypted to {address}; use TLS, or allow_plaintext_token=True where the network "
                "itself is safe"
            )
        credentials = None
    else:
        chain, key = client_certificate or (None, None)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=None if tls is True else _pem(tls),
            private_key=None if key is None else _pem(key),
            certificate_chain=None if chain is None else _pem(chain),
        )
        if token is not None:
            credentials = grpc.composite_channel_credentials(
                credentials,
                grpc.metadata_call_credentials(_BearerToken(token)),
            )
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.enable_retries", int(retries > 0)),
        # Calls larger than this are not tried again, and by default that is a quarter of a megabyte.
        ("grpc.per_rpc_retry_buffer_size", 2**30),
        ("grpc.service_config", json.dumps(_service_config(retries))),
        ("grpc.initial_reconnect_backoff_ms", round(1000 * FIRST_BACKOFF)),
        ("grpc.max_reconnect_backoff_ms", round(1000 * MAX_BACKOFF)),
        # Each client has connections of its own, which end with it.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if local:
        options.append(("grpc.enable_http_proxy", 0))
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return Connection(address, credentials, tuple(options), token if credentials is None else None)


def is_local(address: str) -> bool:
    """Whether an address cannot leave this machine: a Unix socket, or a loopback address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    plain = address
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        plain = plain.removeprefix(scheme)
    plain = plain.lstrip("/")
    host = plain[1:].partition("]")[0] if plain.startswith("[") else plain.rpartition(":")[0] or plain
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _service_config(retries: int) -> dict[str, Any]:
    """Turns among an address's servers that are well, and the retries of unary calls.

    Those of a stream are the client's own, since gRPC does not resume one.
    """
    turns = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    if not retries:
        return turns
    policy = {
        "maxAttempts": retries + 1,
        "initialBackoff": f"{FIRST_BACKOFF}s",
        "maxBackoff": f"{MAX_BACKOFF}s",
        "backoffMultiplier": BACKOFF_FACTOR,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    methods = [{"service": SERVICE, "method": name} for name in ("Classify", "GetModel")]
    return {**turns, "methodConfig": [{"name": methods, "retryPolicy": policy}]}


class _BearerToken(grpc.AuthMetadataPlugin):
    """Sends the token along; gRPC does so over TLS only."""

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
    return token if isinstance(token, str) else token()


def _pem(source: Pem) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()
