"""The report of a multirun that was typed, whose points have numbers and not names."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cvdd.outcome import PointFailed, failure_kept
from cvdd.report.sweeps import progress, read_directory, write_report

RESULT = {
    "row": "cvdd",
    "student": "net",
    "protocol": "p",
    "n": 2,
    "top1_by_seed": [49.0, 51.0],
    "top1": 50.0,
    "std": 1.4142,
    "standard_error": 1.0,
    "best_top1": 52.0,
    "top5": 90.0,
    "loss": 1.0,
}


def test_a_point_that_failed_is_told_from_one_that_is_made(tmp_path: Path) -> None:
    config = {"hydra": {"overrides": {"task": ["ipc.images_per_class=1,2"]}, "job": {"name": "evaluate"}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "multirun.yaml")
    for number in ("0", "1"):
        (tmp_path / number / ".hydra").mkdir(parents=True)
        (tmp_path / number / ".hydra" / "overrides.yaml").write_text(f'["ipc.images_per_class={number}"]')
    with pytest.raises(PointFailed, match="no"), failure_kept(tmp_path / "0"):
        raise PointFailed("no such thing")
    sweep = read_directory(tmp_path)
    assert [(point.status, point.error) for point in sweep.points] == [
        ("failed", "no such thing"),
        ("not finished", ""),
    ]
    assert progress(sweep) == "0 of 2 points are done; 1 failed (0); 1 not finished (1)."
    with failure_kept(tmp_path / "0"):
        assert [point.status for point in read_directory(tmp_path).points] == ["not finished", "not finished"]


def test_a_full_disk_does_not_hide_why_a_point_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PointFailed, match="no such thing"), failure_kept(tmp_path):
        raise PointFailed("no such thing")


def test_a_multirun_that_was_typed_has_the_axes_that_differ(tmp_path: Path) -> None:
    config = {"hydra": {"overrides": {"task": ["temperature='1','5'", "seed=1"]}, "job": {"name": "evaluate"}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "multirun.yaml")
    for number, vote in enumerate(("1", "5")):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        typed = [f"temperature='{vote}'", "seed=1"]
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(json.dumps(typed))
    metrics = {"results": [RESULT], "code": {}}
    (tmp_path / "1" / "metrics.json").write_text(json.dumps(metrics))
    sweep = read_directory(tmp_path)
    assert sweep.axes == ("temperature",)
    assert [(point.at, point.status) for point in sweep.points] == [(("1",), "not finished"), (("5",), "done")]
    assert progress(sweep) == "1 of 2 points are done; 1 not finished (0)."
    assert "<svg" in write_report(tmp_path).read_text()
