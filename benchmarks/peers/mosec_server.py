"""The model behind mosec, for ``benchmarks.serving --peers``: pixels of one image in, probabilities and poses out.

mosec_server.py MODEL PORT MAX_BATCH THREADS: one worker, mosec's default wait of 10 ms for a batch to fill.
"""
# Its imports are installed in an environment of its own.
# mypy: ignore-errors

import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
from mosec import Server, Worker


class CapsNet(Worker):
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["CAPSNET_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            os.environ["CAPSNET_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.shape = self.session.get_inputs()[0].shape[1:]

    def deserialize(self, data):
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def forward(self, data):
        probabilities, poses = self.session.run(["probabilities", "poses"], {"images": np.stack(data)})
        return [a.tobytes() + b.tobytes() for a, b in zip(probabilities, poses, strict=True)]

    def serialize(self, data):
        return data


if __name__ == "__main__":
    model, port, max_batch, threads = sys.argv[1:5]
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--log-level", "error"]
    server = Server()
    workers_see = {"CAPSNET_MODEL": model, "CAPSNET_THREADS": threads}
    server.append_worker(CapsNet, num=1, max_batch_size=int(max_batch), max_wait_time=10, env=[workers_see])
    server.run()
