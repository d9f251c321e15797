"""The matcher: its terms against the formulas, its averages, its drops, and units that know nothing of each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import small_network
from torch import Tensor, nn
from vote_reference import voting_loss

from cvdd.schema import StatisticsConfig
from cvdd.statistics.bn import BatchStatistics, statistics_distance
from cvdd.statistics.matching import Matcher
from cvdd.statistics.recording import RealStatistics, record_statistics
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.voting import Voter

CONVOLUTIONS, BATCHNORM = ("0", "3"), ("1", "4")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Sequential:
    return small_network().double()


def config(**options: Any) -> StatisticsConfig:
    of_convolutions = {} if options.get("layers") == "bn" else {"patch": 3}
    return StatisticsConfig.model_validate({"layers": "bn_and_conv", **of_convolutions, **options})


def real(options: StatisticsConfig, side: int = 12) -> RealStatistics | None:
    """Statistics of twelve made-up images of four classes."""
    if not options.recorded:
        return None
    images, labels = 0.5 + 2 * noise(12, 3, side, side, seed=9), torch.arange(4).repeat(3)
    return record_statistics(network(), [(images, labels)], options, 4)


def matcher(groups: int = 1, first: float = 10.0, seed: int = 0, **options: Any) -> Matcher:
    chosen = config(**options)
    return Matcher(network(), chosen, groups, first, real(chosen), seed)


TARGETS = torch.tensor([[0, 1, 1, 3], [2, 2, 0, 1], [3, 3, 3, 3]])
IMAGES = noise(3, 4, 3, 12, 12)


def step(matched: Matcher, images: Tensor, targets: Tensor, iteration: int = 0) -> Tensor:
    matched.begin(iteration)
    with matched:
        matched._network(images.flatten(0, 1))
    return matched.distance(targets)


def inputs_of(images: Tensor) -> dict[str, Tensor]:
    """What goes into each layer that is watched."""
    found = {}
    current = images
    for name, layer in network().named_children():
        if name in CONVOLUTIONS + BATCHNORM:
            found[name] = current
        current = layer(current)
    return found


def statistics_of(name: str, inputs: Tensor) -> dict[str, Tensor]:
    found = {
        "channels.mean": inputs.mean(dim=(0, 2, 3)),
        "channels.variance": inputs.var(dim=(0, 2, 3), correction=0),
    }
    if name in CONVOLUTIONS:
        side = inputs.shape[-1] // 3
        tiles = [
            inputs[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            for row in range(side)
            for column in range(side)
        ]
        found["patches.mean"] = torch.stack([tile.mean() for tile in tiles])
        found["patches.variance"] = torch.stack([tile.var(correction=0) for tile in tiles])
    return found


def target_of(recorded: RealStatistics | None, name: str, statistic: str) -> Tensor:
    part, moment = statistic.split(".")
    if name in BATCHNORM:
        layer = network()[int(name)]
        return layer.running_mean if moment == "mean" else layer.running_var
    assert recorded is not None
    return getattr(recorded.layers[name][part], moment)


# --- the terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distance_is_that_of_the_formula(share: float) -> None:
    options = {"class_share": share}
    recorded, labels = real(config(**options)), TARGETS[0]
    terms = {}
    for name, inputs in inputs_of(IMAGES[0]).items():
        terms[name] = 0.0
        for statistic, value in statistics_of(name, inputs).items():
            part, moment = statistic.split(".")
            terms[name] += (1 - share) * float(((target_of(recorded, name, statistic) - value) ** 2).sum().sqrt())
            if share:
                own = sum(getattr(recorded.classes[name][part], moment)[label] for label in labels) / 4
                terms[name] += share * float(((own - value) ** 2).sum().sqrt())
    expected = 10 * terms["0"] + terms["1"] + terms["3"] + terms["4"]
    assert step(matcher(**options), IMAGES[:1], TARGETS[:1]).item() == pytest.approx(expected, rel=1e-6)


def test_without_convolutions_it_is_the_distance_of_batchnorm() -> None:
    mine = step(matcher(groups=3, layers="bn"), IMAGES, TARGETS)
    watched = network()
    with BatchStatistics(watched, 3) as statistics:
        watched(IMAGES.flatten(0, 1))
    expected = statistics_distance(statistics.means, statistics.variances, statistics.layers, 10.0)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)


def test_images_with_the_targets_statistics_are_at_no_distance() -> None:
    """The same images, recorded and matched, as one batch; patches that lie between the map's cells included."""
    options = config(class_share=1.0, class_statistics="total", patch=5)
    images, labels = noise(6, 3, 12, 12), torch.zeros(6, dtype=torch.long)
    recorded = record_statistics(network(), [(images, labels)], options, 1)
    matched = Matcher(network(), options, 1, 10.0, recorded, 0)
    assert step(matched, images[None], labels[None]).item() == pytest.approx(0, abs=1e-4)
    assert step(matched, images[None] + 1, labels[None]).item() > 1


@pytest.mark.parametrize("options", [{"class_share": 0.5}, {"class_share": 0.5, "momentum": 0.8, "drop_rate": 0.5}])
def test_groups_are_alone(options: dict[str, Any]) -> None:
    """Values, gradients and averages of three units in one pass are those of three passes, over three iterations."""
    together = matcher(groups=3, **options)
    apart = [matcher(groups=1, **options) for _ in range(3)]
    for iteration in range(3):
        shown = IMAGES + iteration * noise(3, 4, 3, 12, 12, seed=iteration)
        leaf = shown.clone().requires_grad_()
        distance = step(together, leaf, TARGETS, iteration)
        distance.sum().backward()
        for unit in range(3):
            alone = shown[unit : unit + 1].clone().requires_grad_()
            own = step(apart[unit], alone, TARGETS[unit : unit + 1], iteration)
            own.sum().backward()
            torch.testing.assert_close(distance[unit : unit + 1], own, rtol=1e-9, atol=0)
            torch.testing.assert_close(leaf.grad[unit : unit + 1], alone.grad, rtol=1e-7, atol=1e-12)
    for key, average in together.state().items():
        torch.testing.assert_close(average, torch.cat([one.state()[key] for one in apart]))


def test_a_stack_as_one_group_has_the_targets_of_all_its_classes() -> None:
    one = step(matcher(class_share=1.0), IMAGES, TARGETS)
    same = step(matcher(class_share=1.0), IMAGES.reshape(1, 12, 3, 12, 12), TARGETS.reshape(1, 12))
    assert one.shape == (1,)
    torch.testing.assert_close(one, same)


@pytest.mark.parametrize("options", [{"class_share": 0.4}, {"layers": "bn", "class_share": 1.0}])
def test_gradient(options: dict[str, Any]) -> None:
    leaf = IMAGES[:1].clone().requires_grad_()
    step(matcher(**options), leaf, TARGETS[:1]).sum().backward()
    for index in [(0, 0, 0, 0, 0), (0, 1, 2, 5, 7), (0, 3, 1, 11, 6)]:
        nudge = torch.zeros_like(leaf)
        nudge[index] = 1e-5
        above, below = (step(matcher(**options), IMAGES[:1] + sign * nudge, TARGETS[:1]).item() for sign in (1.0, -1.0))
        assert leaf.grad[index].item() == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-7)
        assert leaf.grad[index].abs() > 1e-4


def test_maps_of_another_size_than_recorded_are_refused() -> None:
    chosen = config()
    matched = Matcher(network(), chosen, 1, 10.0, real(chosen, side=24), 0)
    with pytest.raises(ConfigError, match=r"layer 0: its map has 16 patches, and 64 .*method\.sizes=null"):
        step(matched, IMAGES[:1], TARGETS[:1])


# --- averages over iterations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "shares"), [("first", (0.64, 0.16, 0.2)), ("zero", (0.128, 0.16, 0.2))])
def test_an_average_in_value_and_the_current_images_in_gradient(start: str, shares: tuple[float, ...]) -> None:
    """Three iterations with momentum 0.8; from zero the first batch has 0.2 * 0.64, else all that is left."""
    seen = [IMAGES[:1] + noise(1, 4, 3, 12, 12, seed=seed) for seed in (1, 2)] + [IMAGES[:1]]
    matched = matcher(momentum=0.8, start=start)
    for iteration, images in enumerate(seen):
        leaf = images.clone().requires_grad_()
        distance = step(matched, leaf, TARGETS[:1], iteration)
    distance.sum().backward()

    recorded = real(config())
    each = [{name: statistics_of(name, inputs) for name, inputs in inputs_of(images[0]).items()} for images in seen[:2]]
    again = IMAGES[:1].clone().requires_grad_()
    value, surrogate = 0.0, torch.zeros((), dtype=torch.float64)
    for name, inputs in inputs_of(again[0]).items():
        weight = 10 if name == "0" else 1
        for statistic, current in statistics_of(name, inputs).items():
            average = sum(
                share * one
                for share, one in zip(
                    shares, (each[0][name][statistic], each[1][name][statistic], current), strict=True
                )
            ).detach()
            difference = average - target_of(recorded, name, statistic)
            value += weight * float(difference.norm())
            # The slope of the norm where the average is, times the current statistic.
            surrogate = surrogate + weight * (difference / difference.norm() * current).sum()
    surrogate.backward()
    assert distance.item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-5, atol=1e-9)


def test_no_momentum_remembers_nothing() -> None:
    matched = matcher()
    step(matched, IMAGES[:1] + 5, TARGETS[:1])
    torch.testing.assert_close(step(matched, IMAGES[:1], TARGETS[:1]), step(matcher(), IMAGES[:1], TARGETS[:1]))
    assert matched.state() == {}


@pytest.mark.parametrize("start", ["first", "zero"])
def test_going_on_from_a_state(start: str) -> None:
    """After two iterations, through a checkpoint on disk in spirit: a copy of every tensor."""
    options = {"momentum": 0.8, "start": start, "drop_rate": 0.6, "class_share": 0.5}
    first = matcher(groups=3, **options)
    for iteration in range(2):
        step(first, IMAGES + iteration, TARGETS, iteration)
    kept = {key: value.clone() for key, value in first.state().items()}
    handed = first.state()
    second = matcher(groups=3, **options)
    second.load_state(copy.deepcopy(kept))
    for iteration in range(2, 5):
        images = IMAGES + iteration
        assert torch.equal(step(first, images, TARGETS, iteration), step(second, images, TARGETS, iteration))
    assert all(torch.equal(handed[key], kept[key]) for key in kept)
    assert all(torch.equal(value, second.state()[key]) for key, value in first.state().items())
    assert not torch.equal(kept["1/channels/mean"], first.state()["1/channels/mean"])


def test_averages_carry_no_graph() -> None:
    matched = matcher(momentum=0.5)
    for iteration in range(2):
        step(matched, IMAGES[:1].clone().requires_grad_(), TARGETS[:1], iteration)
    assert not any(average.requires_grad for average in matched.state().values())


# --- drops ------------------------------------------------------------------------------------------------------------


def left_out(matched: Matcher, iteration: int) -> frozenset[str]:
    matched.begin(iteration)
    return matched._left_out


def test_only_convolutions_are_left_out_and_as_often_as_asked() -> None:
    matched = matcher(drop_rate=0.4)
    chosen = [left_out(matched, iteration) for iteration in range(500)]
    assert {name for one in chosen for name in one} == set(CONVOLUTIONS)
    for name in CONVOLUTIONS:
        assert sum(name in one for one in chosen) / 500 == pytest.approx(0.4, abs=0.07)
    again, other = matcher(drop_rate=0.4), matcher(drop_rate=0.4, seed=1)
    assert chosen == [left_out(again, iteration) for iteration in range(500)]
    assert chosen != [left_out(other, iteration) for iteration in range(500)]


def test_a_layer_that_is_left_out_has_no_term_and_keeps_its_average() -> None:
    """With nearly every convolution left out the rest is BatchNorm, and the first layer's weight goes to none of it."""
    matched = matcher(drop_rate=0.999, momentum=0.5)
    assert left_out(matched, 0) == set(CONVOLUTIONS)
    state = {"0/channels/mean": noise(1, 3), "3/patches/variance": noise(1, 16)}
    matched.load_state(state)
    distance = step(matched, IMAGES[:1], TARGETS[:1])
    torch.testing.assert_close(distance, step(matcher(layers="bn", first=1.0), IMAGES[:1], TARGETS[:1]))
    assert {key for key in matched.state() if key[0] in CONVOLUTIONS} == set(state)
    assert all(torch.equal(matched.state()[key], value) for key, value in state.items())


# --- in the vote ------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    """Without a layer to match."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4)).double().requires_grad_(False)


def vote(voters: list[Voter], images: Tensor, **options: Any) -> tuple[Any, Tensor]:
    leaf = images.clone().requires_grad_()
    weights = torch.full((len(voters), len(images)), 1 / len(voters), dtype=torch.float64)
    terms = voting_loss(leaf, TARGETS[: len(images)], voters, weights, **{"r_bn": 0.1, **options})
    terms.loss.backward()
    assert leaf.grad is not None
    return terms, leaf.grad


def test_a_voter_with_a_matcher() -> None:
    matched = matcher(groups=3, class_share=0.5)
    voter = Voter("a", matched._network, bn_scale=0.5, matcher=matched)
    terms, gradient = vote([voter], IMAGES)
    expected = step(matcher(groups=3, class_share=0.5), IMAGES, TARGETS)
    torch.testing.assert_close(terms.bn[0], expected)
    assert terms.loss.item() == pytest.approx((terms.ce[0] + 0.1 * 0.5 * expected).sum().item())
    assert bool((gradient.flatten(2).norm(dim=2) > 0).all())


def test_a_matcher_for_the_stack() -> None:
    matched = matcher(class_share=0.5)
    terms, _ = vote([Voter("a", matched._network, matcher=matched)], IMAGES, statistics_of="stack")
    expected = step(matcher(class_share=0.5), IMAGES, TARGETS)
    torch.testing.assert_close(terms.bn[0], expected.expand(3))


def test_the_fast_path_and_a_matcher_of_the_same_say_the_same() -> None:
    matched = matcher(groups=3, layers="bn")
    with_matcher, gradient = vote([Voter("a", matched._network, matcher=matched)], IMAGES)
    without, other_gradient = vote([Voter("a", network())], IMAGES)
    torch.testing.assert_close(with_matcher.loss, without.loss)
    torch.testing.assert_close(gradient, other_gradient)


def test_without_the_term_nothing_is_matched() -> None:
    matched = matcher(groups=3, momentum=0.5)
    terms, _ = vote([Voter("a", matched._network, matcher=matched)], IMAGES, r_bn=0.0)
    assert not terms.bn.any()
    assert matched.state() == {}


@pytest.mark.parametrize("layers", [None, "bn", "bn_and_conv"])
def test_a_voter_without_layers_votes_by_its_cross_entropy(layers: str | None) -> None:
    network = plain()
    own = None
    if layers is not None:
        own = Matcher(network, StatisticsConfig(layers=layers), 3, 10.0, RealStatistics({}, {}), 0)
    terms, _ = vote([Voter("plain", network, matcher=own)], IMAGES)
    assert terms.bn.tolist() == [[0.0, 0.0, 0.0]]
    expected = nn.functional.cross_entropy(network(IMAGES.flatten(0, 1)), TARGETS.flatten()) * 3
    assert terms.loss.item() == pytest.approx(expected.item())


def test_hooks_are_gone_after_an_error() -> None:
    matched = matcher()
    with pytest.raises(RuntimeError), matched:
        matched._network(noise(2, 5, 12, 12))
    assert all(not module._forward_pre_hooks for module in matched._network.modules())
