"""Agreement of members: cosines of gradients whose directions are known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import method_config, quiet_trainer, small_network
from torch import Tensor
from vote_reference import voting_loss

from cvdd.schema import StatisticsConfig
from cvdd.statistics.matching import Matcher
from cvdd.synthesis.agreement import agreement, mean_agreement, pairs_of
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.log_rows import LogRow
from cvdd.synthesis.units import Stage, Unit, unit_views
from cvdd.synthesis.voting import Voter


def rows(*units: tuple[float, ...]) -> Tensor:
    """One member's gradient, a row for each unit."""
    return torch.tensor(units)


def test_the_cosines_are_those_of_the_gradients_and_the_mean_is_over_units() -> None:
    # First unit: 90 degrees; second unit: 60 degrees.
    matrix = agreement(torch.stack([rows((3.0, 0.0), (1.0, 0.0)), rows((0.0, 7.0), (1.0, math.sqrt(3)))]))
    torch.testing.assert_close(matrix, torch.tensor([[1, 0.25], [0.25, 1]]))


def test_opposite_members_and_factors() -> None:
    matrix = agreement(torch.stack([rows((1.0, 2.0)), rows((-1.0, -2.0)), rows((10.0, 20.0))]))
    torch.testing.assert_close(matrix, torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]))


def test_a_member_without_gradient_agrees_with_nobody() -> None:
    assert agreement(torch.stack([rows((1.0, 0.0)), rows((0.0, 0.0))])).tolist() == [[1, 0], [0, 0]]


def test_pairs_are_named_in_the_members_order() -> None:
    matrix = torch.tensor([[1.0, 0.5, 0.25], [0.5, 1.0, -0.5], [0.25, -0.5, 1.0]])
    assert pairs_of(matrix, ["a", "b", "c"]) == {"a-b": 0.5, "a-c": 0.25, "b-c": -0.5}
    assert pairs_of(matrix[:1, :1], ["a"]) == {}


def test_logged_agreement_is_that_of_gradients_unit_by_unit() -> None:
    """Before the only step, so that the images are those that the module was given."""
    images = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    voters = [Voter("a", small_network(seed=0)), Voter("b", small_network(seed=1)), Voter("a again", small_network())]
    method = method_config(iterations=1, log_every=1, checkpoint_every=1, grid_every=1, r_bn=0.1)
    targets = torch.arange(4).expand(2, 4)
    bounds = (torch.full((3, 1, 1), -9.0), torch.full((3, 1, 1), 9.0))
    shares = torch.tensor([[0.7], [0.2], [0.1]]).expand(3, 2)
    module = DistillModule(images, targets, None, voters, shares, method, bounds, lambda row, current: None)
    quiet_trainer(1).fit(module)
    gradients = []
    for voter in voters[:2]:
        each = []
        for unit in range(2):
            alone = images[unit : unit + 1].clone().requires_grad_()
            voting_loss(alone, targets[:1], [voter], torch.ones(1, 1), r_bn=0.1).loss.backward()
            assert alone.grad is not None
            each.append(alone.grad.flatten().double())
        gradients.append(each)
    cosines = [float(one @ other / (one.norm() * other.norm())) for one, other in zip(*gradients, strict=True)]
    logged = module.rows[0].agreement
    assert logged["a-b"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert logged["a-a again"] == pytest.approx(1, abs=1e-5)
    assert -0.999 < logged["a-b"] < 0.999


def test_the_mean_is_over_the_rows_and_units_in_which_both_voted() -> None:
    history = {
        "slot0": {"rows": [{"agreement": {"a-b": 0.25}}, {"agreement": {"a-b": 0.75}}]},
        "slot1": {"rows": [{"agreement": {"a-b": -0.25, "b-c": 1.0}}]},
        "older": {"rows": [{"loss": 1.0}]},
    }
    assert mean_agreement(history) == {"a-b": 0.25, "b-c": 1.0}
    assert mean_agreement({}) == {}


def distil(
    names: list[str], log_agreement: bool, momentum: float | None = None, turns: str = "all"
) -> tuple[Tensor, list[LogRow]]:
    """Optimise two units for five iterations; a log row every two."""
    method = method_config(
        iterations=5,
        log_every=2,
        checkpoint_every=6,
        grid_every=6,
        log_agreement=log_agreement,
        statistics={"momentum": momentum},
        turns=turns,
    )
    units, stage = [Unit(slot, 0, 0, 4) for slot in range(2)], Stage(0, 0, 5, 8)
    networks = {name: small_network(seed=index) for index, name in enumerate(names)}
    voters = [
        Voter(name, network, 1.0, None if momentum is None else Matcher(network, method.statistics, 2, 10.0, None, 0))
        for name, network in networks.items()
    ]
    module = DistillModule(
        torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.stack([unit.targets for unit in units]),
        [unit_views(unit, method, stage) for unit in units],
        voters,
        torch.full((len(voters), 2), 1 / len(voters)),
        method,
        (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)),
        lambda row, images: None,
        stage,
    )
    quiet_trainer(1).fit(module)
    return module.images.detach(), module.rows


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_agreement_is_logged_and_changes_no_bit_of_the_images(momentum: float | None) -> None:
    images, rows = distil(["a", "b", "c"], True, momentum)
    plain, silent = distil(["a", "b", "c"], False, momentum)
    assert torch.equal(images, plain)
    assert [row.iteration for row in rows] == [2, 4, 5]
    for row, other in zip(rows, silent, strict=True):
        assert list(row.agreement) == ["a-b", "a-c", "b-c"]
        assert all(-1 < cosine < 1 for cosine in row.agreement.values())
        assert (row.loss, row.ce, row.bn) == (other.loss, other.ce, other.bn)
        assert other.agreement == {}


@pytest.mark.parametrize("turns", ["in_turn", "sampled"])
def test_asking_those_whose_turn_it_is_not_changes_no_bit_either(turns: str) -> None:
    """Moving averages of statistics are those of the iterations in which a member judged."""
    images, rows = distil(["a", "b", "c"], True, 0.8, turns)
    plain, silent = distil(["a", "b", "c"], False, 0.8, turns)
    assert torch.equal(images, plain)
    for row, other in zip(rows, silent, strict=True):
        assert list(row.agreement) == ["a-b", "a-c", "b-c"]
        assert (row.loss, row.ce, row.bn) == (other.loss, other.ce, other.bn)


def test_one_member_agrees_with_nobody() -> None:
    assert [row.agreement for row in distil(["a"], True)[1]] == [{}, {}, {}]


def test_a_matcher_without_momentum_is_asked_as_in_the_vote() -> None:
    assert StatisticsConfig(momentum=None) == StatisticsConfig()
    with_matchers = distil(["a", "b"], True, 0.0)[1][0].agreement["a-b"]
    assert with_matchers == pytest.approx(distil(["a", "b"], True)[1][0].agreement["a-b"], abs=1e-4)
