"""The model behind LitServe, for ``benchmarks.serving --peers``: pixels of one image in, probabilities and poses out.

litserve_server.py MODEL PORT MAX_BATCH THREADS: one worker, 10 ms for a batch to fill.
"""
# Its imports are installed in an environment of its own.
# mypy: ignore-errors

import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from typing import Annotated

import litserve
import numpy as np
import onnxruntime
from fastapi import Body, Response


class CapsNet(litserve.LitAPI):
    def __init__(self, model, threads, **options):
        super().__init__(**options)
        self.model, self.threads = model, threads

    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        self.shape = self.session.get_inputs()[0].shape[1:]

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]):
        return np.frombuffer(request, np.uint8).reshape(self.shape)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images):
        return self.session.run(["probabilities", "poses"], {"images": images})

    def unbatch(self, outputs):
        return list(zip(*outputs, strict=True))

    def encode_response(self, output):
        return Response(output[0].tobytes() + output[1].tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    model, port, max_batch, threads = sys.argv[1:5]
    api = CapsNet(model, int(threads), max_batch_size=int(max_batch), batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, log_level="error", generate_client_file=False)
