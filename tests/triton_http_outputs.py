"""Requests for chosen outputs with NVIDIA's unmodified client of HTTP.

It works with greenlets, so no test imports this module. It is a process that gets the server's address and reads a list
of requests as JSON, and prints the outputs of each as JSON. A request has the members of ``_infer``.
"""

import base64
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton


def main(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        print(json.dumps([_infer(client, **request) for request in json.load(sys.stdin)]))


def _infer(
    client: Any, model: str, images: Any, datatype: str, outputs: list[str], parameters: dict[str, Any], binary: bool
) -> dict[str, Any]:
    """Return the outputs by name. images: pixels, (n, C, H, W); for BYTES, files in base 64, (n,)."""
    if datatype == "BYTES":
        values = np.array([base64.b64decode(text) for text in images], np.object_)
        binary = True  # as JSON they would have to be texts
    else:
        values = np.array(images, np.uint8)
    tensor = triton.InferInput("images", values.shape, datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    asked = [triton.InferRequestedOutput(name, binary_data=binary) for name in outputs]
    result = client.infer(model, [tensor], outputs=asked, parameters=parameters)
    return {name: result.as_numpy(name).tolist() for name in outputs}


if __name__ == "__main__":
    main(*sys.argv[1:])
