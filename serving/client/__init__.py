"""The client: classify, explain and reconstruct images with a running server, with threads or with asyncio.

::

    from serving.client import CapsNetClient

    with CapsNetClient("127.0.0.1:8001") as client:
        [seven] = client.classify("tests/data/seven.png")
        [explanation] = client.explain("tests/data/seven.png")
        [drawn] = client.reconstruct("tests/data/seven.png", changes={3: 0.1})
    print(seven.label, seven.confidence, seven.pose, explanation.classes[0].relevance, drawn.image)

``python -m serving.client FILE...`` does the same on the command line.
"""

from serving.client.aio import AsyncCapsNetClient
from serving.client.errors import (
    AccessDenied,
    CapsNetError,
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    Overloaded,
    ServerFault,
    Unavailable,
    UnknownModel,
    Unsupported,
)
from serving.client.explanations import Class, ClassExplanation, Explanation, Part
from serving.client.inputs import Images, Item, Preprocess
from serving.client.reconstructions import Pose, Poses, Reconstruction, Sweep
from serving.client.results import Calibration, Classification, Model, Preparation, PrimaryCapsules, Verdict
from serving.client.sync import CapsNetClient

__all__ = [
    "AccessDenied",
    "AsyncCapsNetClient",
    "Calibration",
    "CapsNetClient",
    "CapsNetError",
    "Class",
    "ClassExplanation",
    "Classification",
    "DeadlineExceeded",
    "Explanation",
    "Images",
    "InvalidImage",
    "InvalidRequest",
    "Item",
    "Model",
    "Overloaded",
    "Part",
    "Pose",
    "Poses",
    "Preparation",
    "Preprocess",
    "PrimaryCapsules",
    "Reconstruction",
    "ServerFault",
    "Sweep",
    "Unavailable",
    "UnknownModel",
    "Unsupported",
    "Verdict",
]
