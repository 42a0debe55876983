"""The calls of a soak over HTTP: right ones in each form, wrong ones, and those that their client gives up."""

import asyncio
import base64
import contextlib
import http.client
import json
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import json_format

from benchmarks.soak.client import PATIENCE_SECONDS, Client, WrongAnswer
from benchmarks.soak.inner_text import inner_text
from benchmarks.soak.served import SWAPPED
from benchmarks.soak.windows import HUNG_UP, REFUSED, RIGHT
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as inference

_SIDE = 28
_INFER = f"/v2/models/{SWAPPED}/infer"
_JSON, _PNG, _FORM = "application/json", "image/png", "multipart/form-data; boundary=edge"
_MAX_REQUESTS = 3  # over one connection
_BINARY = "application/octet-stream"
_DOCUMENT = "/openapi.json"  # which an error may name


class _Request(NamedTuple):
    """A request. token: None for the client's own."""

    path: str
    body: bytes
    media: str = _JSON
    headers: tuple[tuple[str, str], ...] = ()
    token: str | None = None


class _Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


async def classify(client: Client) -> str:
    """Classify digits in some forms, one after the other over a connection."""
    sent = [client.places() for _ in range(client.random.randint(1, _MAX_REQUESTS))]
    requests = [_classify_request(client, places) for places in sent]
    for places, answer in zip(sent, await _ask(client, *requests), strict=True):
        client.check_classified(json_format.ParseDict(_content(answer), pb.ClassifyResponse()), places)
    return RIGHT


def _classify_request(client: Client, places: Sequence[int]) -> _Request:
    """Return a request in JSON or as a form."""
    message = client.classify_request(places)
    if client.random.random() < 0.5:
        images = [{name: base64.b64encode(value).decode() for name, value in _fields(one)} for one in message.images]
        content = {"model_name": SWAPPED, "images": images}
        return _Request("/v1/classify", json.dumps(content).encode())
    part = b'--edge\r\nContent-Disposition: form-data; name="image"\r\n\r\n%s\r\n'
    parts = [part % value for one in message.images for _, value in _fields(one)]
    return _Request(f"/v1/classify?model_name={SWAPPED}", b"".join(parts) + b"--edge--\r\n", _FORM)


def _fields(image: pb.Image) -> list[tuple[str, bytes]]:
    return [(field.name, value) for field, value in image.ListFields()]


async def infer(client: Client) -> str:
    """Send tensors as JSON or binary data, and read either."""
    places = client.places(4)
    request = client.infer_request(places)
    pixels = request.raw_input_contents[0]
    tensor: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": list(request.inputs[0].shape)}
    content = {"inputs": [tensor], "parameters": {"binary_data_output": client.random.random() < 0.5}}
    if client.random.random() < 0.5:
        tensor["data"] = list(pixels)
        sent = _Request(_INFER, json.dumps(content).encode())
    else:
        tensor["parameters"] = {"binary_data_size": len(pixels)}
        head = json.dumps(content).encode()
        length = ("Inference-Header-Content-Length", str(len(head)))
        sent = _Request(_INFER, head + pixels, _BINARY, (length,))
    [answer] = await _ask(client, sent)
    client.check_inferred(_inferred(answer), places)
    return RIGHT


def _inferred(answer: _Answer) -> inference.ModelInferResponse:
    """Return an answer of /v2 as gRPC's message."""
    length = int(answer.headers.get("Inference-Header-Content-Length") or len(answer.body))
    content, binary = _content(answer._replace(body=answer.body[:length])), answer.body[length:]
    response = inference.ModelInferResponse(model_name=content["model_name"], model_version=content["model_version"])
    for output in content["outputs"]:
        response.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        size = output.get("parameters", {}).get("binary_data_size", 0)
        raw, binary = binary[:size], binary[size:]
        response.raw_output_contents.append(raw or np.array(output["data"], "<f4").tobytes())
    return response


async def explain(client: Client) -> str:
    """Explain an answer, which must be that of Classify."""
    [place] = client.places(1)
    message = client.classify_request([place])
    [(_, value)] = _fields(message.images[0])
    parts = client.random.choice(("routing", "contributions", "relevance"))
    [answer] = await _ask(client, _Request(f"/v1/explain?model_name={SWAPPED}&parts={parts}", value, _PNG))
    explained = json_format.ParseDict(_content(answer), pb.ExplainResponse())
    [explanation] = explained.results
    classified = pb.ClassifyResponse(
        model_name=explained.model_name, model_version=explained.model_version, results=[explanation.classification]
    )
    client.check_classified(classified, [place])
    if len(explanation.pixels) != _SIDE * _SIDE:
        raise WrongAnswer("Explain: another image")
    return RIGHT


async def reconstruct(client: Client) -> str:
    """Reconstruct an image, with changes or as a picture."""
    [place] = client.places(1)
    [(_, value)] = _fields(client.classify_request([place]).images[0])
    as_picture = client.random.random() < 0.5
    query = "" if as_picture else "&sweep=1:-0.2:0.2:5&classes=3"
    accept = (("Accept", _PNG),) if as_picture else ()
    path = f"/v1/reconstruct?model_name={SWAPPED}{query}{'&classes=1' if as_picture else ''}"
    [answer] = await _ask(client, _Request(path, value, _PNG, accept))
    if as_picture:
        if answer.status != 200 or not answer.body.startswith(b"\x89PNG"):
            raise WrongAnswer(f"Reconstruct: {answer.status} and no picture")
        return RIGHT
    drawn = json_format.ParseDict(_content(answer), pb.ReconstructResponse())
    if [len(one.image) for one in drawn.results] != [_SIDE * _SIDE] * 5:
        raise WrongAnswer("Reconstruct: other images")
    return RIGHT


async def wrong_request(client: Client) -> str:
    """Send a request that must be refused with one certain status, and no inner text."""
    request, status = client.random.choice(_wrong_requests(client))
    [answer] = await _ask(client, request)
    text = answer.body.decode(errors="replace").replace(_DOCUMENT, "")
    if sign := inner_text(text):
        raise WrongAnswer(f"inner text in an error over HTTP: {sign!r} in {text!r}")
    if answer.status not in (status, 429 if request.token else status):  # many new tokens at once
        raise WrongAnswer(f"{request.path}: {answer.status} for a request that must get {status}: {text[:200]}")
    return REFUSED


def _wrong_requests(client: Client) -> list[tuple[_Request, int]]:
    """Return requests that must be refused, and the status of each."""
    junk = client.random.randbytes(client.random.randint(1, 200))
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 50_000, 50_000, 8, 0, 0, 0, 0) + bytes(4)
    metrics = client.server.token_of["metrics"]
    return [
        (_Request("/v1/classify", b"{" + junk), 400),
        (_Request("/v1/classify", junk, "text/x"), 415),
        (_Request("/v1/classify", b"--edge\r\n" + junk, _FORM), 400),
        (_Request(f"/v1/classify?model_name={SWAPPED}&preprocess=auto", huge, _PNG), 400),
        (_Request("/v1/classify?model_name=../none", bytes(784), _BINARY), 404),
        (_Request("/v1/explain?parts=all", bytes(784), _BINARY), 400),
        (_Request(f"/v1/reconstruct?model_name={SWAPPED}", b'{"poses": {"poses": [{"pose": [1]}]}}'), 400),
        (_Request(_INFER, b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1], "data": [-1]}]}'), 400),
        (_Request(_INFER, junk, headers=(("Inference-Header-Content-Length", "999999"),)), 400),
        (_Request("/v3", b""), 404),
        (_Request(_INFER, b"{}", token=""), 401),
        (_Request("/v1/classify", bytes(784), token=f"predict.{junk.hex()}"), 401),
        (_Request("/v1/classify", bytes(784), token=metrics), 403),
    ]


async def hang_up(client: Client) -> str:
    """Begin a request, and hang up in the middle or before the answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", client.server.port_of("http"), ssl=client.tls("http/1.1"))
    request = _classify_request(client, client.places())
    head = f"POST {request.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {request.media}\r\n"
    head += f"Authorization: Bearer {client.server.token_of['predict']}\r\nContent-Length: {len(request.body)}\r\n\r\n"
    whole = head.encode() + request.body
    writer.write(whole[: client.random.randint(1, len(whole))])
    await client.abort(writer)
    return HUNG_UP


def _content(answer: _Answer) -> Any:
    if answer.status != 200:
        raise WrongAnswer(f"{answer.status} over HTTP: {answer.body[:300].decode(errors='replace')}")
    return json.loads(answer.body)


async def _ask(client: Client, *requests: _Request) -> list[_Answer]:
    """Send requests over a new connection, one after the other. Raises OSError and WrongAnswer."""
    context, port = client.tls("http/1.1"), client.server.port_of("http")
    own = client.server.token_of["predict"]

    def ask() -> list[_Answer]:
        answers = []
        with contextlib.closing(
            http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS, context=context)
        ) as connection:
            for request in requests:
                token = own if request.token is None else request.token
                headers = {"Content-Type": request.media, **dict(request.headers)}
                headers |= {"Authorization": f"Bearer {token}"} if token else {}
                connection.request("POST", request.path, request.body, headers)
                response = connection.getresponse()
                answers.append(_Answer(response.status, response.msg, response.read()))
        return answers

    try:
        return await asyncio.to_thread(ask)
    except http.client.HTTPException as error:
        raise WrongAnswer(f"no answer over HTTP: {error!r}") from None
