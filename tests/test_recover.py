"""Recovering one stack: how its voters match statistics, and what is logged of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import method_config, small_network, tiny_context

from cvdd.augmentation.augment import normalise
from cvdd.chain.context import Context
from cvdd.chain.recover import RealSources, _less_memory, _voters, recover_stack
from cvdd.chain.unit_files import UNITS
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.units import Stack, Unit
from cvdd.synthesis.voting import Voter

NAMES = ("resnet18", "resnet50")


def test_matchers_have_the_methods_multiplier_of_the_first_layer(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "method.first_bn_multiplier=3", "method.statistics.momentum=0.8")
    members = [(Voter("resnet18", small_network()), None)]
    (voter,) = _voters(context, members, units=2)
    assert voter.matcher is not None
    assert (voter.matcher.first_multiplier, voter.matcher.groups) == (3.0, 2)
    one_group = tiny_context(tmp_path, "method.statistics.momentum=0.8", "method.statistics_of=stack")
    (voter,) = _voters(one_group, members, units=2)
    assert voter.matcher is not None
    assert (voter.matcher.first_multiplier, voter.matcher.groups) == (10.0, 1)
    (voter,) = _voters(tiny_context(tmp_path), members, units=2)
    assert voter.matcher is None


def logged_of(
    context: Context, stack: Stack, weights: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> dict[int, dict[str, float]]:
    """Recover a stack with two members; return what is logged of it, by step."""
    logged: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Context, "log", lambda self, values, step: logged.update({step: values}))
    members = [(Voter(name, small_network(10, seed=seed)), None) for seed, name in enumerate(NAMES)]
    output = context.config.paths.output
    (output / UNITS).mkdir(parents=True)
    recover_stack(context, Engine(), stack, members, weights, RealSources(None), output, lambda done: None)
    return logged


def test_stacks_are_logged_one_after_the_other_with_the_mean_shares_of_their_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six iterations a stack, three stacks before this one, a row every two iterations."""
    stack = Stack(3, (0, 1), (Unit(0, 0, 0, 10), Unit(1, 0, 0, 10)))
    logged = logged_of(tiny_context(tmp_path), stack, torch.tensor([[0.9, 0.5], [0.1, 0.5]]), monkeypatch)
    assert list(logged) == [20, 22, 24]
    for values in logged.values():
        assert values["distill/stack"] == 3
        assert [values[f"distill/weight/{name}"] for name in NAMES] == pytest.approx([0.7, 0.3])
        assert values["distill/loss"] > 0
        assert "distill/density" not in values


def test_terms_that_are_logged_add_up_to_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tmp_path, "method.composer=classes", "method.density=2.0", "method.density_scale=cosine")
    stack = Stack(0, (0, 1), (Unit(0, 0, 0, 5, 2),))
    for values in logged_of(context, stack, torch.tensor([[0.6], [0.4]]), monkeypatch).values():
        parts = [
            values[f"distill/weight/{name}"] * (values[f"distill/ce/{name}"] + values[f"distill/bn/{name}"])
            for name in NAMES
        ]
        assert values["distill/density"] > 0
        assert values["distill/loss"] == pytest.approx(sum(parts) + values["distill/density"], rel=1e-4)


@pytest.mark.parametrize(("round_trip", "expected"), [(True, 100), (False, 101)])
def test_pixels_are_cut_to_whole_numbers_where_they_go_through_jpeg(
    round_trip: bool, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published programs write them; elsewhere they are rounded."""
    context = tiny_context(tmp_path, f"method.jpeg_round_trip={str(round_trip).lower()}")
    written: list[torch.Tensor] = []
    images = normalise(torch.full((1, 10, 3, 32, 32), 100.7), context.data().mean, context.data().std)
    monkeypatch.setattr("cvdd.chain.recover._optimise", lambda *arguments: (images, [], Engine()))
    monkeypatch.setattr("cvdd.chain.recover.jpeg_round_trip", lambda image: image)
    monkeypatch.setattr("cvdd.chain.recover.write_unit", lambda folder, unit, pixels, *others: written.append(pixels))
    stack = Stack(0, (0,), (Unit(0, 0, 0, 10),))
    members = [(Voter("resnet18", small_network(10)), None)]
    recover_stack(context, Engine(), stack, members, torch.ones(1, 1), RealSources(None), tmp_path, lambda done: None)
    assert written[0].unique().tolist() == [expected]


def test_units_that_need_too_much_memory_are_to_be_halved() -> None:
    together = Stack(0, (0,), tuple(Unit(slot, 0, 0, 10) for slot in range(6)))
    method = method_config(statistics_of="stack")
    assert "6 units of 10 images are judged together" in _less_memory(method, together.units)
    assert "lower method.units_per_stack to at most 3" in _less_memory(method, together.units)
    assert "lower method.classes_per_unit" in _less_memory(method, together.units[:1])
