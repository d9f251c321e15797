"""How much is computed at once where memory is short: sums by hand, whatever memory there is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_context

from cvdd.chain import fitting
from cvdd.chain.fitting import fit_batches, fit_units
from cvdd.computing.footprint import SHARE
from cvdd.computing.passes import Passes
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.units import Stack, Unit

STACK = Stack(0, (0, 1), tuple(Unit(slot, 0, 0, 10) for slot in range(4)))
"""Two members judge four units of ten images."""


def let_there_be(free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many bytes may be taken, and every network holds 100 bytes for each image."""
    monkeypatch.setattr(fitting, "surely_fits", lambda *sizes: False)
    monkeypatch.setattr(fitting, "free_memory", lambda device: (free + 1) / SHARE)
    monkeypatch.setattr(fitting, "profile_of", lambda *network: SimpleNamespace(activations=100.0))


@pytest.mark.parametrize(
    ("free", "engine", "units"),
    [
        (4 * 10 * 100, Engine(), None),
        (4 * 10 * 100 - 10, Engine(), 2),
        (2 * 10 * 100 - 10, Engine(), 1),
        (2 * 10 * 100, Engine(precision="bf16"), None),
        (2 * 10 * 100 - 10, Engine(precision="bf16"), 2),
    ],
)
def test_a_pass_has_as_many_units_as_memory_holds(
    free: float, engine: Engine, units: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member at a time; in half precision it holds half as much."""
    let_there_be(free, monkeypatch)
    assert fit_units(tiny_context(tmp_path), engine, [STACK]).units_per_pass == units


def test_a_pass_has_as_many_batches_as_memory_holds_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are normalised in copies; batches have eight samples of twenty images in three epochs."""
    context = tiny_context(tmp_path, "label.stack=4")
    for free, stack in ((4 * 8 * 200, 4), (4 * 8 * 200 - 10, 2), (2 * 8 * 200 - 10, 1)):
        let_there_be(free, monkeypatch)
        assert fit_batches(context, ["resnet18", "resnet50"], Passes(), 20) == stack
