"""The configurations and networks that both sides of every case share."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from benchmarks.reference import recover, relabel, student
from cvdd.augmentation.augment import pixel_bounds
from cvdd.backbones import build_network
from cvdd.composition.arguments import prepare
from cvdd.composition.command import checked
from cvdd.composition.config_directory import config_directory
from cvdd.schema import RunConfig

EXPERIMENTS = {
    "digits": (),
    "cifar": ("experiment=cvdd_table1_cifar10_ipc10_r18",),
    "imagenet": ("experiment=cvdd_table1_imagenet1k_ipc10_r18",),
}
"""By name of the data: the recipe whose settings are timed, as published where there is one."""


@cache
def configuration(data: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Compose and check the configuration of a data set; no file of it is read."""
    conf = config_directory()
    nowhere = Path(tempfile.gettempdir())
    places = [f"paths.{name}={nowhere / name}" for name in ("data", "store", "output")]
    local = ["~local"] if (conf / "local").is_dir() else []
    with initialize_config_dir(str(conf), version_base="1.3"):
        prepared = prepare([*places, *local, *EXPERIMENTS[data], *overrides], conf)
        return checked(compose("evaluate", prepared), prepared, None)


def random_member(config: RunConfig, name: str, device: torch.device) -> nn.Module:
    """Build a member with random weights whose running statistics are those of noise, so that all losses are finite."""
    backbone = config.committee.members[name].backbone.model_copy(update={"pretrained": False})
    network = build_network(backbone, config.dataset.num_classes, 0).to(device).train()
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    side = config.dataset.image_size
    noise = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        network(noise)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return network.eval().requires_grad_(False)


def random_members(config: RunConfig, names: tuple[str, ...], device: torch.device) -> list[nn.Module]:
    """Build members with random weights."""
    return [random_member(config, name, device) for name in names]


def random_pixels(config: RunConfig, count: int) -> Tensor:
    """Return noise [count, 3, size, size] uint8 on the CPU."""
    side = config.dataset.image_size
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=source, dtype=torch.uint8)


def random_units(config: RunConfig, units: int, images: int) -> tuple[Tensor, Tensor]:
    """Return initial images [units, images, 3, size, size] between black and white, and their classes."""
    side = config.dataset.image_size
    low, high = pixel_bounds(config.dataset.mean, config.dataset.std)
    source = torch.Generator().manual_seed(2)
    start = low + (high - low) * torch.rand(units, images, 3, side, side, generator=source)
    return start, torch.arange(images).remainder(config.dataset.num_classes).repeat(units, 1)


def recover_settings(config: RunConfig, device: torch.device) -> recover.Settings:
    """What the plain recover loop needs to know."""
    method = config.method
    assert method.crop_scale is not None
    low, high = pixel_bounds(config.dataset.mean, config.dataset.std)
    return recover.Settings(
        lr=method.lr,
        betas=method.betas,
        eps=method.eps,
        r_bn=method.r_bn,
        first_multiplier=method.first_bn_multiplier,
        iterations=method.iterations,
        crop_scale=method.crop_scale,
        flip=method.flip,
        jitter=method.jitter,
        low=low.to(device),
        high=high.to(device),
    )


def relabel_settings(config: RunConfig) -> relabel.Settings:
    """What the plain labels need to know."""
    label, dataset = config.label, config.dataset
    return relabel.Settings(label.batch_size, label.crop_scale, label.flip, tuple(dataset.mean), tuple(dataset.std))


def student_settings(config: RunConfig) -> student.Settings:
    """What the plain student needs to know."""
    protocol, dataset = config.protocol, config.dataset
    return student.Settings(
        lr=protocol.lr,
        betas=protocol.betas,
        weight_decay=protocol.weight_decay,
        temperature=protocol.temperature,
        accumulation=protocol.accumulation,
        mean=tuple(dataset.mean),
        std=tuple(dataset.std),
    )
