"""The same result: the engine against the plain loop, and stacks against single units, step by step.

``python -m benchmarks.agreement``. At each of 20 steps both sides start from the same images, because Adam divides by
the gradient's own size: where that is nearly nothing, the last bits decide where a pixel goes, and trajectories part.
How far they do part when nobody brings them together again is shown beside it.

Gradients are compared image by image. In float32 a few images may differ by more than rounding: where an activation is
within rounding of a ReLU's kink, the order of a sum decides whether it passes. So the median image counts, and the
share of the others is shown; in float64, where this does not happen, stacks must agree on every image.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import engine, settings
from benchmarks.reference.recover import Committee, Recovery, View, show
from benchmarks.reference.recover import Settings as PlainSettings
from cvdd.augmentation.augment import Views
from cvdd.schema import RunConfig
from cvdd.synthesis.units import Stage, Unit, unit_views

TOLERANCE_OF_REFERENCE, TOLERANCE_OF_STACK = 1e-4, 1e-5
PAIRS = {
    "digits": ("resnet18", "mobilenetv2"),
    "cifar": ("resnet18", "mobilenetv2"),
}


@dataclass(frozen=True)
class Differences:
    """The largest differences over all steps.

    Attributes:
        loss: of the losses, as a share of the loss.
        gradient: of the median image of a step: Euclidean norm of the gradients' difference, as a share of the
            gradient's.
        largest: the same of the image that differs most.
        beyond: share of the images, over all steps, that differ by more than the tolerance.
        tolerance: what was allowed.
    """

    loss: float
    gradient: float
    largest: float
    beyond: float
    tolerance: float

    @staticmethod
    def of(losses: Sequence[float], gradients: Sequence[Tensor], tolerance: float) -> Differences:
        """Summarise all steps: differences of the loss, and of each image's gradient."""
        every = torch.stack(list(gradients))
        return Differences(
            max(losses),
            float(every.median(dim=1).values.max()),
            float(every.max()),
            float((every > tolerance).double().mean()),
            tolerance,
        )

    def passed(self, every_image: bool) -> bool:
        """Whether loss and gradient are within the tolerance, of the median image or of every one."""
        return max(self.loss, self.largest if every_image else self.gradient) <= self.tolerance


def difference_by_image(one: Tensor, other: Tensor) -> Tensor:
    """Relative Euclidean distance of each image [n, 3, size, size] from its counterpart: [n]."""
    distance: Tensor = (one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
    return distance


@dataclass(frozen=True)
class Setting:
    """What is recovered by all sides.

    Attributes:
        config: the recipe.
        members: the networks.
        images: [units, images, 3, size, size] initial images.
        targets: [units, images].
        views: of each unit, one for each step.
    """

    config: RunConfig
    members: Sequence[nn.Module]
    images: Tensor
    targets: Tensor
    views: Sequence[Views]

    @staticmethod
    def random(config: RunConfig, members: Sequence[nn.Module], units: int, images: int, steps: int) -> Setting:
        """Begin with noise, in the precision of the members."""
        stage = Stage(0, 0, steps, config.dataset.image_size)
        drawn = [unit_views(Unit(slot, 0, 0, images), config.method, stage) for slot in range(units)]
        start, targets = settings.random_units(config, units, images)
        return Setting(config, members, start.to(next(members[0].parameters()).dtype), targets, drawn)

    @property
    def steps(self) -> int:
        """Number of iterations."""
        return len(self.views[0].flips)

    def at(self, step: int) -> list[Views]:
        """Each unit's view in one iteration."""
        return [views[step : step + 1] for views in self.views]

    def plain(self, unit: int, device: torch.device) -> Recovery:
        """The reference's loop for one unit."""
        # Of copies, or its hooks would measure the engine's forward passes too.
        committee = Committee(copy.deepcopy(list(self.members)), [1 / len(self.members)] * len(self.members))
        return Recovery(
            committee,
            self.images[unit].to(device),
            self.targets[unit].to(device),
            settings.recover_settings(self.config, device),
        )


def plain_view(views: Views) -> View:
    """A single view in the reference's terms."""
    top, left, height, width = views.boxes[0].tolist()
    down, right = views.shifts[0].tolist()
    return View((top, left, height, width), bool(views.flips[0]), (down, right))


def plain_gradient(recovery: Recovery, images: Tensor, view: View) -> tuple[float, Tensor]:
    """The reference's loss of one unit's images and its gradient."""
    leaf = images.clone().requires_grad_()
    known: PlainSettings = recovery.settings
    loss = recovery.committee.loss(show(leaf, view), recovery.targets, known)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


def against_reference(setting: Setting, device: torch.device) -> Differences:
    """Compare loss and gradient of one unit with the reference's, along the reference's way."""
    recovery = setting.plain(0, device)
    losses, gradients = [], []
    for step in range(setting.steps):
        images, views = recovery.images.detach().clone(), setting.at(step)[:1]
        expected, slope = plain_gradient(recovery, images, plain_view(views[0]))
        stack = images[None], setting.targets[:1].to(device)
        found, gradient = engine.recover_gradient(setting.config, setting.members, *stack, views)
        losses.append(abs(found - expected) / abs(expected))
        gradients.append(difference_by_image(gradient[0], slope))
        recovery.step(plain_view(views[0]))
    return Differences.of(losses, gradients, TOLERANCE_OF_REFERENCE)


def against_single_units(setting: Setting, device: torch.device) -> Differences:
    """Compare loss and gradient of a stack with those of its units one by one, along the units' way."""
    recoveries = [setting.plain(unit, device) for unit in range(len(setting.images))]
    targets = setting.targets.to(device)
    losses, gradients = [], []
    for step in range(setting.steps):
        images = torch.stack([recovery.images.detach() for recovery in recoveries])
        views = setting.at(step)
        total, gradient = engine.recover_gradient(setting.config, setting.members, images, targets, views)
        alone = [
            engine.recover_gradient(setting.config, setting.members, images[[unit]], targets[[unit]], [views[unit]])
            for unit in range(len(images))
        ]
        expected = sum(loss for loss, _ in alone)
        losses.append(abs(total - expected) / abs(expected))
        gradients.append(difference_by_image(gradient.flatten(0, 1), torch.cat([one[0] for _, one in alone])))
        for recovery, view in zip(recoveries, views, strict=True):
            recovery.step(plain_view(view))
    return Differences.of(losses, gradients, TOLERANCE_OF_STACK)


def free_running(setting: Setting, device: torch.device, folder: Path) -> tuple[float, float]:
    """Median and largest difference of one unit's images after all steps that nobody corrected."""
    recovery = setting.plain(0, device)
    for step in range(setting.steps):
        recovery.step(plain_view(setting.at(step)[0]))
    stack = setting.images[:1], setting.targets[:1], setting.views[:1]
    made = engine.recover_free(setting.config, setting.members, *stack, folder, device)
    difference = (made[0] - recovery.images.detach().cpu()).abs()
    return float(difference.median()), float(difference.max())


def main() -> None:
    """Compare and print; fail where the engine is not within the tolerances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="iterations that are compared")
    parser.add_argument("--units", type=int, default=10, help="units in a stack")
    parser.add_argument("--images", type=int, default=10, help="images in a unit")
    parser.add_argument("--data", nargs="*", default=list(PAIRS), choices=list(PAIRS), help="sizes and members")
    wanted = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # TF32 keeps ten bits; what is compared here is full precision.
    torch.backends.cudnn.allow_tf32 = False
    failed = []
    print("| data | comparison | loss | gradient: median image | largest | beyond | at most | images apart |")
    print("|---|---|---|---|---|---|---|---|")

    def show_row(data: str, what: str, found: Differences, every_image: bool, apart: str = "") -> None:
        numbers = f"{found.loss:.1e} | {found.gradient:.1e} | {found.largest:.1e} | {100 * found.beyond:.1f} %"
        print(f"| {data} | {what} | {numbers} | {found.tolerance:.0e} | {apart} |", flush=True)
        if not found.passed(every_image):
            failed.append(f"{data}, {what}")

    for data in wanted.data:
        config = settings.configuration(data)
        members = settings.random_members(config, PAIRS[data], device)
        setting = Setting.random(config, members, wanted.units, wanted.images, wanted.steps)
        with tempfile.TemporaryDirectory() as folder:
            median, largest = free_running(setting, device, Path(folder))
        apart = f"median {median:.1e}, largest {largest:.1e}"
        show_row(data, "engine and plain loop, float32", against_reference(setting, device), False, apart)
        show_row(data, "stack and single units, float32", against_single_units(setting, device), False)
        exact = [copy.deepcopy(member).double() for member in members]
        setting = Setting.random(config, exact, wanted.units, wanted.images, wanted.steps)
        show_row(data, "stack and single units, float64", against_single_units(setting, device), True)
    if failed:
        raise SystemExit(f"not the same result: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
