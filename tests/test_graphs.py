"""Steps that are recorded as CUDA graphs do what the same steps do without.

What is recorded is tested everywhere, called as it is; that a GPU replays it, on a simulated one where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import (
    MEAN,
    STD,
    label_config,
    method_config,
    protocol_config,
    quiet_trainer,
    random_pixels,
    small_network,
    training_arguments,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth

from cvdd.computing.automatic import records
from cvdd.computing.compiler import compiling
from cvdd.computing.graphs import Recorded, draws_by_itself
from cvdd.computing.passes import Passes
from cvdd.labels.batches import EpochSampler, SoftLabelDataset
from cvdd.labels.sources import ComputedLabels
from cvdd.labels.teachers import Teachers
from cvdd.schema import RecipeConfig
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.engine import Engine, iteration_can_be_recorded, ready_voter
from cvdd.synthesis.units import Stage, Unit, unit_views
from cvdd.training.classifier import Positions, ShuffledBatches
from cvdd.training.member import MemberModule
from cvdd.training.recorded_student import RecordedStudent, make_student_module, steps_can_be_recorded
from cvdd.training.student import StudentModule

CPU = torch.device("cpu")
with_real_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def fit(module: pl.LightningModule, loader: DataLoader[Any] | None, epochs: int, device: str) -> None:
    quiet_trainer(epochs, loader, device).fit(module, loader)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("cvdd")]


# --- the choice -------------------------------------------------------------------------------------------------------


def test_steps_are_recorded_on_gpus_alone() -> None:
    gpu = torch.device("cuda")
    assert [records(wanted, gpu) for wanted in ("auto", True, False)] == [True, True, False]
    assert not records("auto", CPU)
    with pytest.raises(ConfigError, match="engine.cuda_graphs=auto"):
        records(True, CPU)


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"turns": "sampled"}, False),
        ({"statistics": {"momentum": 0.5}}, False),
        ({"density": 1.0, "composer": "classes"}, False),
        ({}, True),
    ],
)
def test_what_differs_from_iteration_to_iteration_is_not_recorded(changes: dict[str, Any], split: bool) -> None:
    assert iteration_can_be_recorded(method_config(), False)
    assert not iteration_can_be_recorded(method_config(**changes), split)


def test_recording_does_not_change_what_is_made() -> None:
    assert Engine(record=True).identity == {}
    assert Engine(True, record=True).identity == Engine(True).identity
    assert Passes(record=True).identity == {}


@pytest.mark.parametrize(("rate", "drawn"), [(0.0, False), (0.2, True)])
def test_networks_with_dropout_draw(rate: float, drawn: bool) -> None:
    assert draws_by_itself(small_network(dropout=rate)) is drawn
    assert draws_by_itself(nn.Sequential(StochasticDepth(rate, "row"))) is drawn


# --- images -----------------------------------------------------------------------------------------------------------


class _Unrecorded(DistillModule):
    """Calls what is recorded on a GPU, on any device."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._recorded = self._all_of_iteration


def distilled(
    kind: type[DistillModule], device: str, record: bool = False, views: bool = True, engine: Engine | None = None
) -> DistillModule:
    engine = engine or Engine()
    method = method_config(iterations=12, log_every=3, checkpoint_every=6, grid_every=12)
    units, stage = [Unit(slot, 0, 0, 4) for slot in range(3)], Stage(0, 0, 12, 12)
    networks = [small_network(seed=seed).to(device) for seed in (1, 2)]
    module = kind(
        torch.randn(3, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0)),
        torch.stack([unit.targets for unit in units]),
        [unit_views(unit, method, stage) for unit in units] if views else None,
        [ready_voter(str(index), network, 1.0, engine) for index, network in enumerate(networks)],
        torch.tensor([[0.7], [0.3]]).expand(2, 3),
        method,
        (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)),
        lambda row, images: None,
        stage,
        units_per_pass=2,
        opinion=engine.opinion,
        record=record,
    )
    with compiling(engine.compile):
        fit(module, None, module.epochs, device)
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("views", [True, False])
def test_a_recorded_iteration_is_an_iteration(device: str, views: bool) -> None:
    plain = distilled(DistillModule, device, views=views)
    other = distilled(_Unrecorded, device, views=views)
    assert len(plain.rows) == 4
    assert plain.rows[0].agreement
    assert other.rows == plain.rows
    assert torch.equal(other.images, plain.images)


@pytest.mark.gpu
@pytest.mark.parametrize("views", [True, False])
def test_a_gpu_replays_iterations(views: bool, caplog: pytest.LogCaptureFixture) -> None:
    plain = distilled(DistillModule, "cuda", views=views)
    replayed = distilled(DistillModule, "cuda", record=True, views=views)
    assert not warnings_of(caplog)
    assert replayed.rows == plain.rows
    assert torch.equal(replayed.images, plain.images)


@with_real_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_replays_compiled_iterations(precision: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = distilled(DistillModule, "cuda")
    replayed = distilled(DistillModule, "cuda", record=True, engine=Engine(True, precision))
    assert not warnings_of(caplog)
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for one, other in zip(replayed.rows, plain.rows, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerance)


# --- students and members ---------------------------------------------------------------------------------------------


def trainable(**options: Any) -> nn.Module:
    return small_network(**options).train().requires_grad_(True)


def labels_of(device: str) -> ComputedLabels:
    label = label_config(batch_size=8, dtype="float32", epochs=8)
    teachers = Teachers([small_network(seed=9)], [1.0], label).to(torch.device(device))
    return ComputedLabels(teachers, random_pixels(20).to(device), label, 0, MEAN, STD)


def recordings_at_the_end(kind: type[Any], name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count what modules of a kind have recorded before they let go of it."""
    counts: list[int] = []
    end = kind.on_fit_end

    def counted(module: Any) -> None:
        counts.append(len(getattr(module, name)._recordings))
        end(module)
        assert not isinstance(getattr(module, name), Recorded)

    monkeypatch.setattr(kind, "on_fit_end", counted)
    return counts


def student_of(
    accumulation: int, device: str, passes: Passes, network: nn.Module, **changes: Any
) -> tuple[StudentModule, DataLoader[Any]]:
    protocol = protocol_config(accumulation=accumulation, ema=0.9, epochs=8, **changes)
    dataset = SoftLabelDataset(labels_of(device), torch.device(device))
    return make_student_module(
        protocol,
        dataset,
        random_pixels(20),
        torch.arange(20) % 4,
        MEAN,
        STD,
        passes,
        looks=False,
        shared=False,
        **training_arguments(network),
    )


def state_of(module: StudentModule) -> dict[str, Tensor]:
    assert module.average is not None
    averaged = {f"average.{key}": value for key, value in module.average.named_parameters()}
    return dict(module.network.state_dict()) | averaged


def train_student(
    accumulation: int, device: str, passes: Passes, network: nn.Module | None = None, **changes: Any
) -> tuple[StudentModule, dict[str, Tensor]]:
    module, loader = student_of(accumulation, device, passes, network or trainable(), **changes)
    fit(module, loader, 8, device)
    return module, state_of(module)


def member(accumulation: int, crop: str, passes: Passes) -> MemberModule:
    recipe = RecipeConfig.model_validate(
        {
            "name": "test",
            "epochs": 6,
            "batch_size": 8,
            "optimizer": "sgd",
            "lr": 0.05,
            "schedule": "onecycle",
            "accumulation": accumulation,
            "crop": crop,
            **({"pad": 2} if crop == "pad" else {}),
        }
    )
    network, labels = trainable(), torch.arange(4).repeat(6)[:22]
    return MemberModule(recipe, random_pixels(22), labels, MEAN, STD, 16, passes, **training_arguments(network))


def train_member(module: MemberModule, device: str) -> dict[str, Tensor]:
    loader: DataLoader[Any] = DataLoader(Positions(), sampler=ShuffledBatches(22, 8, seed=0), batch_size=None)
    fit(module, loader, 6, device)
    return dict(module.network.state_dict())


def unrecorded(module: Any, divided: bool) -> Any:
    """Let a module call what is recorded on a GPU, on any device."""
    start: Callable[[], None] = module.on_fit_start

    def begin() -> None:
        start()
        module._recorded = module.loss_and_gradient(module._losses_of, divided)

    module.on_fit_start = begin
    return module


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_recorded_student_learns_the_same(accumulation: int) -> None:
    """On any device: without a GPU its steps are called as they are."""
    plain, expected = train_student(accumulation, "cpu", Passes())
    other, found = train_student(accumulation, "cpu", Passes(record=True))
    assert [type(module) for module in (plain, other)] == [StudentModule, RecordedStudent]
    assert other.curve == plain.curve
    same(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [False, True])
def test_a_student_that_goes_on_recorded_or_not_learns_the_same(device: str, first: bool, tmp_path: Path) -> None:
    _, expected = train_student(2, device, Passes(record=first))
    begun, loader = student_of(2, device, Passes(record=first), trainable())
    trainer = quiet_trainer(3, loader, device)
    trainer.fit(begun, loader)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    other, loader = student_of(2, device, Passes(record=not first), trainable(seed=5))
    assert type(begun) is not type(other)
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(3)
    quiet_trainer(8, loader, device).fit(other, loader, ckpt_path=str(tmp_path / "begun.ckpt"), weights_only=True)
    found = state_of(other)
    if device == "cpu":
        same(found, expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_replays_students(
    optimizer: str, accumulation: int, precision: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings, passes = recordings_at_the_end(RecordedStudent, "_step", monkeypatch), Passes(False, precision, True)
    with monkeypatch.context() as patched:
        patched.setattr(Recorded, "__call__", lambda self, *arguments: self._function(*arguments))
        _, expected = train_student(accumulation, "cuda", passes, optimizer=optimizer)
    _, found = train_student(accumulation, "cuda", passes, optimizer=optimizer)
    assert recordings == [0, 2]
    assert not warnings_of(caplog)
    # Muon's steps are worked out in half precision, whatever the network computes in.
    tolerance = 1e-4 if (precision, optimizer) == ("fp32", "adamw") else 2e-2
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(
    ("changes", "rate", "looks", "possible"),
    [
        ({}, 0.0, False, True),
        ({}, 0.5, False, True),
        ({"accumulation": 2}, 0.0, False, True),
        ({"accumulation": 2}, 0.5, False, False),
        ({"optimizer": "sgd"}, 0.0, False, False),
        ({"optimizer": "muon"}, 0.0, False, True),
        ({}, 0.0, True, False),
    ],
)
def test_which_students_are_recorded(changes: dict[str, Any], rate: float, looks: bool, possible: bool) -> None:
    protocol = protocol_config(**{"accumulation": 1, **changes})
    assert steps_can_be_recorded(protocol, looks, trainable(dropout=rate), Passes(record=True)) is possible
    assert not steps_can_be_recorded(protocol, looks, trainable(dropout=rate), Passes())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_recorded_step_of_a_member_is_a_step(device: str, crop: str, accumulation: int) -> None:
    plain = train_member(member(accumulation, crop, Passes()), device)
    other = train_member(unrecorded(member(accumulation, crop, Passes()), accumulation > 1), device)
    same(other, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("crop", ["pad", "resized"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gpu_replays_members(
    crop: str, accumulation: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_member(member(accumulation, crop, Passes()), "cuda")
    recordings = recordings_at_the_end(MemberModule, "_recorded", monkeypatch)
    replayed = train_member(member(accumulation, crop, Passes(record=True)), "cuda")
    assert recordings[0] > 0
    assert not warnings_of(caplog)
    same(replayed, plain)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bn_mode", ["batch", "running"])
def test_a_gpu_replays_labels(bn_mode: str, caplog: pytest.LogCaptureFixture) -> None:
    label = label_config(batch_size=8, dtype="float32", epochs=6, bn_mode=bn_mode)
    made = []
    for record in (False, True):
        networks = [small_network(seed=seed) for seed in (3, 4)]
        teachers = Teachers(networks, [0.6, 0.4], label, Passes(record=record)).to(torch.device("cuda"))
        labels = ComputedLabels(teachers, random_pixels(20).cuda(), label, 0, MEAN, STD)
        made.append(torch.stack([labels.epoch(epoch)[1] for epoch in range(6)]))
    assert not warnings_of(caplog)
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=0)
