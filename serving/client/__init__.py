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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
#: The modules with these names, those that import least first.
_MODULES = ("errors", "results", "explanations", "reconstructions", "inputs", "sync", "aio")

if not TYPE_CHECKING:  # otherwise type checkers would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import a name at its first use.

        The import of NumPy and gRPC takes half a second, in which Ctrl-C would end the command with a traceback.
        """
        for module in _MODULES if name in __all__ else ():
            found = importlib.import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
