"""Tests of the two losses, and of the mask that selects the pose for the reconstruction."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.data.specs import NONE
from training.loss import distillation_loss, margin_loss, presence_loss, reconstruction_loss
from training.model import CapsNetConfig, Decoder

CONFIG = CapsNetConfig(image_channels=2, image_size=17, classes=4, digit_dim=3, decoder_widths=(6, 5))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_decoder() -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(CONFIG).double()


def test_the_margin_loss_is_equation_4_summed_over_classes_and_averaged_over_images() -> None:
    probabilities = random(6, 4)
    classes = torch.tensor([0, 1, 2, 3, 3, 0])

    loss = margin_loss(probabilities, classes)

    total = 0.0
    for image, label in zip(probabilities.tolist(), classes.tolist(), strict=True):
        for k, length in enumerate(image):
            present = float(k == label)
            total += present * max(0.0, 0.9 - length) ** 2
            total += 0.5 * (1 - present) * max(0.0, length - 0.1) ** 2
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.4, 0.0, 0.0], 0.25),
        ([1.0, 0.6, 0.0], 0.125),
        ([1.0, 0.6, 0.6], 0.25),
        ([0.4, 0.6, 0.6], 0.5),
        ([0.0, 1.0, 1.0], 0.81 + 0.81),
    ],
)
def test_the_margin_loss_of_one_image_is_the_sum_of_its_squared_misses_absent_classes_at_half_weight(
    probabilities: list[float], expected: float
) -> None:
    loss = margin_loss(torch.tensor([probabilities], dtype=torch.float64), torch.tensor([0]))
    assert loss.item() == pytest.approx(expected)


def test_confident_images_cost_nothing_and_pull_at_nothing() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.1], [0.0, 0.05, 0.99]], requires_grad=True)

    loss = margin_loss(probabilities, torch.tensor([0, 2]))
    (gradient,) = torch.autograd.grad(loss, probabilities)

    assert loss.item() == 0
    assert gradient.eq(0).all()


def test_the_margin_loss_keeps_the_precision_of_the_probabilities() -> None:
    assert margin_loss(random(2, 3), torch.tensor([0, 1])).dtype == torch.float64


def test_the_gradient_of_the_margin_loss_is_that_of_its_formula() -> None:
    probabilities, classes = random(3, 4).requires_grad_(), torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda probabilities: margin_loss(probabilities, classes), probabilities)


def test_an_image_of_none_of_the_classes_has_a_margin_loss_of_its_long_capsules_alone() -> None:
    probabilities = torch.tensor([[0.4, 0.0, 0.6], [0.4, 0.0, 0.0]], dtype=torch.float64)
    assert margin_loss(probabilities[:1], torch.tensor([NONE])).item() == pytest.approx(0.5 * (0.09 + 0.25))
    assert margin_loss(probabilities, torch.tensor([NONE, 0])).item() == pytest.approx((0.17 + 0.25) / 2)
    assert margin_loss(probabilities, torch.tensor([[NONE, NONE], [0, 1]])).item() == pytest.approx(
        (0.17 + 0.25 + 0.81) / 2
    )


def test_the_presence_loss_is_the_binary_cross_entropy() -> None:
    probabilities, labels = random(6, 1), torch.tensor([0, NONE, 0, 0, NONE, 0])
    loss = presence_loss(probabilities, labels)
    present = (labels[:, None] == 0).double()
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy(probabilities, present))
    assert presence_loss(probabilities, torch.zeros(6, dtype=torch.int64)).item() == pytest.approx(
        -np.log(probabilities.numpy()).mean(), rel=1e-12
    )


@pytest.mark.parametrize("label", [0, NONE])
def test_the_presence_loss_of_a_mistake_is_large_and_finite(label: int) -> None:
    probabilities = torch.tensor([[0.0], [1.0]], requires_grad=True)
    loss = presence_loss(probabilities, torch.tensor([label, label]))
    (gradient,) = torch.autograd.grad(loss, probabilities)
    assert 10 < loss.item() < 100
    assert gradient.isfinite().all()


def test_the_distillation_loss_is_the_squared_difference_summed_over_classes() -> None:
    probabilities, targets = random(5, 3), random(5, 3, seed=1)
    expected = ((probabilities - targets) ** 2).sum() / 5
    torch.testing.assert_close(distillation_loss(probabilities, targets), expected)


def test_the_reconstruction_loss_is_0_0005_times_the_sum_of_squared_pixel_errors_averaged_over_images() -> None:
    reconstructions, images = random(3, 2, 5, 4, seed=1), random(3, 2, 5, 4, seed=2)
    squared_errors = (reconstructions.numpy() - images.numpy()) ** 2
    expected = np.mean([0.0005 * image.sum() for image in squared_errors])
    assert reconstruction_loss(reconstructions, images).item() == pytest.approx(expected, rel=1e-12)


def test_a_white_mnist_image_reconstructed_as_black_costs_0_392() -> None:
    white = torch.ones(5, 1, 28, 28)
    assert reconstruction_loss(torch.zeros_like(white), white).item() == pytest.approx(0.392)
    assert reconstruction_loss(white, white).item() == 0


def test_an_image_is_reconstructed_from_the_pose_of_its_own_class_alone() -> None:
    decoder = make_decoder()
    poses = random(3, 4, 3).requires_grad_()
    classes = torch.tensor([2, 0, 3])

    reconstructions = decoder(poses, classes)
    (gradient,) = torch.autograd.grad(reconstructions.sum(), poses)

    for image, label in enumerate(classes.tolist()):
        for k in range(4):
            assert gradient[image, k].ne(0).any() == (k == label)


def test_the_other_poses_reach_the_decoder_as_zeros() -> None:
    decoder = make_decoder()
    poses = random(2, 4, 3)
    masked = torch.zeros(2, 12, dtype=torch.float64)
    masked[0, 3:6], masked[1, 9:12] = poses[0, 1], poses[1, 3]

    reconstructions = decoder(poses, torch.tensor([1, 3]))

    torch.testing.assert_close(reconstructions, decoder.layers(masked).reshape(2, 2, 17, 17))


def test_the_decoder_is_fully_connected_with_relu_between_and_a_sigmoid_at_the_end() -> None:
    decoder = make_decoder()
    kinds = [type(layer) for layer in decoder.layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]
    linear = [layer for layer in decoder.layers if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [12, 6, 5]
    assert linear[-1].out_features == 2 * 17 * 17


def test_reconstructed_pixels_are_between_0_and_1() -> None:
    reconstructions = make_decoder()(random(3, 4, 3) * 100, torch.tensor([0, 1, 2]))
    assert reconstructions.shape == (3, 2, 17, 17)
    assert reconstructions.min() >= 0
    assert reconstructions.max() <= 1
