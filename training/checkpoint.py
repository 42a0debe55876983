"""The finished network as one file: weights, the config that shapes them, labels, recipe and figures."""

import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from training.model import CapsNet, CapsNetConfig

FORMAT = "capsnet-checkpoint-1"


class CheckpointError(ValueError):
    """A file is no checkpoint of this project, or its weights do not fit its config."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained network with its recipe and its figures.

    figures: the measurements by name: ``test_errors`` of ``test_images``, ``test_mistakes`` (their indices),
    ``held_out_errors`` and more.
    recipe: the settings of the training run.
    """

    config: CapsNetConfig
    dataset: str
    labels: tuple[str, ...]
    recipe: dict[str, Any]
    figures: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    def model(self) -> CapsNet:
        """Return the network, in evaluation mode. Raises CheckpointError if the weights do not fit its config."""
        model = CapsNet(self.config)
        try:
            model.load_state_dict(self.state_dict)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the weights do not fit the checkpoint's config: {error}") from error
        return model.eval()


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint, completely or not at all."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    content |= {"format": FORMAT, "config": asdict(checkpoint.config)}
    write_whole(content, path)


def write_whole(content: dict[str, Any], path: Path) -> None:
    """Write a PyTorch file, under its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Nothing in it is executed (``weights_only``).

    Raises CheckpointError, with the file's name, if the file is missing, cut off, unsafe or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not a checkpoint of plain tensors and values; nothing in it was run") from error
    except Exception as error:  # torch.load raises many kinds of errors for other files
        raise CheckpointError(f"{path}: not a readable PyTorch file, or cut off") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not a {FORMAT} file (export takes capsnet.pt, not a trainer's last.ckpt)")
    try:
        config = CapsNetConfig(**content.pop("config"))
        return Checkpoint(config=config, **content)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: the checkpoint's fields do not fit: {error}") from error
