"""One network's training step, recorded once as a CUDA graph and replayed; on a processor it runs as it is.

A step of a small network is hundreds of kernels of a few microseconds each: launched one by one they leave a GPU idle.
The data of many steps lie on the device, and the step itself counts which of them is next.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from training.data.specs import NONE
from training.evaluate import mean_lengths as lengths_of
from training.loss import distillation_loss, margin_loss, present_classes
from training.model import CapsNet, lengths, to_pixels
from training.optimization import ema_decay, parameter_groups
from training.recorded.chunks import Chunk

Net = TypeVar("Net", bound=nn.Module)
#: The loss of a batch, a scalar, from a network and the other arguments of ``total_loss``.
Loss = Callable[[Net, Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]

WARMUP_STEPS = 3  # before a graph is recorded: they build all kernels and allocate all memory


@dataclass(frozen=True)
class Hyperparameters:
    """The settings of a training run.

    weight_decay: for matrices and kernels alone. ema_decay: the largest decay; the decay grows from 0.1. distil: the
    weight of the squared difference to the teachers' lengths; 0 for none.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.01
    ema_decay: float = 0.9995
    pixel_weight: float = 0.0005
    distil: float = 0.0


def total_loss(
    model: CapsNet, images: Tensor, parts: Tensor, labels: Tensor, targets: Tensor | None, weights: Tensor
) -> Tensor:
    """Return the margin, reconstruction and distillation losses of a batch, added.

    images: (B, C, H, W) uint8; parts: (B, K, C, H, W) uint8; labels: (B, K), NONE for an image of none of the classes;
    targets: (B, J), the lengths that the teachers give. weights: (2,), of the squared pixel errors and of the squared
    differences to the targets; a tensor, so that one compiled function serves all weights.
    """
    poses = model(to_pixels(images)).float()
    probabilities = lengths(poses)  # (B, J)
    loss = margin_loss(probabilities, labels)
    if targets is not None:
        loss = loss + weights[1] * distillation_loss(probabilities, targets)
    return loss + weights[0] * pose_errors(model, poses, to_pixels(parts), labels)


def pose_errors(model: CapsNet, poses: Tensor, parts: Tensor, labels: Tensor) -> Tensor:
    """Return the pixel errors, as ``pixel_errors``, of the reconstructions from the poses of the objects' classes.

    poses: (B, J, E); parts: (B, K, C, H, W), 0 to 1; labels: (B, K). Without a decoder there are none.
    """
    if model.decoder is None:
        return poses.new_zeros(())
    one_hot = present_classes(labels, model.config.classes)  # (B, K, J)
    masked = (poses.unsqueeze(1) * one_hot.unsqueeze(-1)).flatten(0, 1).flatten(1)  # (B*K, J*E)
    return pixel_errors(model.decoder.layers(masked), parts, labels)


def pixel_errors(reconstructions: Tensor, parts: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of squared pixel errors of each image's objects, averaged over images: a scalar.

    reconstructions: (B*K, C*H*W); parts: (B, K, C, H, W), 0 to 1; labels: (B, K). NONE has nothing to reconstruct.
    """
    errors = (reconstructions.float() - parts.flatten(0, 1).flatten(1)).square().sum(1)
    return (errors * (labels != NONE).flatten()).sum() / len(parts)


def training_device() -> torch.device:
    """Return the GPU, or the CPU without one, and set PyTorch up for steps whose shapes never change."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def on_device(model: Net, device: torch.device) -> Net:
    """Move a network to the device, with the channels of its convolutions last, as tensor cores need them."""
    moved: Net = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


class Learner(Generic[Net]):
    """A network, its optimizer, its averaged weights and its recorded step.

    Learning rate: linear from 0, then half a cosine down to 0 at ``steps``. ``model`` has the newest weights;
    ``averaged`` returns the network with the averaged ones. build: makes the network, with random weights. compiled:
    the loss is compiled. half: the arithmetic is that of bfloat16 where PyTorch's automatic casting says so.
    """

    def __init__(
        self,
        build: Callable[[], Net],
        loss: Loss[Net],
        seed: int,
        settings: Hyperparameters,
        steps: int,
        device: torch.device,
        *,
        compiled: bool = True,
        half: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        self.settings, self.steps, self.device, self._half = settings, steps, device, half
        self.model = on_device(build(), device)
        self._loss = torch.compile(loss) if compiled else loss
        self._rate = torch.zeros((), device=device)
        self._weights = torch.tensor([settings.pixel_weight, settings.distil], device=device)
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=self._rate,
            fused=True,
            capturable=device.type == "cuda",
        )
        self._rates = self._schedule(steps)
        self._state = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        self._average = [value.clone() for value in self._state]
        self._first = [value.clone() for value in self._state]
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)  # which batch of the chunk is next
        self.loss = torch.zeros((), device=device)  # the sum since it was last set to 0
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None

    def _schedule(self, steps: int) -> Tensor:
        warmup = max(1, round(self.settings.warmup_share * steps))
        number = torch.arange(steps + 1, device=self.device)
        cosine = 0.5 + 0.5 * torch.cos(math.pi * (number - warmup).clamp(min=0) / max(1, steps - warmup))
        return self.settings.learning_rate * torch.minimum((number + 1) / warmup, cosine)

    def shorten(self, steps: int) -> None:
        """Let the learning rate end at 0 after fewer steps than were planned."""
        rates = self._schedule(min(steps, self.steps))
        self._rates.zero_()
        self._rates[: len(rates)].copy_(rates)

    def prepare(self, chunk: Chunk, targets: Tensor | None = None, *, graph: bool = True) -> None:
        """Take the buffers whose content the steps will read, and record the step.

        targets: (S, B, J). The steps that warm up count as none: weights, averages and counters are put back.
        """
        self._chunk, self._targets = chunk, targets
        self.batch = chunk.images.shape[1]
        if self.device.type != "cuda":
            return
        assert self.stream
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARMUP_STEPS):
                self._run()
        torch.cuda.synchronize()
        if graph:
            self._optimizer.zero_grad(set_to_none=True)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self.stream):
                self._run()
        torch.cuda.synchronize()
        self.restart(self.steps)
        torch.cuda.synchronize()

    def restart(self, steps: int) -> None:
        """Begin again from the first weights, with at most as many steps as were planned."""
        self.shorten(steps)
        with torch.no_grad():
            for value, average, first in zip(self._state, self._average, self._first, strict=True):
                value.copy_(first)
                average.copy_(first)
            for slots in self._optimizer.state.values():
                for slot in slots.values():
                    slot.zero_()
        for counter in (self._step, self._next, self.loss):
            counter.zero_()

    def begin_chunk(self) -> None:
        """Start again with the first batch of the chunk, whose content is new."""
        self._next.zero_()

    def step(self) -> None:
        """Learn from the next batch of the chunk."""
        if self.stream is None:
            self._run()
            return
        with torch.cuda.stream(self.stream):
            if self._graph:
                self._graph.replay()
            else:
                self._run()

    def _run(self) -> None:
        self._rate.copy_(self._rates.index_select(0, self._step.clamp(max=self.steps).reshape(1))[0])
        images, parts, labels = (values.index_select(0, self._next)[0] for values in self._chunk)
        targets = None if self._targets is None else self._targets.index_select(0, self._next)[0]
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            loss = self._loss(self.model, images, parts, labels, targets, self._weights)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            self.loss += loss.detach()
            self._step += 1
            self._next += 1
            self._next.remainder_(len(self._chunk.images))
            weight = 1 - ema_decay(self._step, self.settings.ema_decay)
            change = torch._foreach_sub(self._state, self._average)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(self._average, change)

    def averaged(self) -> Net:
        """Return a copy of the network with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model)
        floating = [value for value in model.state_dict().values() if value.is_floating_point()]
        with torch.no_grad():
            for value, average in zip(floating, self._average, strict=True):
                value.copy_(average)
        return model.eval()


def learn(learners: Sequence[Learner[Any]], steps: int, device: torch.device) -> None:
    """Let each network learn from the first batches of its chunk, whose content is new, side by side on a GPU."""
    wait(device)
    for learner in learners:
        learner.begin_chunk()
    wait(device)
    for _ in range(steps):
        for learner in learners:
            learner.step()
    wait(device)


@torch.no_grad()
def mean_lengths(models: list[nn.Module], images: Tensor, part: int = 8192) -> Tensor:
    """Return the mean of the networks' lengths for uint8 images (N, C, H, W): (N, J), in bfloat16 arithmetic."""
    means = []
    for some in torch.split(images, part):
        with torch.autocast(some.device.type, torch.bfloat16):
            means.append(lengths_of(models, to_pixels(some)))
    return torch.cat(means)
