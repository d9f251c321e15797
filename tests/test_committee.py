"""Who votes, and the weights of the specification's tables."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import Compose

from cvdd.chain.votes import plan_votes
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.committee import draw_members, turn_weights, vote_weights
from cvdd.synthesis.units import plan_units

NAMES = ("R18", "R50", "SV2", "MB2", "D121")
PRIORS = {
    "cifar10": (63, 65.3, 68.5, 67.6, 67.4),
    "cifar100": (64, 60.6, 51.6, 59.4, 56.4),
    "tiny": (46.5, 28.3, 43.6, 44.8, 41.5),
    "nette": (62.4, 52, 57.2, 54, 60.8),
    "imagenet1k": (56.4, 42.3, 52.5, 44.2, 40.6),
    "imagenet1k_first": (43.1, 41.37, 43.73, 39.15, 38.9),
}
# Specification of CV-DD, section 3: weight of the first of each pair at T = 5, pairs in lexicographic order.
FIRST_OF_PAIR = {
    "cifar10": (0.39, 0.25, 0.29, 0.29, 0.35, 0.39, 0.40, 0.55, 0.56, 0.51),
    "cifar100": (0.66, 0.92, 0.71, 0.82, 0.86, 0.56, 0.70, 0.17, 0.28, 0.65),
    "tiny": (0.97, 0.64, 0.58, 0.73, 0.05, 0.04, 0.07, 0.44, 0.60, 0.66),
    "nette": (0.89, 0.74, 0.84, 0.58, 0.26, 0.40, 0.15, 0.65, 0.33, 0.20),
    "imagenet1k": (0.94, 0.69, 0.92, 0.96, 0.11, 0.41, 0.58, 0.84, 0.91, 0.67),
    "imagenet1k_first": (0.59, 0.47, 0.69, 0.70, 0.38, 0.61, 0.62, 0.71, 0.72, 0.51),
}
# Section 4: weights of all five at T = 10.
ALL_FIVE = {
    "cifar10": (0.140, 0.177, 0.243, 0.222, 0.218),
    "cifar100": (0.323, 0.230, 0.093, 0.204, 0.151),
    "tiny": (0.298, 0.048, 0.223, 0.251, 0.180),
    "nette": (0.309, 0.109, 0.184, 0.134, 0.264),
    "imagenet1k": (0.413, 0.101, 0.279, 0.122, 0.085),
    "imagenet1k_first": (0.236, 0.199, 0.251, 0.159, 0.155),
}


@pytest.mark.parametrize("dataset", PRIORS)
def test_weights_of_every_published_pair(dataset: str) -> None:
    priors = PRIORS[dataset]
    for slot, expected in enumerate(FIRST_OF_PAIR[dataset]):
        pair = draw_members("in_turn", 2, slot, priors, seed=0)
        weights = vote_weights([priors[index] for index in pair], 5, "prior")
        assert weights[0].item() == pytest.approx(expected, abs=0.0055)
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dataset", PRIORS)
def test_weights_of_all_five_teachers(dataset: str) -> None:
    assert vote_weights(PRIORS[dataset], 10, "prior").tolist() == pytest.approx(ALL_FIVE[dataset], abs=0.00051)


def test_temperature_goes_from_the_best_to_all_alike() -> None:
    assert vote_weights([60, 50], 0.01, "prior").tolist() == pytest.approx([1, 0], abs=1e-6)
    assert vote_weights([60, 50], 1e6, "prior").tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    assert vote_weights([60, 50], 10, "prior")[0].item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)


def test_equal_voters() -> None:
    assert vote_weights([90, 1, 1, 1], 5, "equal").tolist() == [0.25] * 4


def test_random_voters_are_uniform_numbers_divided_by_their_sum() -> None:
    weights = torch.stack([vote_weights([1, 2], 5, "random", seed=1, slot=slot) for slot in range(4000)])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4000))
    assert weights.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    # The larger share of two is ln 2 in the mean, and beyond 0.9 in one of nine draws.
    larger = weights.amax(dim=1)
    assert larger.mean().item() == pytest.approx(math.log(2), abs=0.01)
    assert (larger > 0.9).float().mean().item() == pytest.approx(1 / 9, abs=0.02)


def test_random_voters_follow_from_seed_and_slot_alone() -> None:
    weights = vote_weights([1, 2, 3], 5, "random", seed=1, slot=7)
    assert torch.equal(weights, vote_weights([3, 2, 1], 5, "random", seed=1, slot=7))
    assert not torch.equal(weights, vote_weights([1, 2, 3], 5, "random", seed=2, slot=7))
    assert not torch.equal(weights, vote_weights([1, 2, 3], 5, "random", seed=1, slot=8))
    assert vote_weights([1], 5, "random", seed=1, slot=7).tolist() == [1]


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature\.vote=.*greater than 0"):
        vote_weights([1, 2], temperature, "prior")


def test_unknown_voter_and_draw() -> None:
    with pytest.raises(ConfigError, match=r"committee\.voter=fair: choose prior, equal or random"):
        vote_weights([1, 2], 5, "fair")
    with pytest.raises(ConfigError, match=r"committee\.draw=all: choose in_turn, random, best or fixed"):
        draw_members("all", 1, 0, [1, 2], 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_in_turn_covers_all_subsets_and_starts_again(size: int) -> None:
    subsets = list(itertools.combinations(range(5), size))
    drawn = [draw_members("in_turn", size, slot, [0.0] * 5, seed=slot) for slot in range(2 * len(subsets))]
    assert drawn == 2 * subsets


def test_pairs_in_turn_are_the_published_list() -> None:
    drawn = [draw_members("in_turn", 2, slot, PRIORS["cifar10"], seed=0) for slot in range(10)]
    assert [f"{NAMES[a]},{NAMES[b]}" for a, b in drawn] == [
        "R18,R50",
        "R18,SV2",
        "R18,MB2",
        "R18,D121",
        "R50,SV2",
        "R50,MB2",
        "R50,D121",
        "SV2,MB2",
        "SV2,D121",
        "MB2,D121",
    ]


def test_random_draws_are_without_replacement_and_fair() -> None:
    drawn = [draw_members("random", 2, slot, [0.0] * 5, seed=3) for slot in range(2000)]
    assert all(len(set(pair)) == 2 and list(pair) == sorted(pair) for pair in drawn)
    counts = [drawn.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == 2000
    assert min(counts) > 140
    assert drawn == [draw_members("random", 2, slot, [9.0] * 5, seed=3) for slot in range(2000)]
    assert drawn != [draw_members("random", 2, slot, [0.0] * 5, seed=4) for slot in range(2000)]


@pytest.mark.parametrize(
    ("dataset", "pair"), [("tiny", ("R18", "MB2")), ("imagenet1k", ("R18", "SV2")), ("nette", ("R18", "D121"))]
)
def test_best_takes_the_highest_priors(dataset: str, pair: tuple[str, str]) -> None:
    for slot in range(3):
        drawn = draw_members("best", 2, slot, PRIORS[dataset], seed=slot)
        assert tuple(NAMES[index] for index in drawn) == pair


def test_best_breaks_ties_by_order() -> None:
    assert draw_members("best", 2, 0, [5.0, 7.0, 5.0, 5.0], seed=0) == (0, 1)


def test_fixed_lists_keep_their_order() -> None:
    fixed = [[2, 0], [1, 2]]
    assert [draw_members("fixed", 2, slot, [0.0] * 3, 0, fixed) for slot in range(3)] == [(2, 0), (1, 2), (2, 0)]


@pytest.mark.parametrize("size", [0, 4])
def test_more_members_than_there_are(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"committee\.size={size}: .*choose 1 to 3"):
        draw_members("in_turn", size, 0, [1, 2, 3], 0)


def test_turns_go_round() -> None:
    weights = torch.tensor([[0.7, 0.1], [0.2, 0.4], [0.1, 0.5]])
    found = turn_weights(weights, "in_turn", 4, seed=0)
    assert found.shape == (4, 3, 2)
    assert found.argmax(dim=1).tolist() == [[0, 0], [1, 1], [2, 2], [0, 0]]
    assert torch.equal(turn_weights(weights, "all", 2, seed=0), torch.stack([weights, weights]))


def test_sampled_turns_are_an_unbiased_vote() -> None:
    weights = torch.tensor([[0.7, 0.1], [0.2, 0.4], [0.1, 0.5]])
    found = turn_weights(weights, "sampled", 20_000, seed=3)
    assert torch.equal(found.sum(dim=1), torch.ones(20_000, 2))
    torch.testing.assert_close(found.mean(dim=0), weights, atol=0.015, rtol=0)
    assert torch.equal(found, turn_weights(weights, "sampled", 20_000, seed=3))
    # Units with the same shares agree in every iteration, whatever else is in the stack.
    alone = turn_weights(weights[:, :1], "sampled", 20_000, seed=3)
    assert torch.equal(found[:, :, :1], alone)


def test_sampled_turns_depend_on_the_seed() -> None:
    weights = torch.tensor([[0.5], [0.5]])
    one, other = (turn_weights(weights, "sampled", 50, seed) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_unknown_turns_name_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"method\.turns=first: choose all, in_turn or sampled"):
        turn_weights(torch.ones(1, 1), "first", 1, seed=0)


@pytest.mark.parametrize(("turns", "weighed"), [("all", True), ("sampled", True), ("in_turn", False)])
def test_members_that_judge_in_turn_have_no_weights(turns: str, weighed: bool, compose: Compose) -> None:
    """Labels may need priors that the images do not, and must not change them."""
    config = compose("evaluate", f"method.turns={turns}", "committee.voter=prior")
    units = plan_units(2, 10, config.method)
    known = dict(zip(config.committee.members, PRIORS["tiny"], strict=True))
    assert (plan_votes(config, units, known) != plan_votes(config, units, {})) == weighed
