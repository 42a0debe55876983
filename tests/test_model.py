"""Tests of the capsule network against the paper's equations, which are written again here without shortcuts."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.model import (
    CONFIGS,
    CapsNet,
    CapsNetConfig,
    Routing,
    lengths,
    max_min,
    route,
    squash,
    to_pixels,
)
from training.precision import subnormals_flushed
from training.recipe import AGREEMENTS, NORMALIZATIONS

Array = NDArray[np.float64]

TINY = CapsNetConfig(
    image_size=20, classes=3, conv_channels=4, primary_types=2, primary_dim=3, digit_dim=5, decoder_widths=(7,)
)
ITERATIONS = pytest.mark.parametrize("iterations", [1, 2, 3, 5])
CHOICES = pytest.mark.parametrize(
    ("agreement", "normalization"), [(one, other) for one in AGREEMENTS for other in NORMALIZATIONS]
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: small tensors gain nothing from more, and lose much if other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[False, True], ids=["subnormals kept", "subnormals flushed"])
def subnormals(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test with both treatments of subnormal numbers. The second one is that of training."""
    with subnormals_flushed() if request.param else nullcontext():
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def network(config: CapsNetConfig, seed: int = 0) -> CapsNet:
    """A network with random weights in double precision, large enough to make its routing uneven."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CapsNet(config).double()
    with torch.no_grad():
        model.weight.mul_(10)
    return model


def images(config: CapsNetConfig, count: int, seed: int = 0) -> Tensor:
    shape = (count, config.image_channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def paper_squash(s: Array) -> Array:
    """Compute equation 1 as it is printed."""
    squared = (s**2).sum(-1, keepdims=True)
    scaled: Array = squared / (1 + squared) * s / np.sqrt(squared)
    return scaled


def paper_routing(
    u: Array,
    weight: Array,
    iterations: int,
    bias: Array | None = None,
    agreement: str = "scalar-product",
    normalization: str = "softmax",
    scale: float = 1.0,
) -> Array:
    """Compute procedure 1 as it is printed, for one image: u (I, D), weight (I, D, J, E). Return v, (J, E).

    bias, (J, E), scale, and the further values of agreement and normalization are not in the paper.
    """
    primaries, parents = weight.shape[0], weight.shape[2]
    u_hat = np.stack([np.stack([u[i] @ weight[i, :, j] for j in range(parents)]) for i in range(primaries)])
    b = np.zeros((primaries, parents))
    v = np.zeros((parents, weight.shape[3]))
    for iteration in range(iterations):
        if normalization == "softmax":
            c = np.stack([np.exp(b[i]) / np.exp(b[i]).sum() for i in range(primaries)])
        elif iteration == 0:
            c = np.ones_like(b)
        else:
            c = np.stack([(b[i] - min(b[i])) / (max(b[i]) - min(b[i])) for i in range(primaries)])
        for j in range(parents):
            start = np.zeros(weight.shape[3]) if bias is None else bias[j]
            v[j] = paper_squash(sum((c[i, j] * u_hat[i, j] for i in range(primaries)), start=start))
        for i in range(primaries):
            for j in range(parents):
                scalar = agreement == "scalar-product"
                b[i, j] += scale * (u_hat[i, j] @ v[j] if scalar else -(np.linalg.norm(u_hat[i, j] - v[j]) ** 2))
    return v


def unsquashed(v: Tensor) -> Tensor:
    """Return the s that squash turned into v: ``|v| = |s|^2 / (1 + |s|^2)`` solved for s."""
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    s: Tensor = v / length * (length / (1 - length)).sqrt()
    return s


# Each primary capsule has its own axis of the poses, so the elements of s_j are the couplings times the votes' sizes.
VOTE_SIZES = torch.tensor([[4.0, 1.0, 0.5], [2.0, 2.5, 0.1], [0.3, 3.0, 1.5], [1.0, 1.0, 5.0]], dtype=torch.float64)


def couplings(iterations: int) -> Tensor:
    """Return the couplings c of the last iteration, (I, J), computed from the poses that routing returns."""
    primaries, parents = VOTE_SIZES.shape
    weight = torch.zeros(primaries, 1, parents, primaries, dtype=torch.float64)
    for i in range(primaries):
        weight[i, 0, :, i] = VOTE_SIZES[i]
    u = torch.ones(1, primaries, 1, dtype=torch.float64)
    return unsquashed(route(u, weight, Routing(iterations))[0])[0].T / VOTE_SIZES


def test_the_papers_network_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        assert parameter_count(CapsNet(replace(CONFIGS["paper"], decoder_widths=()))) == 6_804_224
        assert parameter_count(CapsNet(CONFIGS["paper"])) == 8_215_568


def test_the_parameters_of_the_papers_layers_include_their_biases() -> None:
    with torch.device("meta"):
        model = CapsNet(CONFIGS["paper"])
    assert parameter_count(model.conv1) == 20_992
    assert parameter_count(model.primary) == 5_308_672
    assert model.weight.shape == (1152, 8, 10, 16)
    assert parameter_count(model.decoder or nn.Identity()) == 1_411_344


def test_the_compact_network_has_less_than_a_million_parameters_without_its_decoder() -> None:
    with torch.device("meta"):
        assert parameter_count(CapsNet(replace(CONFIGS["compact"], decoder_widths=()))) < 1_000_000


def test_the_decoder_is_left_out_when_it_has_no_widths() -> None:
    model = network(replace(TINY, decoder_widths=()))
    assert model.decoder is None
    assert model(images(TINY, 2)).shape == (2, TINY.classes, TINY.digit_dim)


def test_routing_weights_start_small_so_that_no_pose_starts_saturated() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CapsNet(CONFIGS["compact"]).double()
    with torch.no_grad():
        assert model.weight.abs().max() <= 0.2
        assert 0.07 < model.weight.std() < 0.1
        assert lengths(model(images(model.config, 2))).max() < 0.5


@pytest.mark.parametrize("length", [1e-12, 1e-3, 1.0, 3.0, 1e3])
def test_squash_keeps_the_direction_and_shrinks_the_length_to_its_square_over_one_plus_its_square(
    length: float,
) -> None:
    direction = normal(6, 4)
    direction /= direction.norm(dim=-1, keepdim=True)

    squashed = squash(length * direction)

    torch.testing.assert_close(squashed, length**2 / (1 + length**2) * direction, rtol=1e-12, atol=0)


def test_squash_is_equation_1_along_the_last_axis() -> None:
    s = normal(2, 3, 4, 5)
    np.testing.assert_allclose(squash(s).numpy(), paper_squash(s.numpy()), rtol=1e-12)


@pytest.mark.usefixtures("subnormals")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_squash_of_a_zero_vector_is_zero_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    s = torch.zeros(2, 3, dtype=dtype, requires_grad=True)

    squashed = squash(s)
    (gradient,) = torch.autograd.grad(squashed.sum(), s)

    assert squashed.eq(0).all()
    assert gradient.eq(0).all()


@pytest.mark.usefixtures("subnormals")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-45, 6e-8, 1e-7, 1e-5, 1e-4, 1e-3])
def test_squash_of_a_tiny_vector_is_finite_and_tiny_in_low_precision_and_so_is_its_gradient(
    dtype: torch.dtype, size: float
) -> None:
    s = torch.tensor([[size, 0, -size], [0, size, 0]], dtype=dtype, requires_grad=True)

    squashed = squash(s)
    (gradient,) = torch.autograd.grad(squashed.sum(), s)

    assert squashed.isfinite().all()
    assert squashed.abs().max() <= 2 * size
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1e-2


def test_squash_has_the_gradient_of_its_formula() -> None:
    s = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(squash, s)


@ITERATIONS
def test_routing_is_procedure_1_of_the_paper(iterations: int) -> None:
    u, weight = normal(3, 7, 4, seed=1), normal(7, 4, 5, 6, seed=2)

    v = route(u, weight, Routing(iterations))[0]

    expected = np.stack([paper_routing(image, weight.numpy(), iterations) for image in u.numpy()])
    np.testing.assert_allclose(v.numpy(), expected, rtol=0, atol=1e-6)


@ITERATIONS
@CHOICES
def test_routing_with_a_bias_and_other_choices_is_procedure_1_with_these(
    agreement: str, normalization: str, iterations: int
) -> None:
    u, weight, bias = normal(3, 7, 4, seed=1), normal(7, 4, 5, 6, seed=2), normal(5, 6, seed=3)

    v = route(u, weight, Routing(iterations, agreement, normalization), bias)[0]

    choices = (iterations, bias.numpy(), agreement, normalization)
    expected = [paper_routing(image, weight.numpy(), *choices) for image in u.numpy()]
    np.testing.assert_allclose(v.numpy(), np.stack(expected), rtol=0, atol=1e-6)


@ITERATIONS
@CHOICES
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_scale_multiplies_the_logits_of_every_iteration(
    agreement: str, normalization: str, iterations: int, blocks: int
) -> None:
    u, weight = normal(3, 7, 4, seed=1), normal(7, 4, 5, 6, seed=2)

    v, _ = route(u, weight, Routing(iterations, agreement, normalization, scale=2.0), blocks=blocks)

    expected = [
        paper_routing(image, weight.numpy(), iterations, None, agreement, normalization, 2.0) for image in u.numpy()
    ]
    np.testing.assert_allclose(v.numpy(), np.stack(expected), rtol=0, atol=1e-6)
    changed = not torch.allclose(v, route(u, weight, Routing(iterations, agreement, normalization))[0], atol=1e-3)
    assert changed == (iterations > 1 and normalization == "softmax")


@ITERATIONS
@CHOICES
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_gradients_of_routing_flow_through_every_iteration(
    agreement: str, normalization: str, iterations: int, blocks: int
) -> None:
    # Three parents: with two, Max-Min gives couplings of exactly 1 and 0, whose gradient is 0.
    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate([(1, 2, 2), (2, 2, 3, 2), (3, 2)])]
    assert torch.autograd.gradcheck(
        lambda u, weight, bias: route(u, weight, Routing(iterations, agreement, normalization), bias, blocks)[0],
        [tensor.requires_grad_() for tensor in inputs],
    )


@ITERATIONS
@CHOICES
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("blocks", [2, 3, 4, 7, 8, 1000])
def test_routing_without_stored_votes_has_the_same_poses_and_gradients(
    agreement: str, normalization: str, iterations: int, gradient: bool, blocks: int
) -> None:
    results = []
    for count in (1, blocks):
        u, weight = normal(3, 7, 4, seed=1).requires_grad_(), normal(7, 4, 5, 6, seed=2).requires_grad_()
        v = route(u, weight, Routing(iterations, agreement, normalization, gradient), blocks=count)[0]
        results.append((v, *torch.autograd.grad(v.square().sum(), (u, weight))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocks", [1, 4])
def test_votes_are_kept_for_the_gradient_only_if_they_are_stored(blocks: int) -> None:
    u, weight = normal(3, 8, 4, seed=1).requires_grad_(), normal(8, 4, 5, 6, seed=2).requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        route(u, weight, Routing(), blocks=blocks)
    votes = 3 * 8 * 5 * 6
    assert (votes in kept) == (blocks == 1)


@ITERATIONS
@CHOICES
def test_the_poses_in_single_precision_are_those_of_the_plain_loop(
    agreement: str, normalization: str, iterations: int
) -> None:
    u = squash(normal(2, 64, 8, seed=1, dtype=torch.float32))
    weight = 0.1 * normal(64, 8, 10, 16, seed=2, dtype=torch.float32)
    plain = [
        paper_routing(image, weight.double().numpy(), iterations, None, agreement, normalization)
        for image in u.double().numpy()
    ]
    for blocks in (1, 5):
        v = route(u, weight, Routing(iterations, agreement, normalization), blocks=blocks)[0]
        np.testing.assert_allclose(v.numpy(), np.stack(plain), rtol=0, atol=1e-5)


def test_max_min_couples_the_best_parent_with_one_and_the_worst_with_none_whatever_the_scale() -> None:
    b = torch.tensor([[3.0, -1.0], [5.0, 1.0], [4.0, 7.0]], dtype=torch.float64).unsqueeze(0)  # (B, J, I)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.25], [0.5, 1.0]], dtype=torch.float64).unsqueeze(0)
    torch.testing.assert_close(max_min(b), expected)
    torch.testing.assert_close(max_min(1e-9 * b + 5), expected, rtol=1e-5, atol=1e-5)


def test_max_min_of_equal_logits_is_one_and_its_gradient_finite() -> None:
    b = torch.full((2, 3, 4), 0.7, requires_grad=True)
    c = max_min(b)
    (gradient,) = torch.autograd.grad(c.sum(), b)
    assert c.eq(1).all()
    assert gradient.eq(0).all()


@ITERATIONS
def test_without_the_routing_gradient_poses_are_the_same_and_the_couplings_are_constants(iterations: int) -> None:
    u, weight = normal(3, 7, 4, seed=1), normal(7, 4, 5, 6, seed=2).requires_grad_()
    whole = route(u, weight, Routing(iterations))[0]
    v = route(u, weight, Routing(iterations, gradient=False))[0]
    torch.testing.assert_close(v, whole)

    # Poses of constant couplings are a function of s = sum_i c_ij W_ij u_i alone: found by scaling the weights.
    (cut,) = torch.autograd.grad(v.sum(), weight)
    (full,) = torch.autograd.grad(whole.sum(), weight)
    s = unsquashed(v.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(squash(s).sum(), s)
    torch.testing.assert_close((cut * weight).sum(), (slope * s).sum())
    assert torch.allclose(cut, full) == (iterations == 1)


def test_the_authors_network_has_a_bias_more_and_begins_as_theirs() -> None:
    assert parameter_count(CapsNet(replace(CONFIGS["authors"], decoder_widths=()))) == 6_804_384
    model = CapsNet(CONFIGS["authors"])
    assert model.decoder is not None
    dense = [layer for layer in model.decoder.layers if isinstance(layer, nn.Linear)]
    assert len(dense) == 3
    layers: list[nn.Conv2d | nn.Linear] = [model.primary, *dense]
    for layer, deviation in ((model.conv1, 0.05), *((layer, 0.1) for layer in layers)):
        assert layer.bias is not None
        assert (layer.bias == 0.1).all()
        assert layer.weight.abs().max() <= 2 * deviation
        # A normal distribution cut at two standard deviations keeps 0.88 of its deviation.
        assert layer.weight.std().item() == pytest.approx(0.88 * deviation, rel=0.02)
    assert model.digit_bias is not None
    assert (model.digit_bias == 0.1).all()


def test_the_primary_divisor_divides_the_convolution_without_its_bias() -> None:
    divided, plain = network(replace(TINY, primary_divisor=32.0)), network(TINY)
    with torch.no_grad():
        plain.primary.weight.div_(32)
    image = images(TINY, 2)
    torch.testing.assert_close(divided(image), plain(image))


@pytest.mark.parametrize("normalization", ["softmax", "max-min"])
def test_a_network_routes_with_the_choices_of_its_config(normalization: str) -> None:
    config = replace(TINY, digit_bias=True, agreement="euclidean", routing_gradient=False, routing_scale=2.0)
    config = replace(config, normalization=normalization)
    model = network(config)
    assert model.digit_bias is not None
    with torch.no_grad():
        model.digit_bias.copy_(normal(*model.digit_bias.shape, seed=3))
    batch = images(config, 2)
    u = model.primary_capsules(batch)
    expected, _ = route(u, model.weight, Routing(3, "euclidean", normalization, False, 2.0), model.digit_bias)

    poses = model(batch)

    assert poses.equal(expected)
    (gradient,) = torch.autograd.grad(poses.sum(), model.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), model.weight)[0])


def test_a_gate_multiplies_its_own_primary_capsule_and_begins_nearly_closed() -> None:
    plain, gated = network(TINY), network(replace(TINY, primary_gate=True))
    types, dim = TINY.primary_types, TINY.primary_dim
    batch = images(TINY, 2)
    assert gated.primary.bias is not None and plain.primary.bias is not None
    bias = gated.primary.bias.view(types, dim + 1)
    weight = gated.primary.weight.view(types, dim + 1, -1)
    assert torch.sigmoid(bias[:, -1]).tolist() == pytest.approx([0.119] * types, abs=1e-3)
    assert (bias[:, :-1] != bias[0, -1]).all()
    logits = torch.tensor([-40.0, 0.0], dtype=torch.float64)  # of the types
    with torch.no_grad():
        plain.conv1.load_state_dict(gated.conv1.state_dict())
        plain.primary.weight.copy_(weight[:, :-1].reshape(plain.primary.weight.shape))
        plain.primary.bias.copy_(bias[:, :-1].flatten())
        weight[:, -1] = 0
        bias[:, -1] = logits

    found, expected = gated.primary_capsules(batch), plain.primary_capsules(batch)

    gates = logits.sigmoid().repeat_interleave(TINY.primary_grid**2).unsqueeze(-1)
    torch.testing.assert_close(found, gates * expected)
    assert lengths(found)[:, : TINY.primary_grid**2].max() < 1e-6


def test_a_choice_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="agreement: 'cosine'; expected one of scalar-product, euclidean"):
        CapsNetConfig(agreement="cosine")
    with pytest.raises(ValueError, match="normalization: 'sigmoid'; expected one of softmax, max-min"):
        CapsNetConfig(normalization="sigmoid")
    with pytest.raises(ValueError, match="initialization: 'zeros'; expected one of pytorch, authors"):
        CapsNetConfig(initialization="zeros")
    with pytest.raises(ValueError, match="primary_divisor: 0; expected a number above 0"):
        CapsNetConfig(primary_divisor=0)
    with pytest.raises(ValueError, match="routing_scale: nan; expected a number above 0"):
        CapsNetConfig(routing_scale=float("nan"))


def test_one_iteration_is_the_squashed_mean_of_the_votes_over_the_parents() -> None:
    u, weight = normal(2, 7, 4, seed=1), normal(7, 4, 5, 6, seed=2)
    closed_form = squash((u[:, :, :, None, None] * weight).sum(2).sum(1) / 5)
    torch.testing.assert_close(route(u, weight, Routing(1))[0], closed_form)


@ITERATIONS
def test_the_couplings_of_a_primary_capsule_sum_to_one_over_its_parents(iterations: int) -> None:
    c = couplings(iterations)

    torch.testing.assert_close(c.sum(1), torch.ones(4, dtype=torch.float64))
    if iterations == 1:
        torch.testing.assert_close(c, torch.full_like(c, 1 / 3))
    else:
        assert (c.sum(0) - 4 / 3).abs().max() > 0.05
        assert c.argmax(1).equal(VOTE_SIZES.argmax(1))


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_the_last_couplings_come_from_agreement_with_the_poses_of_all_iterations_but_the_last(iterations: int) -> None:
    poses = [squash((couplings(t) * VOTE_SIZES).T) for t in range(1, iterations)]
    b = VOTE_SIZES * torch.stack(poses).sum(0).T  # vote i lies along axis i, so it agrees with that element alone
    torch.testing.assert_close(couplings(iterations), b.softmax(dim=1))


@ITERATIONS
@CHOICES
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_returned_couplings_are_the_weights_of_the_votes(
    agreement: str, normalization: str, iterations: int, blocks: int
) -> None:
    u, weight, bias = normal(3, 7, 4, seed=1), normal(7, 4, 5, 6, seed=2), normal(5, 6, seed=3)
    v, c = route(u, weight, Routing(iterations, agreement, normalization), bias, blocks)
    assert c.shape == (3, 5, 7)
    torch.testing.assert_close(squash(torch.einsum("bji,bid,idje->bje", c, u, weight) + bias), v)


@ITERATIONS
def test_a_single_parent_gets_every_vote_whole(iterations: int) -> None:
    u, weight = normal(2, 7, 4, seed=1), normal(7, 4, 1, 6, seed=2)
    every_vote = torch.einsum("bid,idje->bje", u, weight)
    torch.testing.assert_close(route(u, weight, Routing(iterations))[0], squash(every_vote))


@ITERATIONS
def test_silent_primary_capsules_change_nothing(iterations: int) -> None:
    u, weight = normal(2, 7, 4, seed=1), normal(9, 4, 5, 6, seed=2)
    silent = torch.zeros(2, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(
        route(torch.cat([u, silent], 1), weight, Routing(iterations))[0],
        route(u, weight[:7], Routing(iterations))[0],
        rtol=1e-12,
        atol=1e-12,
    )


def test_each_primary_capsule_is_the_squashed_channels_of_one_type_at_one_position() -> None:
    config = replace(TINY, image_size=22)
    model = network(config)
    batch = images(config, 2)
    with torch.no_grad():
        maps = model.primary(model.conv1(batch).clamp(min=0)).numpy()
        capsules = model.primary_capsules(batch).numpy()

    size, dim = config.primary_grid, config.primary_dim
    assert capsules.shape == (2, config.primary_types * size**2, dim)
    for kind in range(config.primary_types):
        for y in range(size):
            for x in range(size):
                channels = maps[:, kind * dim : (kind + 1) * dim, y, x]
                capsule = capsules[:, (kind * size + y) * size + x]
                np.testing.assert_allclose(capsule, paper_squash(channels), rtol=1e-12)


def test_a_pixel_in_the_corner_reaches_only_the_capsules_of_the_corner() -> None:
    config = replace(TINY, image_size=22)
    model = network(config)
    batch = images(config, 1).repeat(2, 1, 1, 1)
    batch[1, :, 0, 0] += 1
    with torch.no_grad():
        assert model.conv1.bias is not None
        model.conv1.bias += 10  # so that ReLU does not hide the pixel
        before, after = model.primary_capsules(batch)

    changed = (before != after).any(1).reshape(config.primary_types, config.primary_grid, config.primary_grid)

    assert changed[:, 0, 0].all()
    assert changed.sum() == config.primary_types


def test_primary_capsules_are_shorter_than_one() -> None:
    model = network(TINY)
    with torch.no_grad():
        model.primary.weight.mul_(1e3)
        capsule_lengths = model.primary_capsules(images(TINY, 3)).norm(dim=-1)
    assert 0.99 < capsule_lengths.max() < 1


@ITERATIONS
def test_an_image_gets_the_same_poses_alone_as_in_a_batch(iterations: int) -> None:
    model = network(replace(TINY, routing_iterations=iterations))
    batch = images(TINY, 5)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(image[None]) for image in batch])
        reversed_ = model(batch.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    torch.testing.assert_close(reversed_, together, rtol=0, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-6


@pytest.mark.usefixtures("subnormals")
@pytest.mark.parametrize("pixel", [0.0, 1.0], ids=["blank", "saturated"])
def test_a_blank_and_a_saturated_image_have_finite_poses_and_gradients(pixel: float) -> None:
    model = network(TINY).float()
    with torch.no_grad():
        for bias in (model.conv1.bias, model.primary.bias):
            assert bias is not None
            bias.zero_()  # a blank image now makes every capsule exactly zero

    poses = model(torch.full((2, 1, 20, 20), pixel))
    trained = [model.weight, *model.conv1.parameters(), *model.primary.parameters()]
    gradients = torch.autograd.grad(lengths(poses).sum(), trained)

    assert poses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_probabilities_are_the_lengths_of_the_poses_and_stay_below_one(scale: float) -> None:
    model = network(TINY)
    with torch.no_grad():
        model.weight.mul_(scale)
        poses = model(images(TINY, 4))
    probabilities = lengths(poses)

    np.testing.assert_allclose(probabilities.numpy(), np.sqrt((poses.numpy() ** 2).sum(-1)), rtol=1e-12)
    assert (probabilities >= 0).all()
    assert (probabilities <= 1).all() if scale > 1 else (probabilities < 1).all()


def test_probabilities_are_no_softmax_several_classes_and_none_can_be_present() -> None:
    poses = torch.zeros(2, 3, 4)
    poses[0, :2, 0] = 0.95
    torch.testing.assert_close(lengths(poses), torch.tensor([[0.95, 0.95, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, image_size=36, image_channels=3, classes=3),
        replace(TINY, image_size=17, primary_types=1, primary_dim=1, digit_dim=1, classes=1),
        replace(TINY, routing_iterations=1),
    ],
    ids=["tiny", "36x36 in colour", "smallest", "one iteration"],
)
def test_networks_of_any_shape_take_batches_of_any_size(config: CapsNetConfig, count: int) -> None:
    model = network(config)
    batch = images(config, count)
    with torch.no_grad():
        capsules, poses = model.primary_capsules(batch), model(batch)

    assert capsules.shape == (count, config.primary_capsules, config.primary_dim)
    assert poses.shape == (count, config.classes, config.digit_dim)
    assert lengths(poses).shape == (count, config.classes)
    expected = paper_routing(capsules[0].numpy(), model.weight.detach().numpy(), config.routing_iterations)
    np.testing.assert_allclose(poses[0].numpy(), expected, rtol=0, atol=1e-9)
    assert model.decoder is not None
    classes = torch.zeros(count, dtype=torch.int64)
    assert model.decoder(poses, classes).shape == batch.shape


@pytest.mark.parametrize(("image_size", "grid"), [(17, 1), (18, 1), (19, 2), (28, 6), (36, 10), (40, 12)])
def test_the_primary_grid_has_the_size_of_the_convolutions_output(image_size: int, grid: int) -> None:
    config = replace(TINY, image_size=image_size)
    model = network(config)
    with torch.no_grad():
        maps = model.primary(model.conv1(images(config, 1)))
    assert maps.shape[2:] == (grid, grid)
    assert config.primary_grid == grid
    assert config.primary_capsules == TINY.primary_types * grid**2


def test_the_network_names_no_device_of_its_own() -> None:
    model = CapsNet(TINY).to("meta")
    poses = model(torch.empty(2, 1, 20, 20, device="meta"))
    assert poses.device.type == "meta"
    assert model.decoder is not None
    assert model.decoder(poses, torch.zeros(2, dtype=torch.int64, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    "name",
    [
        "image_channels",
        "classes",
        "conv_channels",
        "primary_types",
        "primary_dim",
        "digit_dim",
        "routing_iterations",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_config_with_nothing_of_something_is_refused(name: str, value: int) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}: {value}; expected 1 or more"):
        CapsNetConfig(**settings)


def test_an_image_too_small_for_the_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size: 16; the convolutions leave no position for a primary capsule"):
        CapsNetConfig(image_size=16)


def test_bytes_become_pixels_from_0_to_1() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)

    pixels = to_pixels(stored)

    assert pixels.dtype == torch.float32
    assert pixels.shape == stored.shape
    assert pixels.min() == 0
    assert pixels.max() == 1
    torch.testing.assert_close(pixels, torch.linspace(0, 1, 256).reshape(1, 1, 16, 16))
