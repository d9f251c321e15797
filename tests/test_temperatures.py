"""Temperatures that fall from epoch to epoch, and one that fits the student (LPQLD)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from helpers import MEAN, STD, protocol_config, quiet_trainer, random_pixels
from test_graphs import fit, student_of
from test_student import SIZE, soft_labels, student, trainable

from cvdd.computing.passes import Passes
from cvdd.labels.batches import SoftLabelDataset
from cvdd.labels.replay import replay
from cvdd.support.config_base import ConfigError
from cvdd.training.losses import soft_label_loss
from cvdd.training.recorded_student import RecordedStudent
from cvdd.training.schedules import teacher_temperature
from cvdd.training.temperatures import CALIBRATED, Temperatures, calibrated_temperature, temperatures_of

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
    for changes in (
        {"temperature_factor": 0.5, "temperature_epochs": 2},
        {"student_temperature": "calibrated", "accumulation": 1},
    ):
        assert temperatures_of(protocol_config(**changes)) is not None


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


FALLING = {"temperature_factor": 0.7, "temperature": 1.5, "temperature_epochs": 2, "temperature_least": 0.5}
"""Low enough that a student does not always want the highest temperature there is."""


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("student_temperature", ["teachers", "calibrated"])
def test_the_loss_is_that_of_the_epochs_temperatures(student_temperature: str, squared: bool) -> None:
    labels = soft_labels()
    item = SoftLabelDataset(labels)[0]
    changes = {**FALLING, "accumulation": 1, "student_temperature": student_temperature, "temperature_squared": squared}
    module = student(trainable(), labels, **changes)
    assert module.temperatures is not None
    module.temperatures.following.fill_(0.3)
    for epoch, temperature in ((0, 1.5), (1, 1.05), (3, 0.735), (7, 0.5)):
        module.temperatures.begin(epoch)
        own = float(module.temperatures.student)
        assert own == pytest.approx(temperature if student_temperature == "teachers" else own)
        shown = replay(random_pixels(20, SIZE), item.replay, MEAN, STD)
        expected = soft_label_loss(module.network(shown), item.logits, temperature, own).item()
        found = module.training_step(item, 0).item()
        assert found == pytest.approx(expected * (temperature**2 if squared else 1), rel=1e-4)
        with torch.no_grad():
            liked = calibrated_temperature(module.network(shown), item.logits, torch.tensor(temperature), CALIBRATED)
        if student_temperature == "calibrated":
            assert float(module.temperatures.following) == pytest.approx(float(liked), abs=0.011)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("stop", [3, 6])
def test_it_goes_on_at_the_temperature_that_it_had(
    calibrated: bool, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded or not, whole or interrupted, it is the same training, whose temperatures differ from epoch to epoch."""
    changes = {**FALLING, "student_temperature": "calibrated" if calibrated else "teachers"}
    begun_at: list[tuple[float, float]] = []
    begin = Temperatures.begin

    def noting(self: Temperatures, epoch: int) -> None:
        begin(self, epoch)
        begun_at.append((round(float(self.teachers), 4), round(float(self.student), 4)))

    monkeypatch.setattr(Temperatures, "begin", noting)
    curves, passed = [], []
    for record in (False, True):
        module, loader = student_of(1, "cpu", Passes(record=record), trainable(), **changes)
        assert isinstance(module, RecordedStudent) == record
        fit(module, loader, 8, "cpu")
        curves.append(module.curve)
        passed.append(begun_at.copy())
        begun_at.clear()
    assert curves[0] == curves[1]
    assert passed[0] == passed[1]
    assert [teachers for teachers, _ in passed[0]] == [1.5, 1.05, 1.05, 0.735, 0.735, 0.5145, 0.5145, 0.5]
    if calibrated:
        assert len({own for _, own in passed[0]}) > 3
    begun, loader = student_of(1, "cpu", Passes(), trainable(), **changes)
    trainer = quiet_trainer(stop, loader, "cpu")
    trainer.fit(begun, loader)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    other, loader = student_of(1, "cpu", Passes(), trainable(seed=5), **changes)
    loader.sampler.set_epoch(stop)
    quiet_trainer(8, loader, "cpu").fit(other, loader, ckpt_path=str(tmp_path / "begun.ckpt"), weights_only=True)
    assert other.curve == curves[0]
    assert begun_at == passed[0]


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"student_temperature": "calibrated"}])
def test_a_recorded_step_reads_the_temperatures(more: dict[str, Any]) -> None:
    """They lie where they lay when it was recorded."""
    curves = []
    for record in (False, True):
        module, loader = student_of(1, "cuda", Passes(record=record), trainable(), **FALLING, **more)
        fit(module, loader, 8, "cuda")
        curves.append([row["train_loss"] for row in module.curve])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("protocol.temperature_epochs=10", "set protocol.temperature_epochs=30, or a protocol.temperature_factor"),
        ("protocol.temperature_least=1", "set protocol.temperature_least=2.0, or a protocol.temperature_factor"),
        ("protocol.temperature=2 protocol.temperature_factor=0.5", "less than protocol.temperature=2.0"),
        ("protocol.epochs=20 protocol.temperature_factor=0.7", "set protocol.temperature_epochs to at most 20"),
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
