"""PSM's maths: difficulty, groups, and voters that have the statistics of a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import judged, small_network
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v2, shufflenet_v2_x0_5

from cvdd.methods.psm import choose_start, difficulty_groups, precision_distance, ranks_in_class, update_statistics
from cvdd.schema import DifficultyConfig
from cvdd.synthesis.engine import Engine, hand_over, ready_voter
from cvdd.synthesis.voting import Voter


def normal(count: int, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- maths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_distance_is_that_of_the_paper(weight: float) -> None:
    network, images = small_network(), normal(3)
    first, second = network[1], network[4]
    with torch.no_grad():
        inputs = {first: network[0](images), second: network[:4](images)}
    expected = torch.zeros(3, dtype=torch.float64)
    for layer, maps in inputs.items():
        for index, each in enumerate(maps.double()):
            mean = (each.mean(dim=(1, 2)) - layer.running_mean).square().sum().sqrt()
            ratio = (each.var(dim=(1, 2), correction=0) + 1e-6) / (layer.running_var.double() + 1e-6)
            expected[index] += (mean + weight * ratio.log().square().sum().sqrt()) / len(each) ** 0.5 / 2
    torch.testing.assert_close(precision_distance(network, images, weight), expected, rtol=1e-5, atol=1e-6)


def test_a_distance_is_that_of_the_image_alone() -> None:
    network, images = small_network(), normal(5)
    alone = torch.cat([precision_distance(network, image[None], 1.0) for image in images])
    torch.testing.assert_close(precision_distance(network, images, 1.0), alone, rtol=1e-5, atol=1e-6)
    assert len(set(alone.tolist())) == 5


def test_ranks_are_those_of_the_class() -> None:
    distances = torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 9.0])
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    assert ranks_in_class(distances, labels).tolist() == [2, 0, 1, 1, 0, 3]
    assert ranks_in_class(torch.zeros(4), torch.tensor([2, 2, 0, 2])).tolist() == [0, 1, 0, 2]


def test_groups_divide_each_class_from_easy_to_hard() -> None:
    labels = torch.tensor([0, 1] * 7 + [0])
    scores = torch.randn(15, generator=torch.Generator().manual_seed(1))
    groups = difficulty_groups(scores, labels, 2, 3)
    assert [[len(images) for images in group] for group in groups] == [[3, 3], [3, 2], [2, 2]]
    assert sorted(int(index) for group in groups for images in group for index in images) == list(range(15))
    for label in range(2):
        ordered = torch.cat([group[label] for group in groups])
        assert (labels[ordered] == label).all()
        assert scores[ordered].diff().ge(0).all()


@pytest.mark.parametrize(("choice", "expected"), [("front", 7), ("middle", 9), ("back", 4)])
def test_a_slot_starts_with_the_image_that_is_asked_for(choice: Any, expected: int) -> None:
    assert choose_start(torch.tensor([7, 1, 9, 4]), choice, torch.Generator()) == expected


def test_any_image_of_a_group_may_start() -> None:
    group = torch.tensor([7, 1, 9, 4])
    chosen = [choose_start(group, "random", torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert set(chosen) == {7, 1, 9, 4}


def test_statistics_move_as_in_training_and_nothing_else_does() -> None:
    network = small_network(dropout=0.5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    mean, variance = before["1.running_mean"], before["1.running_var"]
    batches = [normal(4, seed) for seed in range(3)]
    drawn = torch.get_rng_state()
    update_statistics(network, batches)
    assert torch.equal(torch.get_rng_state(), drawn)
    for images in batches:
        maps = nn.functional.conv2d(images, network[0].weight, padding=1)
        mean = 0.9 * mean + 0.1 * maps.mean(dim=(0, 2, 3))
        variance = 0.9 * variance + 0.1 * maps.var(dim=(0, 2, 3))
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, variance)
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{layer}.{kind}" for layer in (1, 4) for kind in kinds}
    assert not any(module.training for module in network.modules())


def test_what_a_layer_has_inside_is_not_trained() -> None:
    """timm's layers may drop out while they are trained."""
    layer = BatchNormAct2d(3, drop_layer=nn.Dropout).eval()
    network = nn.Sequential(layer)
    inside: list[bool] = []
    layer.drop.register_forward_pre_hook(lambda module, given: inside.append(module.training))
    update_statistics(network, [normal(4)])
    assert inside == [False]
    assert layer.running_mean.any()


@pytest.mark.parametrize(("share", "epochs", "expected"), [(0.9, 10, 9), (0.29, 100, 29), (0.1, 2, 1), (0, 10, 0)])
def test_passes_over_a_group(share: float, epochs: int, expected: int) -> None:
    assert DifficultyConfig(forward_share=share).epochs(epochs) == expected


# --- voters -----------------------------------------------------------------------------------------------------------


def moved(network: nn.Module, seed: int) -> nn.Module:
    """Give the layers other running statistics, and the weights other values."""
    source = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=source) / 10)
            module.running_var.copy_(torch.rand(module.num_features, generator=source) + 0.5)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("engine", [Engine(), Engine(compile=True), Engine(precision="bf16"), Engine(True, "bf16")])
@pytest.mark.parametrize("build", [densenet121, mobilenet_v2, shufflenet_v2_x0_5, small_network])
def test_a_voter_that_was_handed_over_judges_like_a_new_one(build: Any, engine: Engine) -> None:
    """Fused layers and rows of statistics are compared in the very objects that a compiler knows."""
    torch.manual_seed(0)
    classes = {} if build is small_network else {"num_classes": 4}
    plain = build(**classes).eval()
    images = normal(8, size=32).view(2, 4, 3, 32, 32)

    def voter(seed: int) -> Voter:
        own = build(**classes)
        own.load_state_dict(plain.state_dict())
        return ready_voter("a", moved(own, seed), 1.0, engine)

    mine, other = voter(1), voter(2)
    before, _ = judged(mine, images)
    hand_over(mine, other)
    found, slope = judged(mine, images)
    expected, gradient = judged(voter(2), images)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(slope, gradient)
    assert not torch.equal(found.bn, before.bn)
