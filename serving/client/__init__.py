"""The client: classify arrays and image files with a running server, with threads or with asyncio.

::

    from serving.client import CapsNetClient

    with CapsNetClient("127.0.0.1:8001") as client:
        [seven] = client.classify("tests/data/seven.png")
    print(seven.label, seven.probability, seven.pose)

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
)
from serving.client.inputs import Images, Item, Preprocess
from serving.client.results import Classification, Model
from serving.client.sync import CapsNetClient

__all__ = [
    "AccessDenied",
    "AsyncCapsNetClient",
    "CapsNetClient",
    "CapsNetError",
    "Classification",
    "DeadlineExceeded",
    "Images",
    "InvalidImage",
    "InvalidRequest",
    "Item",
    "Model",
    "Overloaded",
    "Preprocess",
    "ServerFault",
    "Unavailable",
    "UnknownModel",
]
