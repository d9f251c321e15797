"""Recover, plainly (specification of the SRe2L family, section 2.2): unit by unit, statistics by forward hooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop


@dataclass(frozen=True)
class Settings:
    """Numbers of the recover loop.

    Attributes:
        lr: initial learning rate of Adam, cosine to 0.
        betas: of Adam.
        eps: of Adam.
        r_bn: weight of the statistics.
        first_multiplier: extra weight of the first BatchNorm layer.
        iterations: after which the learning rate is 0.
        crop_scale: range of the crop's area.
        flip: whether views are mirrored at random.
        jitter: largest circular shift in pixels.
        low: lowest value of each channel, [3, 1, 1].
        high: highest value of each channel, [3, 1, 1].
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    r_bn: float
    first_multiplier: float
    iterations: int
    crop_scale: tuple[float, float]
    flip: bool
    jitter: int
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class View:
    """What all images of a unit show in one iteration.

    Attributes:
        box: top, left, height, width of the crop.
        flip: whether it is mirrored.
        shift: circular shift, down and right.
    """

    box: tuple[int, int, int, int]
    flip: bool
    shift: tuple[int, int]


class StatisticsHook:
    """Measures how far the batch's statistics are from a layer's running ones, at each forward pass."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.distance = torch.zeros(())
        self.handle = layer.register_forward_hook(self.measure)

    def measure(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Note the distance of the layer's input."""
        features = inputs[0]
        mean = features.mean(dim=(0, 2, 3))
        variance = features.var(dim=(0, 2, 3), unbiased=False)
        self.distance = torch.norm(layer.running_var - variance) + torch.norm(layer.running_mean - mean)


class Committee:
    """The networks that judge a unit.

    Args:
        networks: in evaluation mode, frozen.
        weights: share of each in the vote.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float]) -> None:
        self.networks, self.weights = list(networks), list(weights)
        self.hooks = [
            [StatisticsHook(layer) for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
            for network in self.networks
        ]

    def loss(self, images: Tensor, targets: Tensor, settings: Settings) -> Tensor:
        """Voting loss of one unit's images [n, 3, size, size] with their classes [n]."""
        total = torch.zeros((), device=images.device)
        for network, hooks, weight in zip(self.networks, self.hooks, self.weights, strict=True):
            loss = F.cross_entropy(network(images), targets)
            for index, hook in enumerate(hooks):
                multiplier = settings.first_multiplier if index == 0 else 1.0
                loss = loss + settings.r_bn * multiplier * hook.distance
            total = total + weight * loss
        return total


def draw_view(images: Tensor, settings: Settings) -> View:
    """Draw the view that all images of a unit share."""
    box = RandomResizedCrop.get_params(images, list(settings.crop_scale), [3 / 4, 4 / 3])
    flip = settings.flip and bool(torch.rand(()) < 0.5)
    down, right = torch.randint(0, settings.jitter + 1, (2,)).tolist()
    return View(tuple(box), flip, (down, right))


def show(images: Tensor, view: View) -> Tensor:
    """Crop, resize, flip and roll a unit's images."""
    top, left, height, width = view.box
    crop = images[:, :, top : top + height, left : left + width]
    seen = F.interpolate(crop, images.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
    if view.flip:
        seen = seen.flip(-1)
    return torch.roll(seen, view.shift, dims=(-2, -1))


class Recovery:
    """One unit that is being made.

    Args:
        committee: who judges.
        images: [n, 3, size, size] initial images, normalised.
        targets: [n] classes.
        settings: of the loop.
    """

    def __init__(self, committee: Committee, images: Tensor, targets: Tensor, settings: Settings) -> None:
        self.committee, self.targets, self.settings = committee, targets, settings
        self.images = images.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], lr=settings.lr, betas=settings.betas, eps=settings.eps)
        self.iteration = 0

    def step(self, view: View | None = None) -> Tensor:
        """Do one iteration, through a view that is drawn or given; return the loss."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * self.iteration / settings.iterations))
        seen = show(self.images, view or draw_view(self.images, settings))
        loss = self.committee.loss(seen, self.targets, settings)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.images.clamp_(settings.low, settings.high)
        self.iteration += 1
        return loss.detach()


def recover(committee: Committee, units: Tensor, targets: Tensor, settings: Settings, steps: int) -> list[Any]:
    """Make units [units, n, 3, size, size] one after the other, so many steps each; return their images."""
    made = []
    for images, classes in zip(units, targets, strict=True):
        recovery = Recovery(committee, images, classes, settings)
        for _ in range(steps):
            recovery.step()
        made.append(recovery.images.detach())
    return made
