"""Calls to a server with NVIDIA's unmodified client.

The client's messages have the same names as ours, and one process cannot hold both. So no test imports this module. It
is a process that reads calls, a line of JSON each, ``[name, arguments]``, and prints each result as a line of JSON.
"""

import asyncio
import base64
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import aio, model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

SECONDS = 20


def _inputs(images: Any, datatype: str = "UINT8") -> list[Any]:
    """Return the client's inputs.

    images: pixels, (n, C, H, W), as nested lists; for BYTES, files in base 64, (n,).
    """
    if datatype == "BYTES":
        values = np.array([base64.b64decode(text) for text in images], np.object_)
    else:
        values = np.array(images, {"UINT8": np.uint8, "FP32": np.float32}[datatype])
    tensor = triton.InferInput("images", values.shape, datatype)
    tensor.set_data_from_numpy(values)
    return [tensor]


def _arguments(
    images: Any, outputs: dict[str, int] | None = None, datatype: str = "UINT8", **request: Any
) -> dict[str, Any]:
    """Return a request's arguments for the client. outputs: by name, the number of classes; 0 for the numbers."""
    arguments = {**request, "inputs": _inputs(images, datatype)}
    if outputs:
        asked = [triton.InferRequestedOutput(name, class_count=classes) for name, classes in outputs.items()]
        arguments["outputs"] = asked
    return arguments


def _result(result: Any) -> dict[str, Any]:
    response = result.get_response()
    outputs = {}
    for output in response.outputs:
        array = result.as_numpy(output.name)
        values = [[text.decode() for text in row] for row in array] if output.datatype == "BYTES" else array.tolist()
        outputs[output.name] = values
    parameters = {name: value.bool_param for name, value in response.parameters.items()}
    model = {"model": [response.model_name, response.model_version], "id": response.id}
    return {**model, "outputs": outputs, "parameters": parameters}


def _error(error: InferenceServerException) -> dict[str, Any]:
    return {"status": error.status(), "error": error.message()}


def infer(address: str, **request: Any) -> Any:
    with triton.InferenceServerClient(address) as client:
        try:
            return _result(client.infer(**_arguments(**request)))
        except InferenceServerException as error:
            return _error(error)


def async_infer(address: str, **request: Any) -> Any:
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.async_infer(callback=lambda result, error: answers.put((result, error)), **_arguments(**request))
        result, error = answers.get(timeout=SECONDS)
    return _error(error) if error else _result(result)


def aio_infer(address: str, **request: Any) -> Any:
    async def call() -> Any:
        async with aio.InferenceServerClient(address) as client:
            try:
                return _result(await client.infer(**_arguments(**request)))
            except InferenceServerException as error:
                return _error(error)

    return asyncio.run(call())


def stream(address: str, requests: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Send a stream of requests. options: further options of each request."""
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for request in requests:
            client.async_stream_infer(**_arguments(**request), **options)
        found = [answers.get(timeout=SECONDS) for _ in requests]
        client.stop_stream()
    return [_error(error) if error else _result(result) for result, error in found]


def aio_stream(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    async def every() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield _arguments(**request)

    async def call() -> list[Any]:
        async with aio.InferenceServerClient(address) as client:
            found = [answer async for answer in client.stream_infer(every())]
        return [_error(error) if error else _result(result) for result, error in found]

    return asyncio.run(call())


def ask(address: str, method: str, *arguments: Any) -> Any:
    """Make a call of the client other than inference, such as ``get_model_config``."""
    with triton.InferenceServerClient(address) as client:
        try:
            answer = getattr(client, method)(*arguments)
        except InferenceServerException as error:
            return _error(error)
    return answer if isinstance(answer, bool | None) else _as_json(answer)


def aio_ask(address: str, method: str, *arguments: Any) -> Any:
    async def call() -> Any:
        async with aio.InferenceServerClient(address) as client:
            return await getattr(client, method)(*arguments)

    answer = asyncio.run(call())
    return answer if isinstance(answer, bool | None) else _as_json(answer)


def _as_json(message: Any) -> Any:
    """Return a message as JSON, in the form in which perf_analyzer reads it."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def descriptions() -> list[str]:
    """Return the descriptors of the client's messages, in base 64."""
    files = (model_config_pb2.DESCRIPTOR, service_pb2.DESCRIPTOR)
    return [base64.b64encode(file.serialized_pb).decode() for file in files]


def main() -> None:
    for line in sys.stdin:
        name, arguments, keywords = json.loads(line)
        print(json.dumps(globals()[name](*arguments, **keywords)), flush=True)


if __name__ == "__main__":
    main()
