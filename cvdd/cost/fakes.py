"""Each kind of step with random images, through the functions that the stages use."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from cvdd.computing.footprint import Profile
from cvdd.cost.recovering import move, vote
from cvdd.cost.steps import (
    DecodeStep,
    MeasureStep,
    MocoStep,
    MoveStep,
    Network,
    Overhead,
    PatchStep,
    ReplayStep,
    ScoreStep,
    Step,
    StudentStep,
    TrainStep,
    VoteStep,
)
from cvdd.data import Data, TensorSource, resize_and_crop
from cvdd.labels.batches import LabelledBatch
from cvdd.labels.replay import draw_epoch, replay
from cvdd.labels.teachers import Teachers
from cvdd.support.batch_parts import part_size
from cvdd.synthesis.patches import SCORED_AT_ONCE, make_patches
from cvdd.training.classifier import Classifier
from cvdd.training.measure import Accuracy, Evaluator
from cvdd.training.member import MemberModule
from cvdd.training.moco import MocoModule, only_probed, with_projection
from cvdd.training.real_images import side_of_files
from cvdd.training.student import StudentModule

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_LARGE = 500
"""Longer side of a typical photograph of ImageNet, in pixels."""

Build = Callable[[Network], nn.Module]
Run = Callable[[], object]


@dataclass(frozen=True)
class Scale:
    """How much of a step one call does.

    Attributes:
        size: images in the whole step, in which it can be cut.
        least: fewest images that a call can do.
        flops: of the whole step.
        bytes: that the whole step holds.
    """

    size: int
    least: int
    flops: float
    bytes: float


def scale_of(step: Step, profiles: Callable[[Network, str], Profile]) -> Scale:
    """Return how large a step is.

    Args:
        step: which.
        profiles: what one image costs in a network, by mode.
    """
    if isinstance(step, TrainStep):
        recipe, one = step.settings, profiles(step.network, "forward" if step.probe else "train")
        part = part_size(recipe.batch_size, recipe.accumulation)
        # Weights, gradients and the two averages of an optimiser.
        held = one.activations * part + 4 * one.weights
        return Scale(recipe.batch_size, 2 * recipe.accumulation, one.flops * recipe.batch_size, held)
    if isinstance(step, MocoStep):
        moco, one, keys = step.settings, profiles(step.network, "train"), profiles(step.network, "forward")
        held = one.activations * (moco.batch_size // moco.groups) + 4 * one.weights
        each = one.flops + keys.flops + 4.0 * moco.dimension * moco.queue
        return Scale(moco.batch_size, 2 * moco.groups, each * moco.batch_size, held + 4 * moco.dimension * moco.queue)
    if isinstance(step, StudentStep):
        protocol, label = step.settings
        one = profiles(step.network, "train")
        held = one.activations * part_size(label.batch_size, protocol.accumulation) + 4 * one.weights
        return Scale(label.batch_size, 2 * protocol.accumulation, one.flops * label.batch_size, held)
    if isinstance(step, VoteStep):
        one, images = profiles(step.network, "vote"), step.units * step.images
        half = 0.5 if step.engine.precision == "bf16" else 1.0
        return Scale(images, 1, one.flops * images, half * (one.activations * images + one.weights))
    if isinstance(step, MoveStep):
        images, parts = step.units * step.images, step.settings.parts_judged
        anchored = 0 if step.settings.anchored is None else parts
        # Two products of matrices for each channel of what is shown, forwards and backwards, and of anchors forwards.
        flops = (parts + anchored / 2) * 24.0
        # The images, their gradients and the two averages of Adam; what is shown of them, its gradient, and anchors.
        held = 4 + 2 * parts + 2 * anchored
        return Scale(images, 1, images * flops * step.size**3, images * 3 * step.size**2 * 4 * held)
    if isinstance(step, ScoreStep):
        label, one = step.settings, profiles(step.network, "forward")
        # Halves of two are the least that BatchNorm can normalise.
        return Scale(1, min(label.batch_size, 4), one.flops, one.activations * step.together + one.weights)
    if isinstance(step, MeasureStep):
        one = profiles(step.network, "forward")
        return Scale(1, 1, one.flops, one.activations * step.batch + one.weights)
    if isinstance(step, PatchStep):
        one, patches = profiles(step.network, "forward"), step.settings
        return Scale(1, patches.factor**2, one.flops * patches.crops, one.activations * SCORED_AT_ONCE + one.weights)
    if isinstance(step, ReplayStep):
        label = step.settings
        held = step.together * 3 * step.size**2 * 4 * 3
        return Scale(1, min(label.batch_size, 4), 12.0 * step.size**3, held)
    return Scale(1, 1, 0.0, 0.0)


def train_run(step: TrainStep, images: int, build: Build, device: torch.device) -> Run:
    """Return a training step of a member with so many images."""
    size = step.network.size
    recipe = step.settings.model_copy(update={"batch_size": images})
    side = size if step.in_memory else side_of_files(size, resized=recipe.crop == "resized")
    pixels, labels = _pixels(images, side).to(device), _labels(images, step.network)
    batch: Any = torch.arange(images) if step.in_memory else (pixels, labels.to(device))
    held = pixels if step.in_memory else None
    network = _trainable(build, step.network)
    if step.probe:
        only_probed(network)
    module = MemberModule(recipe, held, labels.to(device), MEAN, STD, size, network=network, **_shared()).to(device)
    return _optimising(module, batch)


def moco_run(step: MocoStep, images: int, build: Build, device: torch.device) -> Run:
    """Return a step of a member's training without labels with so many images."""
    size, moco = step.network.size, step.settings
    moco = moco.model_copy(update={"batch_size": images})
    pixels = _pixels(images, size if step.in_memory else side_of_files(size, resized=True)).to(device)
    network = _trainable(build, step.network)
    with_projection(network, 0)
    held = pixels if step.in_memory else None
    module = MocoModule(moco, step.flip, held, MEAN, STD, size, network=network, **_shared()).to(device)
    return _optimising(module, torch.arange(images) if step.in_memory else (pixels, torch.zeros(images)))


def student_run(step: StudentStep, images: int, build: Build, device: torch.device) -> Run:
    """Return a training step of a student with so many images."""
    protocol, label = step.settings
    size, classes = step.network.size, step.network.classes
    label = label.model_copy(update={"batch_size": images})
    plan = draw_epoch(label, images, size, 0, 0)
    batch = LabelledBatch(plan, torch.randn(images, 0 if label.hard else classes)).to(device)
    module = StudentModule(
        protocol,
        _pixels(images, size),
        _labels(images, step.network),
        images,
        MEAN,
        STD,
        network=_trainable(build, step.network),
        **_shared(),
    ).to(device)
    return _optimising(module, batch)


def vote_run(step: VoteStep, images: int, build: Build, device: torch.device) -> Run:
    """Return a member's judgement of so many images; fewer than all are one unit."""
    network, whole = step.network, images == step.units * step.images
    units, each = (step.units, step.images) if whole else (1, images)
    return vote(
        build(network), units, each, network.classes, network.size, device, matched=step.matched, engine=step.engine
    )


def move_run(step: MoveStep, images: int, device: torch.device) -> Run:
    """Return iterations without their votes."""
    whole = images == step.units * step.images
    units, each = (step.units, step.images) if whole else (1, images)
    return move(units, each, step.size, step.settings, device)


def score_run(step: ScoreStep, images: int, build: Build, device: torch.device) -> Run:
    """Return the labelling of so many samples by one teacher."""
    label, size = step.settings, step.network.size
    batch = min(label.batch_size, images)
    samples = torch.randn(images // batch * batch, 3, size, size, device=device)
    teachers = Teachers([build(step.network)], [1.0], label).to(device)
    return lambda: teachers.score(samples, batch)


def replay_run(step: ReplayStep, images: int, device: torch.device) -> Run:
    """Return the drawing and showing of so many samples."""
    pixels = _pixels(images, step.size).to(device)

    def run() -> None:
        replay(pixels, draw_epoch(step.settings, images, step.size, 0, 0).to(device), MEAN, STD)

    return run


def measure_run(step: MeasureStep, images: int, build: Build, device: torch.device) -> Run:
    """Return a measurement on so many images."""
    data = _data(images, step.network)
    evaluator = Evaluator(data, step.batch, device, test_resize=None)
    network = build(step.network).to(device)
    return lambda: evaluator(network)


def patch_run(step: PatchStep, images: int, build: Build, device: torch.device) -> Run:
    """Return the making of patches from so many candidates of one class."""
    patches = step.settings.model_copy(update={"candidates": images, "images_per_class": 1})
    observer = build(step.network).eval().to(device)
    data = _data(images, step.network)
    return lambda: make_patches(data, observer, patches, 0, 0)


def decode_run(step: DecodeStep) -> Run:
    """Return the decoding of one file."""
    # Noise would be larger than any photograph, and a plain area smaller.
    coarse = numpy.random.default_rng(0).integers(0, 256, (_LARGE * 3 // 40, _LARGE // 10, 3), dtype=numpy.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((_LARGE, _LARGE * 3 // 4), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)

    def run() -> None:
        with Image.open(io.BytesIO(stream.getvalue())) as opened:
            pixels = torch.from_numpy(numpy.array(opened.convert("RGB"))).permute(2, 0, 1)
        resize_and_crop(pixels, step.size, step.size)

    return run


def run_of(step: Step, images: int, build: Build, device: torch.device) -> Run:
    """Return a call that does a step with so many images."""
    if isinstance(step, MoveStep):
        return move_run(step, images, device)
    if isinstance(step, ReplayStep):
        return replay_run(step, images, device)
    if isinstance(step, DecodeStep):
        return decode_run(step)
    assert not isinstance(step, Overhead)
    makers: Mapping[type, Callable[..., Run]] = {
        TrainStep: train_run,
        MocoStep: moco_run,
        StudentStep: student_run,
        VoteStep: vote_run,
        ScoreStep: score_run,
        MeasureStep: measure_run,
        PatchStep: patch_run,
    }
    return makers[type(step)](step, images, build, device)


def _optimising(module: Classifier, batch: Any) -> Run:
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    step: Any = module.train().training_step

    def run() -> None:
        optimizer.zero_grad()
        loss: Tensor = step(batch, 0)
        module.backward(loss)
        optimizer.step()
        module.on_train_batch_end(None, batch, 0)

    return run


def _trainable(build: Build, network: Network) -> nn.Module:
    return build(network).train().requires_grad_(True)


def _shared() -> dict[str, Any]:
    return {
        "name": "cost",
        "seed": 0,
        "measure": lambda network: Accuracy(0.0, 0.0, 0.0),
        "measured_at": lambda epoch: False,
        "on_epoch": lambda epoch, row: None,
    }


def _pixels(images: int, size: int) -> Tensor:
    return torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _labels(images: int, network: Network) -> Tensor:
    return torch.arange(images) % network.classes


def _data(images: int, network: Network) -> Data:
    source = TensorSource(_pixels(images, network.size), torch.zeros(images, dtype=torch.int64))
    classes = tuple(str(index) for index in range(network.classes))
    return Data(source, source, classes, MEAN, STD, network.size, "cost", {})
