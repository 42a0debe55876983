"""Calls to a server with NVIDIA's unmodified client of HTTP.

It works with greenlets, so no test imports this module. It is a process that gets the server's address and a file of
two digits, and prints its results as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def main(address: str, digits: str) -> None:
    images = np.frombuffer(Path(digits).read_bytes(), np.uint8).reshape(2, 1, 28, 28)
    found: dict[str, Any] = {}
    with triton.InferenceServerClient(address) as client:
        found["live"] = [client.is_server_live(), client.is_server_ready()]
        found["ready"] = [client.is_model_ready(name) for name in ("capsnet-mnist", "other")]
        found["server"] = client.get_server_metadata()
        found["model"] = client.get_model_metadata("capsnet-mnist", "1")
        found["config"] = client.get_model_config("capsnet-mnist")
        found["index"] = client.get_model_repository_index()
        found["outputs"] = [_infer(client, images, *way) for way in ((True, True), (True, False), (False, False))]
        packed = client.infer("capsnet-mnist", _inputs(images, True), request_compression_algorithm="gzip")
        found["outputs"].append(_arrays(packed))
        classes = triton.InferRequestedOutput("probabilities", class_count=2)
        result = client.infer("capsnet-mnist", _inputs(images, True), outputs=[classes], request_id="a", priority=1)
        found["classes"] = [[text.decode() for text in row] for row in result.as_numpy("probabilities")]
        found["later"] = _arrays(client.async_infer("capsnet-mnist", _inputs(images, True)).get_result())
        found["statistics"] = client.get_inference_statistics("capsnet-mnist")["model_stats"][0]["inference_count"]
        try:
            client.infer("capsnet-mnist", _inputs(images[:, :, :14], True))
        except InferenceServerException as error:
            found["error"] = [error.status(), error.message()]
    print(json.dumps(found))


def _inputs(images: Any, binary: bool) -> list[Any]:
    tensor = triton.InferInput("images", images.shape, "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return [tensor]


def _infer(client: Any, images: Any, binary: bool, binary_output: bool) -> Any:
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_output) for name in ("probabilities", "poses")]
    return _arrays(client.infer("capsnet-mnist", _inputs(images, binary), outputs=outputs))


def _arrays(result: Any) -> Any:
    return {name: result.as_numpy(name).tolist() for name in ("probabilities", "poses")}


if __name__ == "__main__":
    main(*sys.argv[1:])
