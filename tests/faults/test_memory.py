"""A member whose loss is not a number, and too little memory: named with what to change, and nothing is lost."""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from commands import Reference
from helpers import PRIORS, tiny_context
from test_interruption import PulledPlug, stop_at

import cvdd.chain.fitting
import cvdd.computing.footprint
import cvdd.labels.sources
import cvdd.synthesis.engine
import cvdd.training.fit
from cvdd.chain.compare import compare, distil
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.members import make_member
from cvdd.chain.unit_files import load_images
from cvdd.labels.teachers import Teachers
from cvdd.support.memory import OutOfMemory, enough_memory
from cvdd.support.outcome import USER_ERROR, PointFailed, told
from cvdd.synthesis.distill_module import DistillModule
from cvdd.training.classifier import Classifier, NonFiniteTraining

pytest_plugins = ["faults_fixtures"]
pytestmark = pytest.mark.faults

ON_A_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.00 GiB"
ON_THE_CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096000000 bytes. Error code 12 (Cannot allocate memory)"
)


def context_of(home: Path, *overrides: str) -> Context:
    return tiny_context(home, *overrides, store=home / "store")


def short_of_memory(patched: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: Exception) -> None:
    """Raise an error at the given call of a function, as PyTorch does."""

    def raising() -> NoReturn:
        raise error

    class Short(Exception):
        def __new__(cls) -> NoReturn:
            raising()

    stop_at(patched, owner, name, call, Short)


def little_memory(patched: pytest.MonkeyPatch, free: float) -> None:
    for module in (cvdd.computing.footprint, cvdd.chain.fitting):
        patched.setattr(module, "free_memory", lambda device: free)


def test_a_member_whose_loss_is_not_a_number(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second epoch: the first is kept, and the repeated command goes on from it."""
    home = reference.copy(tmp_path, "members", "patches", "images", "labels", "students")
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    note, epochs = Classifier._note, list[int]()

    def watched(self: Classifier, loss: torch.Tensor) -> torch.Tensor:
        epochs.append(self.current_epoch)
        return note(self, loss)

    def broken(self: Classifier, loss: torch.Tensor) -> torch.Tensor:
        return note(self, loss * (float("nan") if self.current_epoch else 1.0))

    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "_note", broken)
        with pytest.raises(NonFiniteTraining, match=r"train loss of member resnet18 is nan in epoch 2.*recipe\.lr"):
            make_member(context_of(home), "resnet18")
    monkeypatch.setattr(Classifier, "_note", watched)
    member = make_member(context_of(home), "resnet18")
    assert set(epochs) == {1}
    files, metrics = reference.made[f"members/{member.path.name}"]
    assert (member.manifest["files"], member.metrics) == (files, metrics)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(ON_A_GPU), RuntimeError(ON_THE_CPU)], ids=["gpu", "cpu"])
def test_too_little_memory_for_the_images(
    error: Exception, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = reference.copy(tmp_path, "images", "labels", "students")
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    # Two iterations are a step of Lightning, and three of those a stack; the second stack has made one of them.
    with monkeypatch.context() as patched:
        short_of_memory(patched, DistillModule, "training_step", 5, error)
        with pytest.raises(
            OutOfMemory, match=r"stack 1 of the images .*a unit of 10 images .*lower method\.classes_per_unit"
        ):
            make_images(context_of(home), PRIORS)
    (unit,) = (home / "store").glob("images/.partial/*/units/*.safetensors")
    finished = unit.stat().st_mtime_ns
    make_images(context_of(home), PRIORS)
    (sealed,) = (home / "store").glob(f"images/*/units/{unit.name}")
    assert sealed.stat().st_mtime_ns == finished
    reference.require_same(home, ("images",))


def test_units_that_share_a_forward_pass_become_fewer(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All three members vote, so that both units are one stack; the manifest says what became of it."""
    whole = make_images(context_of(reference.copy(tmp_path / "enough"), "committee.size=3"), PRIORS)
    home = reference.copy(tmp_path / "short")
    with monkeypatch.context() as patched:
        short_of_memory(patched, DistillModule, "training_step", 1, torch.OutOfMemoryError(ON_A_GPU))
        made = make_images(context_of(home, "committee.size=3"), PRIORS)
    assert "going on with 1 units in a pass" in caplog.text
    assert made.metrics == {**whole.metrics, "units_per_pass_for_lack_of_memory": 1}
    assert made.path.name == whole.path.name
    difference = (load_images(made)[0].float() - load_images(whole)[0].float()).abs()
    assert float(difference.mean()) < 0.05


def test_members_that_judge_side_by_side_do_so_one_after_the_other(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As they are recorded on a GPU; a unit cannot be halved."""
    home = reference.copy(tmp_path, "images", "labels", "students")
    with monkeypatch.context() as patched:
        patched.setattr(cvdd.synthesis.engine, "records", lambda wanted, device: True)
        short_of_memory(patched, DistillModule, "training_step", 1, torch.OutOfMemoryError(ON_A_GPU))
        made = make_images(context_of(home), PRIORS)
    assert caplog.text.count("going on with 1 units in a pass and members one after the other") == 1
    assert made.metrics["units_per_pass_for_lack_of_memory"] == 1
    assert made.metrics["stacks"] > 1
    monkeypatch.setattr(cvdd.synthesis.engine, "records", lambda wanted, device: False)
    assert make_images(context_of(home), PRIORS).path == made.path


def test_units_are_as_many_as_fit(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Known before the first iteration, written down, and kept when there is more memory again."""
    home = reference.copy(tmp_path, "images", "labels", "students")
    with monkeypatch.context() as patched:
        little_memory(patched, 1e6)
        stop_at(patched, DistillModule, "training_step", 2, PulledPlug)
        with pytest.raises(PulledPlug):
            make_images(context_of(home, "committee.size=3"), PRIORS)
    assert "units of 10 images in a pass would take about" in caplog.text
    assert "going on with 1 in a pass" in caplog.text
    made = make_images(context_of(home, "committee.size=3"), PRIORS)
    assert made.metrics["units_per_pass_for_lack_of_memory"] == 1


def test_enough_memory_changes_nothing(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted, and found to fit; or not even counted, because units in a pass were given."""
    home = reference.copy(tmp_path, "images", "labels", "students")
    little_memory(monkeypatch, 40e9)
    monkeypatch.setattr(cvdd.computing.footprint, "BYTES_PER_PIXEL", 1e9)
    make_images(context_of(home), PRIORS)
    reference.require_same(home, ("images",))
    little_memory(monkeypatch, 1e6)
    made = make_images(context_of(home, "committee.size=3", "engine.units_per_pass=2"), PRIORS)
    assert "units_per_pass_for_lack_of_memory" not in made.metrics
    assert "of memory are free" not in caplog.text


def test_label_batches_that_share_a_forward_pass_become_fewer(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = reference.copy(tmp_path, "labels", "students")
    whole = reference.copy(tmp_path / "enough")
    with monkeypatch.context() as patched:
        short_of_memory(patched, Teachers, "score", 1, torch.OutOfMemoryError(ON_A_GPU))
        made = distil(context_of(home), "cvdd").labels.artifact
    assert "going on with 16 label batches in a forward pass" in caplog.text
    expected = distil(context_of(whole), "cvdd").labels.artifact
    assert made is not None
    assert expected is not None
    assert made.metrics == {**expected.metrics, "stack_for_lack_of_memory": 16}
    assert made.path.name == expected.path.name
    one, other = (np.fromfile(labels.path / "logits.bin", np.float16) for labels in (made, expected))
    np.testing.assert_allclose(one, other, rtol=0.01, atol=0.01)


def test_label_batches_are_as_many_as_fit(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = reference.copy(tmp_path, "labels", "students")
    little_memory(monkeypatch, 1e6)
    made = distil(context_of(home), "cvdd").labels.artifact
    assert made is not None
    assert made.metrics["stack_for_lack_of_memory"] == 1
    assert "label.stack=32 would take about" in caplog.text


def test_too_little_memory_for_labels_and_networks(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = reference.copy(tmp_path, "labels", "students")
    with monkeypatch.context() as patched:
        short_of_memory(patched, cvdd.labels.sources.ComputedLabels, "epoch", 2, torch.OutOfMemoryError(ON_A_GPU))
        with pytest.raises(OutOfMemory, match=r"Lower label\.stack=32.*label\.batch_size=8"):
            distil(context_of(home), "cvdd")
    with monkeypatch.context() as patched:
        short_of_memory(patched, Classifier, "on_train_epoch_start", 2, RuntimeError(ON_THE_CPU))
        with pytest.raises(OutOfMemory, match=r"Raise protocol\.accumulation=2.*protocol\.eval_batch=\d+"):
            compare(context_of(home))
    compare(context_of(home))
    reference.require_same(home)


def test_too_little_memory_for_a_member(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = reference.copy(tmp_path, "members", "patches", "images", "labels", "students")
    recipe = r"training resnet18 .*Raise recipe\.accumulation=1.*recipe\.batch_size=50"
    with monkeypatch.context() as patched:
        short_of_memory(patched, Classifier, "on_train_epoch_start", 1, RuntimeError(ON_THE_CPU))
        with pytest.raises(OutOfMemory, match=recipe):
            make_member(context_of(home), "resnet18")
    member = make_member(context_of(home), "resnet18")
    assert (member.manifest["files"], member.metrics) == reference.made[f"members/{member.path.name}"]


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), enough_memory("a step", "Do less"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError(ON_THE_CPU), r"out of memory .*method\.units_per_stack, label\.stack.*the same command goes on"),
        (MemoryError(), r"out of memory \(no more memory\)"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/metrics.csv"),
            r"for out/metrics\.csv.*paths\.output=DIR",
        ),
    ],
)
def test_what_the_machine_refuses_elsewhere(error: Exception, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped, told(sweeping=False):
        raise error
    assert stopped.value.code == USER_ERROR
    (record,) = caplog.records
    assert re.search(message, record.getMessage())
    assert record.levelno == logging.ERROR
    with pytest.raises(PointFailed, match=message), told(sweeping=True):
        raise error
