"""Recovering one stack: how its voters match statistics, and what is logged of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import small_network, tiny_context

from cvdd.chain.recover import _voters, recover_stack
from cvdd.chain.unit_files import UNITS
from cvdd.context import Context
from cvdd.engine import Engine
from cvdd.units import Stack, Unit
from cvdd.voting import Voter


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


def test_stacks_are_logged_one_after_the_other_with_the_mean_shares_of_their_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six iterations a stack, three stacks before this one, a row every two iterations."""
    logged: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Context, "log", lambda self, values, step: logged.update({step: values}))
    context = tiny_context(tmp_path)
    names = ("resnet18", "resnet50")
    members = [(Voter(name, small_network(10, seed=seed)), None) for seed, name in enumerate(names)]
    stack = Stack(3, (0, 1), (Unit(0, 0, 0, 10), Unit(1, 0, 0, 10)))
    weights = torch.tensor([[0.9, 0.5], [0.1, 0.5]])
    (tmp_path / UNITS).mkdir()
    recover_stack(context, Engine(), stack, members, weights, None, tmp_path, lambda done: None)
    assert list(logged) == [20, 22, 24]
    for values in logged.values():
        assert values["distill/stack"] == 3
        assert [values[f"distill/weight/{name}"] for name in names] == pytest.approx([0.7, 0.3])
        assert values["distill/loss"] > 0
