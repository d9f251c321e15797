"""Recipes of prediction matching, held against its transcribed table of hyper-parameters."""

from __future__ import annotations

import csv

import pytest
from conftest import Compose

from cvdd.composition.config_directory import config_directory

CONF = config_directory()
with (CONF / "reference" / "apm.csv").open(newline="") as file:
    TABLE = {f"apm_table_a9_{row['dataset']}_ipc{row['ipc']}": row for row in csv.DictReader(file)}


def test_every_row_has_a_recipe() -> None:
    assert {path.stem for path in (CONF / "experiment").glob("apm_table_a9_*.yaml")} == set(TABLE)
    assert len(TABLE) == 12


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_agrees_with_its_row(name: str, compose: Compose) -> None:
    row, config = TABLE[name], compose("evaluate", f"experiment={name}")
    method, apm = config.method, config.method.apm
    assert apm is not None
    assert (config.dataset.name, config.ipc.images_per_class) == (row["dataset"], int(row["ipc"]))
    assert (apm.lr_images, apm.ce, apm.surrogate.gap) == (float(row["lr_img"]), float(row["ce"]), int(row["mid_gap"]))
    assert apm.surrogate.lr == apm.student.lr == float(row["lr_net"])
    # The release counts from 0 to its numbers inclusively.
    counts = (method.iterations - 1, apm.surrogate.epochs - 1, apm.student.epochs - 1)
    assert counts == (int(row["iteration"]), int(row["s_epoch"]), int(row["epoch_eval_train"]))
    assert apm.whitening == (row["zca"] == "true")
    assert apm.batch_size == (None if row["batch_syn"] == "full" else int(row["batch_syn"]))
    # What the table leaves to the release's defaults, and its command for teachers.
    assert (apm.surrogate.snapshots, apm.momentum, apm.factor) == (5, 0.5, 0.3)
    assert (apm.teachers.count, apm.teachers.epochs, apm.teachers.lr, apm.teachers.drop) == (100, 100, 0.05, 50)
    size, depth = (32, 3) if row["model"] == "convnet3" else (64, 4)
    backbone = apm.teachers.backbone
    assert config.dataset.image_size == size
    assert backbone.arguments == {"depth": depth, "width": 128, "norm": "instance"}
    assert list(config.students.values()) == [backbone]
    assert method.flip
    assert f"#   python evaluate.py experiment={name}\n" in (CONF / "experiment" / f"{name}.yaml").read_text()
