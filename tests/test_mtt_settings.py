"""What the networks of trajectory matching are told, and which snapshots are asked for; nothing is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import with_source
from mtt_helpers import mtt_context

from cvdd.artifact import Artifact
from cvdd.chain.context import Context
from cvdd.chain.mtt import _start, make_mtt_images, make_mtt_student
from cvdd.chain.space import input_space, whitening_of
from cvdd.chain.trajectories import flat_network, make_trajectories, mtt_of, open_trajectories
from cvdd.data import FileSource
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.trajectories import TrajectoryLayout, TrajectoryWriter
from cvdd.training.sgd_training import SgdModule, SgdRecipe

PLAIN = ("method.mtt.whitening=false",)


class PulledPlug(Exception):
    pass


def told(monkeypatch: pytest.MonkeyPatch, module: str, make: Callable[[], Any]) -> tuple[SgdRecipe, int | None]:
    """What a training is told of SGD and of the epoch at which its momentum is forgotten; it does not begin."""
    bound = inspect.signature(SgdModule).bind
    found: list[tuple[SgdRecipe, int | None]] = []

    def noting(*arguments: Any, **keywords: Any) -> None:
        given = bound(*arguments, **keywords).arguments
        found.append((given["sgd"], given.get("forgets_at")))
        raise PulledPlug

    monkeypatch.setattr(f"cvdd.chain.{module}.SgdModule", noting)
    with pytest.raises(PulledPlug):
        make()
    return found[0]


@pytest.mark.parametrize(("drop", "student", "expert"), [(True, 5, 6), (False, None, None)])
def test_networks_are_trained_as_their_settings_say(
    drop: bool, student: int | None, expert: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight epochs students count the middle from the last one's number, 7, and experts from 8."""
    sgd = {"epochs": 8, "lr": 0.03, "momentum": 0.3, "weight_decay": 0.02, "drop": drop}
    parts = [f"method.mtt.{part}.{name}={value}" for part in ("student", "experts") for name, value in sgd.items()]
    context = mtt_context(tmp_path, *PLAIN, *parts)
    images = make_mtt_images(mtt_context(tmp_path, *PLAIN, "method.iterations=0"))
    student_of = partial(make_mtt_student, context, images, "convnet", mtt_of(context).experts.backbone, 0)
    assert told(monkeypatch, "mtt", student_of) == (SgdRecipe(**sgd, counts_from_zero=True), student)
    assert told(monkeypatch, "trajectories", partial(make_trajectories, context)) == (SgdRecipe(**sgd), expert)


def drawn_trajectories(folder: Path, context: Context) -> tuple[Artifact, torch.Tensor]:
    """Write random snapshots of one expert; return them too."""
    snapshots = 0.2 * torch.randn(5, flat_network(context).size, generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    layout = TrajectoryLayout(1, *snapshots.shape, "float32")
    layout.save(folder)
    writer = TrajectoryWriter(folder, layout, 0)
    for number, snapshot in enumerate(snapshots):
        writer.write(number, snapshot)
    writer.finish()
    return Artifact(folder, {}), snapshots


def test_labels_start_as_an_expert_of_all_epochs_sees_the_images(tmp_path: Path) -> None:
    learned = ("labels=learned", "lr_labels=0.1", "labels_start=expert")
    context = mtt_context(tmp_path, *PLAIN, *(f"method.mtt.{field}" for field in learned))
    trajectories, snapshots = drawn_trajectories(tmp_path / "drawn", context)
    images, targets = _start(context, input_space(context, None), trajectories)
    with torch.no_grad():
        expected = flat_network(context)(snapshots[-1], images).softmax(dim=1)
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-6)


def test_experts_of_another_network_are_refused(tmp_path: Path) -> None:
    trajectories, snapshots = drawn_trajectories(tmp_path / "drawn", mtt_context(tmp_path, *PLAIN))
    wider = mtt_context(tmp_path, *PLAIN, "method.mtt.experts.backbone.arguments.width=5")
    size = flat_network(wider).size
    message = rf"holds networks of {snapshots.shape[1]} parameters, and method\.mtt\.experts\.backbone has {size}"
    with pytest.raises(ConfigError, match=message):
        open_trajectories(wider, trajectories)


def test_images_that_are_not_in_memory_are_not_whitened(tmp_path: Path) -> None:
    whitened, plain = mtt_context(tmp_path), mtt_context(tmp_path, *PLAIN)
    train = whitened.data().train
    files = FileSource(tmp_path, [f"{index}.png" for index in range(len(train))], train.labels, train.groups)
    with pytest.raises(ConfigError, match=r"out of reach; set method\.mtt\.whitening=false$"):
        whitening_of(with_source(whitened, files))
    assert whitening_of(with_source(plain, files)) is None
