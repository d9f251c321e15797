"""Members whose whole optimiser steps are recorded, on a simulated GPU where there is none."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import timm.optim.muon
import torch
from helpers import tiny_context
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu
from simulated_tensors import Device
from test_chain_on_gpu import on_gpu, warnings_of
from test_interruption import PulledPlug, epochs_begun, stop_at
from torch import Tensor

from cvdd.chain.context import Context
from cvdd.chain.members import make_member
from cvdd.chain.training import WEIGHTS
from cvdd.training.classifier import Classifier

MUON = ("recipe.optimizer=muon", "recipe.lr=0.02", "recipe.epochs=2")

ROUNDED = 0.02
"""Distance of weights whose steps were rounded otherwise, at most."""


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    # In half precision, as it is used, what is rounded otherwise grows from step to step.
    products = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", products)
    with simulated_gpu() as gpu:
        yield gpu


def weights_of(context: Context) -> dict[str, Tensor]:
    return load_file(make_member(context, "resnet18").path / WEIGHTS)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all parameters, and statistics, as a part of their size."""
    assert one.keys() == other.keys()
    apart = sum(float((one[key].double() - other[key].double()).square().sum()) for key in one)
    return float((apart / sum(float(values.double().square().sum()) for values in one.values())) ** 0.5)


@pytest.mark.parametrize(
    "changes",
    [(), ("recipe.schedule=cosine",), ("recipe.accumulation=2",)],
    ids=["one cycle", "a rate for each epoch", "parts"],
)
def test_recorded_steps_are_steps(
    changes: tuple[str, ...], simulated: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of Muon, whose rate changes from one to the next."""
    expected = weights_of(tiny_context(tmp_path / "cpu", *MUON, *changes))
    found = weights_of(on_gpu(tmp_path / "gpu", *MUON, *changes))
    assert warnings_of(caplog) == []
    assert simulated.replayed > 3
    assert distance(found, expected) < ROUNDED
    other = weights_of(tiny_context(tmp_path / "cpu", *MUON, *changes, "recipe.lr=0.01"))
    assert distance(other, expected) > 2 * ROUNDED


def test_nothing_waits_for_a_gpu_from_batch_to_batch(simulated: Device, tmp_path: Path) -> None:
    """The processor waits as often for many batches of a member as for few, but for what it sends there."""

    def waits(batch_size: int) -> Counter[str]:
        simulated.waits.clear()
        weights_of(on_gpu(tmp_path, *MUON, f"recipe.batch_size={batch_size}"))
        return Counter({what: often for what, often in simulated.waits.items() if what != "aten._to_copy.default"})

    assert waits(8) == waits(32)


@pytest.mark.parametrize(("begins", "ends"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_member_goes_on_on_another_device(
    begins: str, ends: str, simulated: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"gpu": on_gpu(tmp_path, *MUON), "cpu": tiny_context(tmp_path, *MUON)}
    expected = weights_of(places["cpu"])
    shutil.rmtree(tmp_path / "store" / "members")
    with monkeypatch.context() as patched:
        stop_at(patched, Classifier, "on_train_epoch_start", 2, PulledPlug)
        with pytest.raises(PulledPlug):
            weights_of(places[begins])
    begun = epochs_begun(monkeypatch)
    found = weights_of(places[ends])
    assert begun == [1]
    assert distance(found, expected) < ROUNDED
