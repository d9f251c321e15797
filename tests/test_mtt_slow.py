"""The smallest honest run of trajectory matching (its specification, section 11): handwritten digits at 16 pixels."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mtt_helpers import mtt_context
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate

import cvdd.backbones.convnet
from cvdd.artifact import Artifact, Store
from cvdd.chain.context import Context
from cvdd.chain.mtt import load_matched, make_mtt_images, make_mtt_student
from cvdd.chain.trajectories import make_trajectories, mtt_of
from cvdd.chain.unit_files import load_history
from cvdd.data import Data, TensorSource

pytestmark = pytest.mark.slow

SETTINGS = (
    "method=mtt_tiny",
    "dataset.image_size=16",
    "dataset.digits.size_range=[8,16]",
    "dataset.digits.crop_range=[16,64]",
    "dataset.train_per_class=null",
    "ipc.images_per_class=1",
    "method.iterations=100",
    "method.checkpoint_every=20",
    "method.log_every=20",
    "method.grid_every=20",
    "method.mtt.experts.backbone.arguments.depth=3",
    "method.mtt.experts.backbone.arguments.width=32",
    "method.mtt.experts.count=5",
    "method.mtt.experts.epochs=15",
    "method.mtt.experts.batch_size=64",
    "method.mtt.experts.lr=0.02",
    "method.mtt.student.epochs=300",
    "method.mtt.whitening=false",
    "method.mtt.steps=10",
    "method.mtt.start_epochs=5",
    "method.mtt.lr_images=100",
    "method.mtt.step_size=0.02",
    "protocol.eval_every=300",
)


def plain_digits(context: Context) -> Data:
    """scikit-learn's digits, 8 to 16 pixels, grey in three channels: 1,297 to train on, 500 to test on."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = interpolate(small, size=(16, 16), mode="bilinear", align_corners=False).clamp(0, 1)
    pixels = (large * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    train, test = order[500:], order[:500]
    values = pixels[train].float() / 255
    mean, std = float(values.mean()), float(values.std())
    parts = {"train": {"content": "digits at 16 pixels"}, "test": {"content": "digits at 16 pixels"}}
    return Data(
        train=TensorSource(pixels[train], labels[train]),
        test=TensorSource(pixels[test], labels[test]),
        classes=tuple(str(digit) for digit in range(10)),
        mean=(mean,) * 3,
        std=(std,) * 3,
        image_size=16,
        name="digits16",
        identity=parts,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Context:
    context = mtt_context(tmp_path_factory.mktemp("mtt"), *SETTINGS)
    context._loaded[context.config.dataset.model_dump_json()] = plain_digits(context)
    return context


def with_settings(base: Context, **settings: Any) -> Context:
    iterations = settings.pop("iterations", 100)
    init, seed = settings.pop("init", "real"), settings.pop("seed", 0)
    keys = {f"method.mtt.{name.replace('__', '.')}": value for name, value in settings.items()}
    return base.differing({"method.iterations": iterations, "method.init": init, "method.seed": seed, **keys}, "")


def accuracy(context: Context, images: Artifact) -> float:
    """Mean of three students."""
    backbone = mtt_of(context).experts.backbone
    students = [make_mtt_student(context, images, "convnet", backbone, seed) for seed in range(3)]
    return statistics.fmean(student.metrics["top1"] for student in students)


def last_loss(images: Artifact) -> float:
    """Mean matched loss of the last 20 iterations."""
    return float(load_history(images)["slot0000_block0000"]["rows"][-1]["loss"])


def test_experts_learn(base: Context) -> None:
    """The specification measured 93 to 96% at the end."""
    assert float(make_trajectories(base).metrics["test_top1"]) > 88


@pytest.mark.parametrize("gradient", ["unrolled", "tesla"])
def test_matched_images_beat_the_real_ones(base: Context, gradient: str) -> None:
    """The specification measured 72.1 (71.1 to 73.9) before and 91.6 (91.2 to 91.9) after 100 iterations.

    Measured here: 69.9 and 87.3, step size 0.0360 (there 0.037), loss 0.388 (there 0.37), the same with both gradients.
    The level is lower because these images have three channels, which learn colours that no real digit has:
    :func:`test_one_channel_reaches_the_level_of_the_specification`.
    """
    real = make_mtt_images(with_settings(base, iterations=0))
    images = make_mtt_images(with_settings(base, gradient=gradient))
    learned = load_matched(images).step_size
    before, after = accuracy(base, real), accuracy(base, images)
    at_learned_rate = accuracy(with_settings(base, student__lr=None), images)
    print(f"{gradient}: real {before:.1f}, matched {after:.1f}, at {learned:.4f} {at_learned_rate:.1f}")
    print(f"loss {last_loss(images):.3f}")
    assert after >= before + 12
    assert after >= 84
    assert at_learned_rate >= before + 12
    assert last_loss(images) < 0.5
    assert math.isfinite(learned)
    assert learned > 0


class Grey(nn.Module):
    """A network of one channel that sees the mean of three, so that three equal ones stay equal."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images [n, 3, h, w]."""
        return self.network(images.mean(dim=1, keepdim=True))


@pytest.fixture
def one_channel(base: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """The same with networks of one channel, in a store of their own, which cannot know that they are others."""

    def convnet(num_classes: int, width: int, **arguments: Any) -> nn.Module:
        network = build(num_classes, width=width, **arguments)
        network.features[0] = nn.Conv2d(1, width, 3, padding=1)
        return Grey(network)

    build = cvdd.backbones.convnet.convnet
    monkeypatch.setattr(cvdd.backbones.convnet, "convnet", convnet)
    return replace(base, store=Store(tmp_path / "store"))


def test_one_channel_reaches_the_level_of_the_specification(one_channel: Context) -> None:
    """There 72.1 (71.1 to 73.9) and 91.6 (91.2 to 91.9), loss 0.37, step size 0.037.

    Measured here with two choices of real images: 73.5 and 66.7 before, 91.1 both after, losses 0.364 and 0.348, step
    sizes 0.0372 and 0.0367. Each channel gets a third of the gradient, so the rate is three times theirs.
    """
    images = make_mtt_images(with_settings(one_channel, lr_images=300.0))
    reached = accuracy(one_channel, images)
    print(f"matched {reached:.1f}, loss {last_loss(images):.3f}, step size {load_matched(images).step_size:.4f}")
    assert reached >= 90
    assert last_loss(images) == pytest.approx(0.37, abs=0.03)
    assert load_matched(images).step_size == pytest.approx(0.037, abs=0.001)


def test_images_matter_and_not_the_step_size_alone(base: Context) -> None:
    """The control of the specification: without a rate of the images the loss stays at 0.64."""
    assert last_loss(make_mtt_images(with_settings(base, lr_images=0.0))) > 0.55


def test_noise_becomes_images(base: Context) -> None:
    """The specification measured 5.9 before and 88.5 after 100 iterations; here it was 81.6."""
    images = make_mtt_images(with_settings(base, init="noise"))
    reached = accuracy(base, images)
    print(f"noise {reached:.1f}")
    assert reached >= 80
