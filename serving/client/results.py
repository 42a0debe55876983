"""The server's answers as plain values with NumPy arrays."""

from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.errors import ServerFault


@dataclass(frozen=True, eq=False, slots=True)
class Classification:
    """The model's result for one image, with J classes and poses of E numbers. The arrays are read-only.

    label, class_index: the class with the longest capsule.
    probability: the length of that capsule, from 0 to 1.
    probabilities: (J,) float32, one for each class. They need not add up to 1.
    poses: (J, E) float32, the class capsules' pose vectors.
    labels: the J class names.
    """

    label: str
    class_index: int
    probability: float
    probabilities: NDArray[np.float32] = field(repr=False)
    poses: NDArray[np.float32] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    model_name: str
    model_version: str

    @property
    def pose(self) -> NDArray[np.float32]:
        """Return the winner's pose vector, (E,) float32."""
        pose: NDArray[np.float32] = self.poses[self.class_index]
        return pose


@dataclass(frozen=True)
class Model:
    """A served model.

    labels: the class names, in the order of the capsules.
    image_shape: (C, H, W).
    pose_size: the dimension of a pose.
    max_images_per_request, max_request_bytes: the server's limits for one request.
    test_errors: the number of images, out of test_images of the data set, that the model classified wrongly.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    image_shape: tuple[int, int, int]
    pose_size: int
    max_images_per_request: int
    max_request_bytes: int
    precision: str
    execution_provider: str
    sha256: str
    dataset: str
    test_errors: int
    test_images: int

    @classmethod
    def from_message(cls, message: pb.GetModelResponse) -> "Model":
        return cls(
            name=message.model_name,
            version=message.model_version,
            labels=tuple(message.labels),
            image_shape=(message.image_channels, message.image_height, message.image_width),
            pose_size=message.pose_size,
            max_images_per_request=message.max_images_per_request,
            max_request_bytes=message.max_request_bytes,
            precision=message.precision,
            execution_provider=message.execution_provider,
            sha256=message.sha256,
            dataset=message.dataset,
            test_errors=message.test_errors,
            test_images=message.test_images,
        )


def decode(response: pb.ClassifyResponse, count: int) -> list[Classification]:
    """Return the results of a response to a request of ``count`` images.

    Raises ServerFault if the response has another number of results, or results of different shapes.
    """
    results = response.results
    capsules = [capsule for result in results for capsule in result.capsules]
    if len(results) != count or not capsules or len(capsules) % count:
        raise ServerFault(f"results: {len(results)} of {len(capsules)} capsules in all; expected {count}, all alike")
    labels = tuple(capsule.label for capsule in results[0].capsules)
    probabilities = np.array([capsule.probability for capsule in capsules], np.float32)
    # One array for all, and not one for each pose.
    poses = np.fromiter(chain.from_iterable([capsule.pose for capsule in capsules]), np.float32)
    if poses.size % len(capsules) or len(labels) * count != len(capsules):
        raise ServerFault(
            f"results: poses of {poses.size} numbers in all for {len(capsules)} capsules; expected E each"
        )
    probabilities.flags.writeable = poses.flags.writeable = False
    by_image = zip(
        results,
        probabilities.reshape(count, len(labels)),
        poses.reshape(count, len(labels), -1),
        strict=True,
    )
    name, version = response.model_name, response.model_version
    return [
        Classification(
            label=result.label,
            class_index=result.class_index,
            probability=float(chances[result.class_index]),
            probabilities=chances,
            poses=vectors,
            labels=labels,
            model_name=name,
            model_version=version,
        )
        for result, chances, vectors in by_image
    ]
