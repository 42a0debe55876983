"""The settings and the requests that both clients share."""

import time
from collections.abc import Sequence
from numbers import Real
from typing import Literal, NoReturn

import grpc
from grpc_health.v1 import health_pb2

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.channel import SERVICE, Pem, Token, channel_settings
from serving.client.errors import CapsNetError, DeadlineExceeded, InvalidRequest, UnknownModel, brief, failure_of_call
from serving.client.inputs import RequestLimits
from serving.client.reconstructions import Reconstruction, decode_reconstructions
from serving.client.results import Classification, Model, decode
from serving.client.window import Window

DEFAULT_WINDOW_IMAGES = 256
# An array of the wrong shape makes the client fetch the model again, unless it was fetched within this time.
_MODEL_FRESH_SECONDS = 1.0

_MAX_SECONDS = 1e9  # thirty years; gRPC takes a much longer timeout for one that has passed

Errors = Literal["raise", "yield"]


class Deadline:
    """The moment by which a call and all its retries must end.

    seconds: the time left at the start; None for no limit. Raises InvalidRequest unless it is above 0.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not (isinstance(seconds, Real) and seconds > 0):
            raise InvalidRequest(f"timeout: {seconds!r}; expected seconds above 0, or None", field="timeout")
        self.seconds = seconds = None if seconds is not None and seconds > _MAX_SECONDS else seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds that are left, at least 0, or None for no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class ClientBase:
    """The settings of a client, and the model as it was last fetched."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        *,
        model: str = "",
        version: str | int = "",
        timeout: float | None = 30.0,
        token: Token | None = None,
        tls: bool | Pem = False,
        client_certificate: tuple[Pem, Pem] | None = None,
        server_name: str = "",
        allow_plaintext_token: bool = False,
        retries: int = 4,
    ) -> None:
        """Prepare a client. It connects at its first call.

        address: HOST:PORT or unix:PATH. A missing port is 8001, and a scheme such as grpc:// is left out.
        model, version: the model and version to ask for. Empty: the server's only model, and its highest version.
        timeout: time limit in seconds for a call with all its retries, and for one answer of a stream. None: no limit.
        token: sent as ``authorization: Bearer TOKEN``. A function is called for the token before each call.
        tls: True to trust the well-known root certificates, or the certificates to trust, as PEM bytes or a path.
        client_certificate: the chain and the private key, each as PEM bytes or a path.
        server_name: the name in the server's certificate, if the address has another one.
        allow_plaintext_token: send the token to other machines even without TLS.
        retries: further attempts, 0 to 4, while the server is overloaded or unavailable. Before each, the client waits
            as long as the server asks, or else for a time that doubles.

        Raises InvalidRequest, which is a ValueError, if a setting is wrong or contradicts another, or if a certificate
        cannot be read.
        """
        self._timeout = Deadline(timeout).seconds
        self._retries = retries
        self._channel_settings = channel_settings(
            address,
            tls=tls,
            client_certificate=client_certificate,
            server_name=server_name,
            token=token,
            allow_plaintext_token=allow_plaintext_token,
            retries=retries,
        )
        self._address = self._channel_settings.target
        name, number = _text("model", model), _text("version", str(version) if isinstance(version, int) else version)
        self._model_request = pb.GetModelRequest(model_name=name, model_version=number)
        self._model: Model | None = None
        self._fetched_at = 0.0
        self._closed = False
        self._connect()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} has connections, which cannot be copied; make one in each process")

    def _connect(self) -> None:
        """Make the channel now, if it needs no event loop."""

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)

    def _template(self, reconstruction_error: bool) -> pb.ClassifyRequest:
        """Return a request without images."""
        asked = self._model_request
        return pb.ClassifyRequest(
            model_name=asked.model_name,
            model_version=asked.model_version,
            reconstruction_error=reconstruction_error,
        )

    def _window(self, template: pb.ClassifyRequest, model: Model, size: int) -> Window:
        return Window(template, RequestLimits.of(model, template), size, self._retries)

    def _decode(self, response: pb.ClassifyResponse, count: int) -> list[Classification]:
        self._note(response.model_name, response.model_version)
        return decode(response, count)

    def _decode_reconstructions(self, response: pb.ReconstructResponse) -> list[Reconstruction]:
        self._note(response.model_name, response.model_version)
        return decode_reconstructions(response)

    def _keep(self, message: pb.GetModelResponse) -> Model:
        self._model = model = Model.from_message(message)
        self._fetched_at = time.monotonic()
        return model

    @property
    def _is_fresh(self) -> bool:
        return time.monotonic() < self._fetched_at + _MODEL_FRESH_SECONDS

    def _note(self, name: str, version: str) -> None:
        """Forget the model if another version answered: its image shape may differ."""
        known = self._model
        if known and (known.name, known.version) != (name, version):
            self._model = None

    def _error(self, error: grpc.RpcError, indices: Sequence[int] = ()) -> CapsNetError:
        """Return the exception for a failed call. indices: the number, in the input, of each image of the request."""
        result = failure_of_call(error, self._address).to_error(indices)
        if isinstance(result, InvalidRequest | UnknownModel):
            self._model = None
        return result

    def _check_open(self) -> None:
        if self._closed:
            raise CapsNetError("the client is closed")

    def _readiness(self, timeout: float | None) -> "Readiness":
        return Readiness(self._address, Deadline(timeout))


class Readiness:
    """The state of a server, as its health service reports it while a client waits."""

    request = health_pb2.HealthCheckRequest(service=SERVICE)

    def __init__(self, address: str, deadline: Deadline) -> None:
        self.deadline = deadline
        self._address = address
        self._status = "no server answers"

    def is_ready(self, answer: health_pb2.HealthCheckResponse) -> bool:
        """Note an answer of the health service. Return True if it reports SERVING."""
        self._status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def ended(self, error: grpc.RpcError) -> None:
        """Note that the watch ended; the caller may start another one.

        Raises DeadlineExceeded once the time is up, and the error itself if another watch would end in the same way.
        """
        failure = failure_of_call(error, self._address)
        if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DeadlineExceeded(
                f"{self._address}: not ready after {self.deadline.seconds} seconds ({self._status})",
                code=failure.code,
            ) from error
        if failure.code is not grpc.StatusCode.UNAVAILABLE:
            raise failure.to_error() from error
        self._status = failure.text


def _text(name: str, value: str) -> str:
    """Return a setting that is sent as text. Raises InvalidRequest."""
    if isinstance(value, str) and value.isprintable():
        return value
    raise InvalidRequest(f"{name}: {brief(repr(value))}; expected printable text", field=name)


def check_stream(errors: str, window: int) -> None:
    """Raise InvalidRequest for invalid settings of a stream."""
    if errors not in ("raise", "yield"):
        raise InvalidRequest(f"errors: {errors!r}; expected 'raise' or 'yield'", field="errors")
    if not isinstance(window, int) or window < 1:
        raise InvalidRequest(f"window: {window!r}; expected 1 or more", field="window")


class Patience:
    """The time limits of a stream: one for the whole stream, and one for each answer."""

    def __init__(self, address: str, deadline: Deadline, stall: float | None, window: Window) -> None:
        self._address = address
        self._deadline = deadline
        self._stall = stall
        self._window = window

    def left(self) -> float | None:
        """Return the seconds to wait before the next check, or None for no limit.

        Raises DeadlineExceeded once a limit has passed.
        """
        total = self._deadline.left()
        if total == 0:
            raise DeadlineExceeded(f"{self._address}: not all images were answered in {self._deadline.seconds} seconds")
        if self._stall is None or not self._window.waits:
            return total
        stall = self._stall - (time.monotonic() - self._window.heard_at)
        if stall <= 0:
            raise DeadlineExceeded(f"{self._address}: no answer for {self._stall} seconds")
        return stall if total is None else min(stall, total)
