"""Temperatures that fall from epoch to epoch, and one that fits the student (LPQLD)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from helpers import protocol_config, quiet_trainer
from test_graphs import fit, student_of
from test_student import soft_labels, student, trainable

from cvdd.config_base import ConfigError
from cvdd.label_batches import SoftLabelDataset
from cvdd.losses import soft_label_loss
from cvdd.passes import Passes
from cvdd.recorded_student import RecordedStudent
from cvdd.schedules import teacher_temperature
from cvdd.temperatures import CALIBRATED, calibrated_temperature, temperatures_of

LPQLD = {"temperature_factor": 0.7, "student_temperature": "calibrated", "accumulation": 1}


def test_temperatures_fall_in_steps_and_not_below_the_least() -> None:
    """As released, the first step is an epoch shorter, for its epochs are counted from 1."""
    protocol = protocol_config(epochs=300, temperature=20.0, temperature_factor=0.7)
    found = [teacher_temperature(protocol, epoch) for epoch in range(300)]
    assert found[:29] == [20.0] * 29
    assert found[29:59] == [pytest.approx(14.0)] * 30
    assert found[178] == pytest.approx(20 * 0.7**5)
    assert found[179] == pytest.approx(20 * 0.7**6)
    assert found[209:] == [2.0] * 91
    assert teacher_temperature(protocol_config(temperature=1.5), 200) == 1.5


def test_the_temperature_that_fits_is_found() -> None:
    """Against every one of the grid; a student whose logits are a third of the teachers' at T = 6 needs 2 at most."""
    source = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.05, 1 / 12, 1.0):
        teacher = 3 * torch.randn(5, 7, generator=source)
        mine = scale * teacher + 0.02 * torch.randn(5, 7, generator=source)
        losses = [soft_label_loss(mine, teacher, 6.0, float(one)).item() for one in CALIBRATED]
        best = calibrated_temperature(mine, teacher, torch.tensor(6.0), CALIBRATED)
        assert soft_label_loss(mine, teacher, 6.0, float(best)).item() == pytest.approx(min(losses), abs=1e-6)
    exact = calibrated_temperature(teacher / 12, teacher, torch.tensor(6.0), CALIBRATED)
    assert float(exact) == pytest.approx(0.5)


def test_classes_without_a_logit_have_no_probability() -> None:
    """Of logits (log 3, log 1, nothing) at temperature 1 three quarters and one; the student says a third each."""
    teacher = torch.tensor([[math.log(3), 0.0, -math.inf]])
    mine = torch.zeros(1, 3, requires_grad=True)
    loss = soft_label_loss(mine, teacher, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3), rel=1e-5)
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, torch.tensor([[1 / 3 - 0.75, 1 / 3 - 0.25, 1 / 3]]))
    half = calibrated_temperature(torch.tensor([[math.log(3), 0.0, -60.0]]) / 2, teacher, torch.tensor(1.0), CALIBRATED)
    assert float(half) == pytest.approx(0.5)


def test_constant_temperatures_are_numbers() -> None:
    assert temperatures_of(protocol_config()) is None
    assert temperatures_of(protocol_config(temperature_factor=0.5)) is not None


def test_a_student_takes_what_fitted_the_last_batch() -> None:
    """Its first epoch is at 1; afterwards it is what the last batch of the epoch before would have liked."""
    labels = soft_labels()
    items = [SoftLabelDataset(labels)[index] for index in range(3)]
    # The teacher itself, half as sure.
    network = trainable(seed=9)
    network[-1].weight.data.mul_(0.5)
    network[-1].bias.data.mul_(0.5)
    module = student(network, labels, **LPQLD, temperature=1.0, temperature_epochs=2, temperature_least=0.5)
    assert module.temperatures is not None
    module.temperatures.begin(0)
    assert (float(module.temperatures.teachers), float(module.temperatures.student)) == (1.0, 1.0)
    for item in items:
        assert float(module.temperatures.student) == 1.0
        module.training_step(item, 0)
    fitted = float(module.temperatures.following)
    assert fitted == pytest.approx(0.5, abs=0.15)
    module.temperatures.begin(1)
    assert float(module.temperatures.teachers) == pytest.approx(0.7)
    assert float(module.temperatures.student) == pytest.approx(fitted)


@pytest.mark.parametrize("changes", [LPQLD, {"temperature_factor": 0.7, "temperature_squared": True}])
@pytest.mark.parametrize("stop", [3, 6])
def test_it_goes_on_at_the_temperature_that_it_had(changes: dict[str, Any], stop: int, tmp_path: Path) -> None:
    """Recorded or not, whole or interrupted, it is the same training."""
    more = {**changes, "temperature_epochs": 2, "temperature_least": 1.0}
    accumulation = more.pop("accumulation", 2)
    curves = []
    for record in (False, True):
        module, loader = student_of(accumulation, "cpu", Passes(record=record), trainable(), **more)
        assert isinstance(module, RecordedStudent) == record
        fit(module, loader, 8, "cpu")
        curves.append(module.curve)
    assert curves[0] == curves[1]
    begun, loader = student_of(accumulation, "cpu", Passes(), trainable(), **more)
    trainer = quiet_trainer(stop, loader, "cpu")
    trainer.fit(begun, loader)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    other, loader = student_of(accumulation, "cpu", Passes(), trainable(seed=5), **more)
    loader.sampler.set_epoch(stop)
    quiet_trainer(8, loader, "cpu").fit(other, loader, ckpt_path=str(tmp_path / "begun.ckpt"), weights_only=True)
    assert other.curve == curves[0]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("protocol.temperature_epochs=10", "set protocol.temperature_epochs=30, or a protocol.temperature_factor"),
        ("protocol.temperature_least=1", "set protocol.temperature_least=2.0, or a protocol.temperature_factor"),
        ("protocol.temperature=1 protocol.temperature_factor=0.5", "at most protocol.temperature=1.0"),
        ("protocol.student_temperature=calibrated", "set protocol.accumulation=1, or"),
        ("label.rest=nothing", "set label.rest=mean, or a label.top"),
        ("label.top=3 label.rest=nothing protocol.loss=mse", "set label.rest=mean, or protocol.loss=kl"),
    ],
)
def test_what_would_do_nothing_is_refused(typed: str, said: str, compose: Compose) -> None:
    with pytest.raises(ConfigError) as refused:
        compose("evaluate", *typed.split())
    assert said in str(refused.value)


@pytest.mark.parametrize("more", [(), ("debug=smoke",), ("compare=dd_ranking",)])
def test_the_published_recipe_goes_with_the_rest(more: tuple[str, ...], compose: Compose) -> None:
    config = compose("evaluate", "label=lpqld", "protocol=lpqld", "label.keep=0.1", *more)
    assert (config.label.top, config.label.rest, config.label.batch_size) == (100, "nothing", 128)
    assert (config.protocol.temperature, config.protocol.temperature_factor) == (20, 0.7)
