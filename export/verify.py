"""The comparison of an exported model, as the service runs it, with the PyTorch network that it was made from."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from serving.runtime import Prediction, Runtime
from training.evaluate import most_probable, predict
from training.model import CapsNet

TOLERANCE = 1e-4

_BATCH_SIZE = 250
_NOISE_IMAGES = 8
_NOISE_SEED = 0


class ParityError(RuntimeError):
    """The exported model and PyTorch do not compute the same; the text gives the numbers."""


def edge_images(channels: int, size: int) -> Tensor:
    """Images as no test set has them, uint8 (B, C, H, W).

    One is blank, one saturated (255), five have a single saturated pixel, at a corner or in the middle, and the
    rest are uniform noise, the same at each call.
    """
    blank = torch.zeros((1, channels, size, size), dtype=torch.uint8)
    images = [blank, torch.full_like(blank, 255)]
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1), (size // 2, size // 2)):
        pixel = blank.clone()
        pixel[..., row, column] = 255
        images.append(pixel)
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    shape = (_NOISE_IMAGES, channels, size, size)
    images.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    return torch.cat(images)


def verify(network: CapsNet, runtime: Runtime, images: Tensor, objects: int = 1) -> tuple[dict[str, Any], Tensor]:
    """Compare the model in ``runtime`` with ``network`` on uint8 images (B, C, H, W) and on the edge images.

    The edge images go through the runtime one by one, so that batches of one are compared as well as full ones.

    objects: how many classes each image has; so many of the most probable ones are what it is classified as.

    Returns the comparison as the manifest has it, differences absolute, and the probabilities that the runtime's
    model gives to ``images``, (B, J).

    Raises ParityError where a value is not finite, a probability or a component of a pose differs by more than
    TOLERANCE, or an image gets another class.
    """
    edges = edge_images(network.config.image_channels, network.config.image_size)
    batches = [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]
    parts = [runtime.predict(batch.numpy()) for batch in (*batches, *edges.unsqueeze(1))]
    found = Prediction(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    reference = Prediction(*(tensor.numpy() for tensor in predict(network, torch.cat((images, edges)))))

    for source, prediction in (("PyTorch", reference), ("the exported model", found)):
        broken = sum(int(np.count_nonzero(~np.isfinite(array))) for array in prediction)
        if broken:
            raise ParityError(f"{source} computes {broken} values that are not finite numbers")
    probability_differences = np.abs(found.probabilities - reference.probabilities)
    pose_differences = np.abs(found.poses - reference.poses)
    classes, expected = (
        most_probable(torch.from_numpy(prediction.probabilities), objects) for prediction in (found, reference)
    )
    parity: dict[str, Any] = {
        "reference": f"PyTorch {torch.__version__}",
        "runtime": runtime.description,
        "provider": runtime.provider,
        "images": len(classes),
        "max_probability_difference": float(probability_differences.max()),
        "mean_probability_difference": float(probability_differences.mean(dtype=np.float64)),
        "max_pose_difference": float(pose_differences.max()),
        "mean_pose_difference": float(pose_differences.mean(dtype=np.float64)),
        "labels_changed": int((classes != expected).any(1).sum()),
    }
    largest = max(parity["max_probability_difference"], parity["max_pose_difference"])
    if largest > TOLERANCE or parity["labels_changed"]:
        raise ParityError(
            f"the exported model and PyTorch differ: {parity['labels_changed']} of {len(classes)} labels changed, "
            f"probabilities differ by up to {parity['max_probability_difference']:.2g} and poses by up to "
            f"{parity['max_pose_difference']:.2g} (tolerance {TOLERANCE:g}, no label)"
        )
    return parity, torch.from_numpy(found.probabilities[: len(images)])
