"""What several tests share: the whole chain in a configuration that runs in seconds, and small networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import compose_raw
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import write_png

from cvdd.artifact import Artifact, Store
from cvdd.augmentation.augment import Mix
from cvdd.chain.context import Context
from cvdd.composition.validation import check
from cvdd.data import FileSource, ImageSource
from cvdd.schema import LabelConfig, MethodConfig, ProtocolConfig, RunConfig
from cvdd.synthesis.voting import Judgement, Voter, judge
from cvdd.training.measure import Accuracy

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED_IMAGES = FIXTURES / "official_release" / "syn_data" / "cifar10" / "cvdd_ipc2"
PUBLISHED_LABELS = FIXTURES / "official_release" / "new_labels" / "cifar10" / "cvdd_bs8_ipc2"
"""Two images of each of ten classes, as the published programs write them, and three epochs of labels in batches of
eight."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

TINY = (
    "dataset.digits.train_placements=1",
    "dataset.digits.test_placements=1",
    "dataset.digits.test_digits=200",
    "dataset.train_per_class=30",
    "dataset.test_per_class=10",
    "~committee.members.mobilenetv2",
    "~committee.members.densenet121",
    "committee.members.resnet50.backbone.arguments.width=8",
    "committee.draw=in_turn",
    "recipe.epochs=2",
    "recipe.batch_size=50",
    "prior.source=given",
    "prior.values={resnet18: 40, resnet50: 30, shufflenetv2: 35}",
    "ipc.images_per_class=2",
    "label.batch_size=8",
    "patches.candidates=10",
    "patches.crops=2",
    "method.iterations=6",
    "method.lr=0.25",
    "method.r_bn=0.01",
    "method.crop_scale=[0.08,1.0]",
    "method.log_every=2",
    "method.grid_every=2",
    "method.checkpoint_every=2",
    "protocol.epochs=3",
    "protocol.eval_every=1",
    "protocol.seeds=[0]",
    "compare=none",
    "trainer.accelerator=cpu",
    "trainer.progress=none",
)
"""The embedded data set, three members, two images per class: every stage in a second or so."""

PRIORS = {"resnet18": 40.0, "resnet50": 30.0, "shufflenetv2": 35.0}
"""Prior performance of its members."""


def configure(root: Path, *overrides: str, verb: str = "evaluate") -> RunConfig:
    """Compose and check a configuration whose files lie under ``root``."""
    return check(compose_raw(root, verb, *overrides))


def tiny_context(root: Path, *overrides: str, store: Path | None = None, verb: str = "evaluate") -> Context:
    """Return the surroundings of a tiny run."""
    torch.set_num_threads(1)
    config = configure(root, *TINY, *overrides, verb=verb)
    config.paths.output.mkdir(parents=True, exist_ok=True)
    return Context(config, Store(store or config.paths.store), torch.device("cpu"))


def with_source(context: Context, source: ImageSource) -> Context:
    """The same data set, its training images from elsewhere."""
    data = replace(context.data(), train=source)
    context._loaded[context.config.dataset.model_dump_json()] = data
    return context


def as_files(folder: Path, context: Context) -> Context:
    """Its training images as files that are decoded when needed."""
    source = context.data().train
    for index in range(len(source)):
        write_png(source.image(index), str(folder / f"{index}.png"))
    names = [f"{index}.png" for index in range(len(source))]
    return with_source(context, FileSource(folder, names, source.labels, source.groups))


def same_files(one: Artifact, two: Artifact) -> bool:
    """Whether two artefacts hold the same files, byte by byte."""
    assert one.manifest["files"]
    return one.digest == two.digest and one.manifest["files"] == two.manifest["files"]


def small_network(classes: int = 4, width: int = 6, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions with BatchNorm whose running statistics are not those of any batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, classes),
        )
        for layer in (network[1], network[4]):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return network.eval().requires_grad_(False)


def random_pixels(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Return noise, [count, 3, size, size] uint8."""
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def mixed(images: Tensor, mix: Mix) -> Tensor:
    """Mix a batch [n, c, h, w] with itself, image by image: the reference for what is replayed."""
    top, left, bottom, right = mix.box
    result = []
    for image, partner in zip(images, images[mix.permutation], strict=True):
        blend = image.clone() if mix.weight == 1 else mix.weight * image + (1 - mix.weight) * partner
        blend[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
        result.append(blend)
    return torch.stack(result)


def training_arguments(network: nn.Module, **changes: Any) -> dict[str, Any]:
    """What every classifier's module needs, with a measurement that costs nothing."""
    return {
        "network": network,
        "name": "net",
        "seed": 0,
        "measure": lambda network: Accuracy(0.0, 0.0, 0.0),
        "measured_at": lambda epoch: False,
        "on_epoch": lambda epoch, row: None,
        **changes,
    }


def quiet_trainer(epochs: int, loader: DataLoader[Any] | None = None, device: str = "cpu") -> pl.Trainer:
    """Return a trainer that writes and shows nothing; without a loader modules bring batches every epoch."""
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1 if loader is None else 0,
    )


def fit(module: pl.LightningModule, loader: DataLoader[Any], epochs: int) -> pl.Trainer:
    """Train without a checkpoint."""
    trainer = quiet_trainer(epochs, loader)
    trainer.fit(module, loader)
    return trainer


def same_layer(one: nn.Module, other: nn.Module, images: Tensor) -> None:
    """Refuse two layers whose values, or gradients with respect to images in float64, differ."""
    results = []
    for layer in (one, other):
        leaf = images.clone().requires_grad_()
        out = layer(leaf)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def judged(voter: Voter, images: Tensor, r_bn: float = 0.3) -> tuple[Judgement, Tensor]:
    """Judge units, image k of which is of class k; return what was said, and the gradient of the images."""
    leaf, (units, count) = images.clone().requires_grad_(), images.shape[:2]
    said = judge(leaf, torch.arange(count).expand(units, count), voter, r_bn=r_bn, first_bn_multiplier=10.0)
    return said, torch.autograd.grad(said.value.sum(), leaf)[0]


def label_config(**changes: Any) -> LabelConfig:
    """A label recipe for batches of 8."""
    fields = {"name": "test", "teachers": "committee", "weights": "equal", "bn_mode": "batch", "epochs": 3}
    return LabelConfig.model_validate({**fields, "batch_size": 8, **changes})


def method_config(**changes: Any) -> MethodConfig:
    """A method of five iterations."""
    fields = {"name": "test", "seed": 0, "init": "noise", "iterations": 5, "jitter": 2, "classes_per_unit": 4}
    return MethodConfig.model_validate({**fields, **changes})


def protocol_config(**changes: Any) -> ProtocolConfig:
    """A student of two epochs."""
    return ProtocolConfig.model_validate({"name": "test", "epochs": 2, "lr": 0.01, "seeds": [0], **changes})
