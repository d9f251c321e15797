"""The whole chain on a GPU, or on a simulated one where there is none.

A simulated one computes with the CPU's kernels, so that only what lies otherwise in memory is rounded otherwise.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_context
from mtt_helpers import mtt_context
from simulated_gpu import simulated_gpu
from simulated_tensors import Device
from test_interruption import PulledPlug, epochs_begun, stop_at
from test_label_phases import FEW_LABELS
from torch import Tensor, nn

import cvdd.chain.retrieval
from cvdd.chain.compare import Distilled, Result, compare, distil
from cvdd.chain.context import Context
from cvdd.chain.training import load_curve
from cvdd.chain.unit_files import load_images
from cvdd.cost import show_cost
from cvdd.training.classifier import Classifier
from cvdd.verbs import VERBS

pytest_plugins = ["chain_fixtures"]

GPU = torch.device("cuda", 0)
METHODS = {
    "sre2l": ("label=sre2l", "protocol=sre2l"),
    "cda": (),
    "rded": ("patches=easy", "label=rded", "protocol=rded", "method.iterations=0"),
    "gvbsm": ("method.crop_scale=null",),
    "edc": ("label=edc", "protocol=edc"),
    "lpld": ("label=lpld", "protocol=lpld", "label.keep=0.5"),
    "fadrm": ("label=fadrm",),
    "fadrm_drc": ("label=fadrm",),
    "delt": ("label=delt", "label.store=logits", "method.classes_per_unit=5", "method.stages=3"),
    "fadrm_plus": ("method.voters=[resnet18,shufflenetv2]",),
    "psm": ("label=fadrm",),
    "cim": ("method.crop_scale=null", "protocol.loss=mse", "label.dsa=true", "label.store=none"),
    "sampled_residual": (),
    "full": ("method.iterations=0",),
}
"""What goes with each in a tiny run, of its own labels and students where they fit."""


LPQLD = (
    "protocol.temperature_factor=0.7",
    "protocol.temperature_epochs=2",
    "protocol.student_temperature=calibrated",
)


@pytest.fixture
def simulated() -> Iterator[Device]:
    with simulated_gpu() as gpu:
        yield gpu


def on_gpu(root: Path, *overrides: str) -> Context:
    context = tiny_context(root, "trainer.accelerator=auto", "engine.precision=fp32", *overrides)
    return replace(context, device=GPU)


@pytest.fixture
def of_the_cpu(made: tuple[Distilled, Result], chain_home: Path, tmp_path: Path) -> Callable[..., Path]:
    """A place with a store that holds some of what the chain made on the CPU."""

    def bring(*kinds: str) -> Path:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        for kind in kinds:
            shutil.copytree(chain_home / "store" / kind, tmp_path / "store" / kind)
        return tmp_path

    return bring


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    warned = [record for record in caplog.records if record.name.startswith("cvdd") and record.levelno > logging.INFO]
    return [record.getMessage() for record in warned]


def difference(one: Distilled, other: Distilled) -> float:
    """Mean distance of the pixels of two sets, of 255."""
    first, second = (load_images(made.images)[0].float() for made in (one, other))
    return float((first - second).abs().mean())


@pytest.mark.gpu
def test_the_verbs_run_on_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = on_gpu(tmp_path, "compare=random_real")
    for verb in ("train", "distill", "relabel", "evaluate"):
        VERBS[verb](context, [])
    assert warnings_of(caplog) == []
    assert (context.config.paths.output / "report.html").is_file()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_on_a_gpu(
    method: str, of_the_cpu: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """With half precision where a GPU has it."""
    root = of_the_cpu("data", "members")
    settings = ("method.iterations=4", *METHODS[method], "engine.precision=auto", "protocol.epochs=2")
    context = on_gpu(root, f"method={method}", *settings)
    compare(context)
    assert warnings_of(caplog) == []


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), LPQLD])
def test_hard_and_soft_epochs_are_recorded(
    more: tuple[str, ...], of_the_cpu: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A step with classes and one with logits are two recordings; losses are those of a CPU."""
    losses = {}
    for place in (on_gpu, tiny_context):
        root = of_the_cpu("data", "members", "patches", "images")
        _, results = compare(place(root, *FEW_LABELS, "protocol.accumulation=1", *more))
        losses[place] = [row["train_loss"] for row in load_curve(results[0].students[0])]
    assert warnings_of(caplog) == []
    assert losses[on_gpu] == pytest.approx(losses[tiny_context], rel=0.1)
    assert min(losses[on_gpu][2:6]) > 10 * max(losses[on_gpu][:2] + losses[on_gpu][6:])


@pytest.mark.gpu
@pytest.mark.slow
def test_trajectories_are_matched_on_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compare(replace(mtt_context(tmp_path, "trainer.accelerator=auto"), device=GPU))
    assert warnings_of(caplog) == []


def test_a_gpu_makes_what_a_cpu_makes(
    made: tuple[Distilled, Result],
    of_the_cpu: Callable[..., Path],
    simulated: Device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the same members the same images, labels and students; their steps are recorded and replayed."""
    (distilled,), (result,) = compare(on_gpu(of_the_cpu("data", "members", "patches")))
    assert difference(distilled, made[0]) < 0.01
    assert result.summary()["loss"] == pytest.approx(made[1].summary()["loss"], abs=1e-3)
    assert warnings_of(caplog) == []
    assert simulated.recorded >= 4
    assert simulated.replayed >= 12


CIM = (
    "method=cim",
    "method.voters=[resnet18,shufflenetv2]",
    "method.crop_scale=null",
    "method.lr=0.04",
    "method.ce=0",
    "method.r_bn=0",
)


def test_steps_with_dsa_are_recorded(of_the_cpu: Callable[..., Path], simulated: Device) -> None:
    """Nothing of a view's changes waits for the device; losses are those of a CPU."""
    losses = {}
    for place in (tiny_context, on_gpu):
        root = of_the_cpu("data", "members", "patches", "images")
        _, results = compare(place(root, "label.dsa=true", "label.store=none", "protocol.loss=mse"))
        losses[place] = [row["train_loss"] for row in load_curve(results[0].students[0])]
    assert losses[on_gpu] == pytest.approx(losses[tiny_context], rel=0.01)
    assert simulated.replayed >= 4


def test_what_fits_is_found_on_a_gpu(
    of_the_cpu: Callable[..., Path], simulated: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The observer looks there too, and real images come back as on a CPU."""
    drc = ("method=fadrm_drc", "method.stages=2", "method.iterations=4", "label.store=none")
    usual = distil(tiny_context(of_the_cpu("data", "members", "patches"), *drc), "")
    shown = load_images(usual.images)[0].float()
    devices, look = set[torch.device](), cvdd.chain.retrieval.head_features

    def noting(network: nn.Module, *arguments: Any) -> Tensor:
        devices.add(next(network.parameters()).device)
        return look(network, *arguments)

    monkeypatch.setattr(cvdd.chain.retrieval, "head_features", noting)
    made = distil(on_gpu(of_the_cpu("data", "members", "patches"), *drc), "")
    assert (load_images(made.images)[0].float() - shown).abs().mean() < 0.01
    assert devices == {GPU}


def test_votes_on_features_are_recorded(of_the_cpu: Callable[..., Path], simulated: Device) -> None:
    """An iteration with anchors on a GPU is that of a CPU, and is replayed, not launched."""
    usual = distil(tiny_context(of_the_cpu("data", "members"), *CIM, "label.store=none"), "")
    shown = load_images(usual.images)[0].float()
    made = distil(on_gpu(of_the_cpu("data", "members"), *CIM, "label.store=none"), "")
    assert (load_images(made.images)[0].float() - shown).abs().mean() < 0.01
    assert simulated.recorded == 1
    assert simulated.replayed >= 2


def test_where_its_memory_ends_passes_are_halved(
    made: tuple[Distilled, Result],
    of_the_cpu: Callable[..., Path],
    simulated: Device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    distil(on_gpu(of_the_cpu("data", "members", "patches")), "")
    simulated.room = simulated.largest - 1
    halved = distil(on_gpu(of_the_cpu("data", "members", "patches")), "")
    assert [warning for warning in warnings_of(caplog) if "memory" in warning]
    assert difference(halved, made[0]) < 0.01


def test_nothing_waits_for_a_gpu_from_log_row_to_log_row(of_the_cpu: Callable[..., Path], simulated: Device) -> None:
    """The processor waits for it as often in 30 iterations as in 10."""

    def waits(iterations: int) -> Counter[str]:
        simulated.waits.clear()
        rare = (f"method.{each}=100" for each in ("log_every", "grid_every", "checkpoint_every"))
        distil(on_gpu(of_the_cpu("data", "members", "patches"), f"method.iterations={iterations}", *rare), "")
        return Counter(simulated.waits)

    assert waits(30) == waits(10)


@pytest.mark.parametrize("recorded", ["auto", "false"])
def test_nothing_waits_for_a_gpu_from_batch_to_batch(
    recorded: str, of_the_cpu: Callable[..., Path], simulated: Device
) -> None:
    """The processor waits as often for epochs of five batches of a student as for epochs of two."""

    def waits(batch_size: int) -> Counter[str]:
        simulated.waits.clear()
        settings = ("label.bn_mode=running", f"label.batch_size={batch_size}", f"engine.cuda_graphs={recorded}")
        compare(on_gpu(of_the_cpu("data", "members", "patches", "images"), *settings))
        return Counter(simulated.waits)

    assert waits(4) == waits(10)


@pytest.mark.parametrize(("begins", "ends"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_student_goes_on_on_another_device(
    begins: str,
    ends: str,
    made: tuple[Distilled, Result],
    of_the_cpu: Callable[..., Path],
    simulated: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = of_the_cpu("data", "members", "patches", "images", "labels")
    places = {"gpu": on_gpu(root), "cpu": tiny_context(root)}
    with monkeypatch.context() as patched:
        stop_at(patched, Classifier, "on_train_epoch_start", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            compare(places[begins])
    begun = epochs_begun(monkeypatch)
    _, (result,) = compare(places[ends])
    assert begun == [2]
    assert result.summary()["loss"] == pytest.approx(made[1].summary()["loss"], abs=1e-3)


@pytest.mark.gpu
def test_a_gpu_is_asked_what_a_run_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_cost(on_gpu(tmp_path).config, GPU)
    assert "images" in capsys.readouterr().out
