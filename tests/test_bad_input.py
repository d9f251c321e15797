"""What can go wrong in the middle of the chain: the message names it and says what to do, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FIXTURES, PRIORS, TINY, same_files, tiny_context
from torch import Tensor, nn

import cvdd.chain.images
import cvdd.training.fit
from cvdd.artifact import Artifact, DamagedArtifact, Store, StoreError
from cvdd.chain.compare import Distilled, Result, distil
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.labels import make_labels, open_labels
from cvdd.chain.members import _warn_of_chance, load_network, make_member
from cvdd.chain.unit_files import load_history
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import INTERRUPTED
from cvdd.synthesis.distill_module import NonFiniteLoss
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.voting import Voter

pytest_plugins = ["chain_fixtures"]

ROOT = Path(__file__).parents[1]
Made = tuple[Distilled, Result]


# --- images and classes -----------------------------------------------------------------------------------------------


def test_fewer_real_images_than_ipc(chain_home: Path) -> None:
    context = tiny_context(chain_home, "method=random_real", "method.iterations=0", "ipc.images_per_class=31")
    with pytest.raises(ConfigError, match=r"class 0 has 30 images; ipc\.images_per_class=31 needs as many"):
        make_images(context, {})


def test_fewer_candidates_than_patches(chain_home: Path) -> None:
    context = tiny_context(chain_home, "ipc.images_per_class=11")
    with pytest.raises(
        ConfigError,
        match=r"offers 10 candidates for 11 patches.*raise patches\.candidates=10",
    ):
        make_images(context, PRIORS)


def test_a_batch_too_small_for_its_statistics(chain_home: Path, made: Made) -> None:
    context = tiny_context(chain_home, "label.batch_size=6")
    with pytest.raises(
        ConfigError,
        match=r"leaves a last batch of 2 of 20 images.*choose label\.batch_size from 4, 5",
    ):
        make_labels(context, made[0].images, PRIORS)


def changed(artifact: Artifact, **identity: Any) -> Artifact:
    """The same artefact with another identity in its manifest."""
    manifest = dict(artifact.manifest)
    return Artifact(artifact.path, {**manifest, "identity": {**manifest["identity"], **identity}})


def test_a_member_of_classes_in_another_order(chain_home: Path) -> None:
    context = tiny_context(chain_home)
    member = make_member(context, "resnet18")
    classes = ["0", "2", "1", *map(str, range(3, 10))]
    backbone = context.config.committee.members["resnet18"].backbone
    with pytest.raises(ConfigError, match=r"member digits_photo-resnet18.*'1'.*'2'"):
        load_network(context, changed(member, classes=classes), backbone)


def test_labels_of_classes_in_another_order(chain_home: Path, made: Made) -> None:
    labels = changed(made[0].labels.artifact, classes=[*map(str, range(9)), "ten"])
    pixels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"labels digits_photo-cvdd-ipc2.*'9'.*'ten'"):
        open_labels(tiny_context(chain_home), labels, made[0].images, pixels)


def test_labels_made_for_other_images(chain_home: Path, made: Made) -> None:
    context = tiny_context(chain_home, "method=patches", "method.iterations=0")
    other = make_images(context, {})
    pixels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=rf"made for the images {made[0].images.digest}, not for {other.digest}"):
        open_labels(context, made[0].labels.artifact, other, pixels)


# --- members ----------------------------------------------------------------------------------------------------------


def without_batchnorm(chain_home: Path, *overrides: str) -> Context:
    convnet = {
        "name": "plain",
        "target": "cvdd.backbones.convnet.convnet",
        "arguments": {"depth": 2, "width": 8, "norm": "instance"},
    }
    context = tiny_context(chain_home, *overrides)
    return context.differing({"committee.members.resnet50.backbone": convnet}, "")


def test_a_voter_without_batchnorm(chain_home: Path, made: Made) -> None:
    with pytest.raises(ConfigError, match=r"member resnet50 has no BatchNorm layer.*method\.r_bn=0"):
        make_images(without_batchnorm(chain_home), PRIORS)
    history = load_history(make_images(without_batchnorm(chain_home, "method.r_bn=0"), PRIORS))
    assert history["slot0000_block0000"]["rows"][-1]["bn"]["resnet50"] == 0


def test_a_teacher_without_batchnorm(chain_home: Path, made: Made) -> None:
    context = without_batchnorm(chain_home, "label.teachers=[resnet50]")
    with pytest.raises(ConfigError, match=r"member resnet50 has no BatchNorm layer.*label\.bn_mode=running"):
        make_labels(context, made[0].images, PRIORS)
    running = without_batchnorm(chain_home, "label.teachers=[resnet50]", "label.bn_mode=running")
    assert make_labels(running, made[0].images, PRIORS).artifact.bytes > 0


def with_checkpoint(chain_home: Path, checkpoint: Path) -> Context:
    context = tiny_context(chain_home)
    backbone = {
        "name": "shufflenetv2",
        "target": "cvdd.backbones.shufflenet.shufflenet_v2",
        "arguments": {"widths": [48, 96, 192], "blocks": [3, 7, 3], "stem_width": 24, "head_width": 1024},
    }
    member = {"backbone": backbone, "checkpoint": checkpoint, "bn_scale": 1.0}
    return context.differing({"committee.members.shufflenetv2": member}, "")


def test_a_published_checkpoint_becomes_a_member(chain_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = with_checkpoint(chain_home, FIXTURES / "published" / "ShuffleNetV2.pth")
    member = make_member(context, "shufflenetv2")
    network = load_network(context, member, context.config.committee.members["shufflenetv2"].backbone)
    stored = torch.load(FIXTURES / "published" / "ShuffleNetV2.pth", weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())
    # It was trained on nothing like these digits. Of two classes, one that knows nearly all is no suspect.
    _warn_of_chance("x", 97.0, 2)
    assert member.metrics["test_top1"] < 20
    (said,) = [message for message in caplog.messages if "where chance is 10.0 %" in message]
    assert said.startswith("committee.members.shufflenetv2.checkpoint=")


def test_a_checkpoint_that_is_missing_or_damaged(chain_home: Path, tmp_path: Path) -> None:
    path = tmp_path / "ShuffleNetV2.pth"
    with pytest.raises(ConfigError, match=r"committee\.members\.shufflenetv2\.checkpoint=.*there is no such file"):
        make_member(with_checkpoint(chain_home, path), "shufflenetv2")
    path.write_bytes((FIXTURES / "published" / "ShuffleNetV2.pth").read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"ShuffleNetV2\.pth: damaged, truncated"):
        make_member(with_checkpoint(chain_home, path), "shufflenetv2")


class BreaksLater(nn.Module):
    """A network whose logits are not finite from some call on."""

    def __init__(self, network: nn.Module, calls: int) -> None:
        super().__init__()
        self.network, self.left = network, calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return self.network(x) * (1.0 if self.left >= 0 else float("nan"))


def test_a_member_whose_loss_is_not_finite(
    made: Made, again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, what was done is kept, and the same command goes on from there."""
    context = again("images", "labels", "students")
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    original = cvdd.chain.images.load_voter

    def breaking(context: Context, name: str, artifact: Artifact, engine: Engine) -> Voter:
        voter = original(context, name, artifact, engine)
        # One pass an iteration.
        return replace(voter, network=BreaksLater(voter.network, 3)) if name == "shufflenetv2" else voter

    with monkeypatch.context() as patched:
        patched.setattr(cvdd.chain.images, "load_voter", breaking)
        with pytest.raises(NonFiniteLoss, match=r"loss of member shufflenetv2 is not finite in iteration 4 "):
            make_images(context, PRIORS)
    kept = sorted(path.name for path in context.store.root.glob("images/.partial/**/*.*") if path.is_file())
    assert "slot0000_block0000.safetensors" in kept
    assert "stack00001.stage0.ckpt.tmp" in kept
    assert same_files(make_images(context, PRIORS), made[0].images)


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["weights.safetensors", "logits.bin"])
def test_a_damaged_parent_is_refused_by_name(file: str, made: Made, again: Callable[..., Context]) -> None:
    labels = made[0].labels
    artifact = labels.artifact if file == "logits.bin" else labels.teachers["resnet18"]
    context = again("students")
    path = context.store.root / artifact.kind / artifact.path.name / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArtifact, match=rf"{artifact.path.name}: {file} does not match its checksum\. Delete"):
        distil(context, "cvdd")


def test_a_disk_that_is_full_while_labels_are_reserved(
    made: Made, again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space for all labels is reserved before the first is computed."""
    context = again("labels", "students")

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        patched.setattr(
            cvdd.labels.sources.ComputedLabels, "epoch", lambda *arguments: pytest.fail("computed too early")
        )
        with pytest.raises(StoreError, match=r"no space left for .*paths\.store=DIR"):
            make_labels(context, made[0].images, PRIORS)
    assert same_files(make_labels(context, made[0].images, PRIORS).artifact, made[0].labels.artifact)


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a directory")
    with pytest.raises(StoreError, match=r"cannot be written .*paths\.store=DIR"):
        Store(tmp_path / "store").make("things", "thing", {}, [], lambda work: {})


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(chain_home: Path, made: Made, again: Callable[..., Context]) -> None:
    """A real process of the real command: stopped after its first unit, and started again."""
    store = again("images", "labels", "students").store.root
    overrides = (*TINY, "method.iterations=300", "method.checkpoint_every=300", "method.log_every=10")
    overrides = (*overrides, "method.grid_every=300", "trainer.threads=1")
    command = [sys.executable, str(ROOT / "distill.py"), f"paths.store={store}", *overrides]
    folder = store.parent / "run"
    folder.mkdir()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background ignores Ctrl-C for all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (units := list(store.glob("images/.partial/*/units/*.safetensors"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    assert "interrupted; finished units and checkpoints are kept" in output
    assert "Traceback" not in output
    finished = {unit.name: unit.stat().st_mtime_ns for unit in units}
    assert list(finished) == ["slot0000_block0000.safetensors"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (unit,) = store.glob("images/*/units/slot0000_block0000.safetensors")
    assert unit.stat().st_mtime_ns == finished[unit.name]
    changes = overrides[len(TINY) :]
    mine, theirs = (make_images(tiny_context(chain_home, *changes, store=place), PRIORS) for place in (store, None))
    assert same_files(mine, theirs)
