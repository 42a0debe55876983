"""The changes to a server during a soak: models are swapped and unloaded, tokens and certificates renewed."""

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import cycle

import grpc

from benchmarks.soak.client import PATIENCE_SECONDS, Client, WrongAnswer, bearer
from benchmarks.soak.served import (
    SWAPPED,
    UNLOADED,
    put,
    renew_certificate,
    take_away,
    write_tokens,
)
from benchmarks.soak.windows import RENEWALS, SWAPS, TOKEN_RELOADS, UNLOADS
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as inference
from protos.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.access.tokens import PREDICT, TokenEntry, new_token

#: Within this time the server must use new tokens and certificates, in seconds. It looks once a second.
_NOTICE_SECONDS = 15.0
_GUEST = "guest"
_STEP_SECONDS = 0.2


class Changes:
    """The changes of one server, each again and again.

    entries: those of the token file. made: by kind, how many have been made.
    """

    def __init__(self, client: Client, entries: list[TokenEntry]) -> None:
        self.made = Counter[str]()
        self._client, self._entries = client, entries
        self._folder = client.server.folder
        self._channel = client.connect(client.server.admin)
        self._admin = GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._options = {"timeout": PATIENCE_SECONDS, "metadata": bearer(client.server.token_of["admin"])}

    async def close(self) -> None:
        await self._channel.close(None)

    async def swap_models(self, pause: float) -> None:
        """Put a higher version into the repository and take it away again, by turns, for ever."""
        for number in cycle("21"):
            await asyncio.sleep(pause)
            change = put if number == "2" else take_away
            await asyncio.to_thread(change, self._folder, SWAPPED, "2")
            await self._load(SWAPPED)
            asked = pb.GetModelRequest(model_name=SWAPPED)
            model = await self._client.capsnet.GetModel(asked, timeout=PATIENCE_SECONDS, metadata=self._client.metadata)
            if model.model_version != number:
                raise WrongAnswer(f"version {model.model_version} is served after the load of version {number}")
            self.made[SWAPS] += 1

    async def unload_a_model(self, pause: float) -> None:
        """Unload a model and load it again, by turns, for ever."""
        while True:
            await asyncio.sleep(pause)
            self._client.present.discard(UNLOADED)
            asked = inference.RepositoryModelUnloadRequest(model_name=UNLOADED)
            await self._admin.RepositoryModelUnload(asked, **self._options)
            await asyncio.sleep(pause)
            await self._load(UNLOADED)
            self._client.present.add(UNLOADED)
            self.made[UNLOADS] += 1

    async def renew_tokens(self, pause: float) -> None:
        """Add a client to the token file and remove it again, by turns, for ever."""
        while True:
            await asyncio.sleep(pause)
            token, hashed = new_token(_GUEST)
            for entries, expected in (
                ([*self._entries, TokenEntry(_GUEST, (PREDICT,), hashed)], grpc.StatusCode.OK),
                (self._entries, grpc.StatusCode.UNAUTHENTICATED),
            ):
                await asyncio.to_thread(write_tokens, self._folder, entries)
                await _until(partial(self._code_of, token), expected)
            self.made[TOKEN_RELOADS] += 1

    async def renew_certificates(self, pause: float) -> None:
        """Write a new certificate, and wait until new connections get it, for ever."""
        while True:
            await asyncio.sleep(pause)
            written = await asyncio.to_thread(renew_certificate, self._folder)
            await _until(self._shown_certificate, ssl.PEM_cert_to_DER_cert(written))
            self.made[RENEWALS] += 1

    async def _load(self, name: str) -> None:
        await self._admin.RepositoryModelLoad(inference.RepositoryModelLoadRequest(model_name=name), **self._options)

    async def _code_of(self, token: str) -> grpc.StatusCode:
        asked = pb.GetModelRequest(model_name=SWAPPED)
        try:
            await self._client.capsnet.GetModel(asked, timeout=PATIENCE_SECONDS, metadata=bearer(token))
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def _shown_certificate(self) -> bytes | None:
        context = self._client.tls("h2")
        _, writer = await asyncio.open_connection("127.0.0.1", self._client.server.port, ssl=context)
        shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return shown


async def _until(look: Callable[[], Awaitable[object]], expected: object) -> None:
    """Look until there is what is expected. Raises WrongAnswer if it does not come in time."""
    end = time.monotonic() + _NOTICE_SECONDS
    while (found := await look()) != expected:
        if time.monotonic() > end:
            raise WrongAnswer(f"{found!r:.80} after {_NOTICE_SECONDS:g} seconds; expected {expected!r:.80}")
        await asyncio.sleep(_STEP_SECONDS)
