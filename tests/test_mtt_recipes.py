"""The published settings of trajectory matching as recipes, against the tables of its specification."""

from __future__ import annotations

import pytest
from conftest import Compose

from cvdd.composition.config_directory import config_directory

ROWS = {
    # IPC, N, M, max_start_epoch, lr_img, lr_lr, alpha_0, batch_syn, zca, depth, accuracy (sections 3.1, 3.2 and 5)
    "cifar10_ipc1": (1, 50, 2, 2, 100, 1e-7, 0.01, None, True, 3, None),
    "cifar10_ipc10": (10, 30, 2, 20, 100, 1e-5, 0.001, None, True, 3, 56.4),
    "cifar10_ipc50": (50, 30, 2, 40, 1000, 1e-5, 0.001, None, False, 3, 65.9),
    "cifar100_ipc1": (1, 20, 3, 20, 1000, 1e-5, 0.01, None, True, 3, 13.8),
    "cifar100_ipc10": (10, 20, 2, 20, 1000, 1e-5, 0.01, None, False, 3, 33.1),
    "cifar100_ipc50": (50, 80, 2, 40, 1000, 1e-5, 0.01, 125, True, 3, 42.9),
    "tiny_imagenet_ipc1": (1, 10, 2, 10, 10000, 1e-4, 0.01, None, False, 4, None),
    "tiny_imagenet_ipc10": (10, 20, 2, 40, 10000, 1e-4, 0.01, 200, False, 4, None),
    "tiny_imagenet_ipc50": (50, 20, 2, 40, 10000, 1e-4, 0.01, 300, False, 4, 28.0),
    "imagenette_ipc1": (1, 20, 2, 10, 1000, 1e-6, 0.01, None, False, 5, None),
    "imagenette_ipc10": (10, 20, 2, 10, 1000, 1e-6, 0.01, 20, False, 5, 64.0),
    "imagefruit_ipc1": (1, 20, 2, 10, 1000, 1e-6, 0.01, None, False, 5, None),
    "imagesquawk_texture_ipc1": (1, 20, 2, 10, 1000, 1e-6, 0.01, None, False, 5, None),
}


def test_every_recipe_is_a_row() -> None:
    recipes = {path.stem.removeprefix("mtt_") for path in (config_directory() / "experiment").glob("mtt_*.yaml")}
    assert recipes == {*ROWS, "smallest"}


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_its_row(name: str, compose: Compose) -> None:
    config = compose("evaluate", f"experiment=mtt_{name}")
    mtt = config.method.mtt
    assert mtt is not None
    ipc, steps, target, start, lr_images, lr_step_size, step_size, batch_size, zca, depth, value = ROWS[name]
    assert config.ipc.images_per_class == ipc
    assert (mtt.steps, mtt.target_epochs, mtt.start_epochs) == (steps, target, start)
    assert (mtt.lr_images, mtt.lr_step_size, mtt.step_size) == (lr_images, lr_step_size, step_size)
    assert (mtt.batch_size, mtt.whitening, mtt.momentum, config.method.iterations) == (batch_size, zca, 0.5, 5001)
    assert (config.protocol.student, config.label.teachers) == ("method", "none")
    assert config.protocol.seeds == [0, 1, 2, 3, 4]
    experts, student = mtt.experts, mtt.student
    assert (experts.count, experts.epochs, experts.batch_size, experts.lr) == (100, 50, 256, 0.01)
    assert (experts.momentum, experts.weight_decay, experts.drop) == (0, 0, False)
    assert (student.epochs, student.batch_size, student.momentum, student.weight_decay) == (1001, 256, 0.9, 5e-4)
    (network,) = config.students.values()
    for backbone in (network, experts.backbone):
        assert backbone.arguments == {"depth": depth, "width": 128, "norm": "instance"}
    assert config.dataset.image_size == 2 ** (depth + 2)
    assert config.method.flip
    assert mtt.canvas == (2 if "texture" in name else 1)
    assert config.method.init == ("noise" if "texture" in name else "real")
    assert (config.expected.value if config.expected else None) == value
