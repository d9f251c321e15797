"""The numbers of a result that stand in tables, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_context

from cvdd.artifact import Artifact
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.chain.labels import Labels
from cvdd.chain.students import make_student
from cvdd.chain.training import load_curve, save_student

pytest_plugins = ["chain_fixtures"]


def artifact(kind: str, name: str, seconds: float, metrics: dict[str, float], files: dict[str, Any]) -> Artifact:
    cost = {"wall_seconds": seconds, "process_seconds": 2 * seconds, "peak_memory_bytes": 3 * 2**20}
    return Artifact(Path(name), {"kind": kind, "metrics": metrics, "cost": cost, "files": files, "parents": []})


def student(seed: int, seconds: float, top1: float, best: float, top5: float, loss: float) -> Artifact:
    metrics = {"top1": top1, "best_top1": best, "top5": top5, "loss": loss}
    return artifact("students", f"student{seed}", seconds, metrics, {})


def test_a_summary_has_means_over_seeds_and_the_spread_of_a_sample(tmp_path: Path) -> None:
    images = artifact("images", "images", 40.0, {"images": 20}, {"drawn.safetensors": {"bytes": 700}})
    stored = artifact("labels", "labels", 5.0, {}, {"logits": {"bytes": 900}})
    labels = Labels({}, [images], stored, tiny_context(tmp_path), images, [], {})
    students = (student(0, 10.0, 60.0, 61.0, 90.0, 1.0), student(1, 30.0, 64.0, 67.0, 96.0, 2.0))
    summary = Result("cvdd", "small", "short", (0, 1), students, images, labels, of_method=True).summary()
    means = {"top1": 62.0, "best_top1": 64.0, "top5": 93.0, "loss": 1.5, "student_seconds": 20.0}
    assert {name: summary[name] for name in means} == means
    # Deviations of 2 each: 8 divided by one seed less than there are, and that divided by two seeds.
    assert summary["std"] == pytest.approx(8**0.5)
    assert summary["standard_error"] == pytest.approx(2)
    assert summary["top1_by_seed"] == [60.0, 64.0]
    assert (summary["image_count"], summary["image_bytes"], summary["label_bytes"]) == (20, 700, 900)
    assert (summary["image_seconds"], summary["image_process_seconds"]) == (40.0, 80.0)
    assert summary["image_peak_memory_bytes"] == 3 * 2**20
    assert (summary["images"], summary["students"]) == ("images", ["student0", "student1"])


def test_a_single_seed_has_no_spread() -> None:
    summary = Result("full", "small", "short", (0,), (student(0, 10.0, 60.0, 61.0, 90.0, 1.0),), None, None).summary()
    assert (summary["std"], summary["standard_error"]) == (None, None)
    assert (summary["image_seconds"], summary["image_bytes"], summary["images"]) == (None, None, None)


def test_the_best_epoch_of_a_student_need_not_be_its_last(tmp_path: Path) -> None:
    """After the second of four epochs nothing was measured."""
    curve = [
        {"epoch": 1, "train_loss": 1.0, "top1": 50.0, "top5": 80.0, "loss": 1.5},
        {"epoch": 2, "train_loss": 0.9},
        {"epoch": 3, "train_loss": 0.8, "top1": 70.0, "top5": 85.0, "loss": 1.1},
        {"epoch": 4, "train_loss": 0.7, "top1": 60.0, "top5": 90.0, "loss": 1.3},
    ]
    metrics = save_student(tmp_path, curve)
    assert metrics == {"top1": 60.0, "top5": 90.0, "loss": 1.3, "best_top1": 70.0, "best_epoch": 3}
    assert load_curve(Artifact(tmp_path, {})) == curve


def test_a_student_is_measured_as_often_as_the_protocol_says(
    made: tuple[Distilled, Result], again: Callable[..., Context]
) -> None:
    context = again().differing({"protocol.eval_every": 2}, "")
    ((name, backbone),) = context.config.students.items()
    curve = load_curve(make_student(context, made[0].labels, name, backbone, 0))
    assert [row["epoch"] for row in curve] == [1, 2, 3]
    assert [row["epoch"] for row in curve if "top1" in row] == [2, 3]
