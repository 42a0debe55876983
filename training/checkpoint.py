"""The finished network as one file: weights, the config that shapes them, labels, recipe and figures."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from training.model import CapsNet, CapsNetConfig

FORMAT = "capsnet-checkpoint-1"
TENSORS_SUFFIX = ".safetensors"

_DECODER = "decoder."


class CheckpointError(ValueError):
    """A file is no checkpoint of this project, or its weights do not fit its config."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained network with its recipe and its figures.

    figures: the measurements by name: ``test_errors`` of ``test_images``, ``test_mistakes`` (their indices),
    ``held_out_errors`` and more.
    config: of the network as it was trained. recipe: the settings of the training run. state_dict: the weights; those
    of the decoder, which only training needs, may all be missing.
    """

    config: CapsNetConfig
    dataset: str
    labels: tuple[str, ...]
    recipe: dict[str, Any]
    figures: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    def model(self) -> CapsNet:
        """Return the network, in evaluation mode, without a decoder if the weights have none.

        Raises CheckpointError if the weights do not fit its config.
        """
        try:
            config = self.config
            if not any(name.startswith(_DECODER) for name in self.state_dict):
                config = replace(config, decoder_widths=())
            with torch.device("meta"):  # no memory for the sizes of a config that the weights do not have
                CapsNet(config).load_state_dict({name: value.to("meta") for name, value in self.state_dict.items()})
            model = CapsNet(config)
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
    with _partial(path) as partial:
        torch.save(content, partial)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield the path of a file that gets its name at the end of the block. After an error, nothing of it is left."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:  # on a full disk, half a file would take the room of the next try
        partial.unlink(missing_ok=True)
        raise


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of ``save`` or, by its suffix, ``save_tensors`` to the CPU. Nothing in it is executed.

    Raises CheckpointError, with the file's name, if the file is missing, cut off, unsafe or of another format.
    """
    if path.suffix == TENSORS_SUFFIX:
        return _load_tensors(path)
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


def save_tensors(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint without its decoder as a safetensors file, under its name only when it is complete.

    Floating-point weights are float32. The metadata has one entry, FORMAT: everything except the weights, as JSON. The
    config is that of the training, with the decoder.
    """
    weights = {
        name: (value.float() if value.is_floating_point() else value).contiguous()
        for name, value in checkpoint.state_dict.items()
        if not name.startswith(_DECODER)
    }
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    del content["state_dict"]
    content["config"] = asdict(checkpoint.config)
    with _partial(path) as partial:
        partial.write_bytes(to_bytes(weights, {FORMAT: json.dumps(content, allow_nan=False)}))


def _load_tensors(path: Path) -> Checkpoint:
    """Read a file of ``save_tensors``. Raises CheckpointError as ``load``."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or cut off") from error
    if FORMAT not in metadata:
        raise CheckpointError(f"{path}: not a {FORMAT} file: its metadata has no entry of that name")
    try:
        content = json.loads(metadata[FORMAT])
        return Checkpoint(**{**_checked(content), "state_dict": weights})
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: the checkpoint's fields do not fit: {error}") from error


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's fields from JSON, with their types. Raises TypeError, ValueError or KeyError."""
    kinds: dict[str, type] = {"config": dict, "dataset": str, "labels": list, "recipe": dict, "figures": dict}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            raise TypeError(f"{name} is {type(content[name]).__name__}; expected {kind.__name__}")
    if not all(isinstance(label, str) for label in content["labels"]):
        raise TypeError("labels are not all texts")
    given = content["config"]
    for field in fields(CapsNetConfig):
        expected = float | int if isinstance(field.default, float) else type(field.default)
        value = _tuples(given[field.name]) if field.name in given else field.default
        if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(field.default, bool)):
            raise TypeError(f"config.{field.name} is {value!r:.80}")
        given[field.name] = value
    whole = (*given["decoder_widths"], *(one for layer in given["stem"] for one in layer))
    if not all(type(one) is int for one in whole):
        raise TypeError("config.decoder_widths or config.stem are not of whole numbers")
    return {**content, "config": CapsNetConfig(**given), "labels": tuple(content["labels"])}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
