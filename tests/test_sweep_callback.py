"""Sweeps: what their callback leaves in a point's directory, and what their page shows of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cvdd.cli import config_directory
from cvdd.report.sweeps import write_report
from cvdd.sweep import STATE, SweepCallback, SweepConfig


@pytest.fixture
def sweep(tmp_path: Path) -> DictConfig:
    """The configuration of sweep=voter, whose directory begins."""
    config = OmegaConf.load(config_directory() / "sweep" / "voter.yaml")
    assert isinstance(config, DictConfig)
    config.hydra.overrides = {"task": ["sweep=voter", "+point='prior','equal'", "dataset.root=/home/alice/raw"]}
    config.hydra.job = {"name": "evaluate"}
    OmegaConf.save(config, tmp_path / "multirun.yaml")
    return config


def begun(sweep: DictConfig) -> SweepCallback:
    callback = SweepCallback(**{key: value for key, value in sweep.hydra.callbacks.sweep.items() if key != "_target_"})
    callback.on_multirun_start(sweep)
    return callback


def job(folder: Path) -> DictConfig:
    runtime = {"output_dir": str(folder), "choices": {"point": folder.name}}
    return OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "runtime": runtime}})


@pytest.mark.parametrize(
    "environment", [{"SLURM_PROCID": "1"}, {"RANK": "1", "LOCAL_RANK": "0"}, {"RANK": "1", "SLURM_PROCID": "0"}]
)
def test_of_the_ranks_of_a_point_only_the_first_notes_it(
    environment: dict[str, str], sweep: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's seconds are the same ones again, and it may end before the first has written the results."""
    point, done = tmp_path / "prior", JobReturn(status=JobStatus.COMPLETED)
    first, other = begun(sweep), begun(sweep)
    first.on_job_start(job(point))
    noted = (point / STATE).read_text()
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        other.on_job_start(job(point))
        other.on_job_end(job(point), done)
    assert (point / STATE).read_text() == noted
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    first.on_job_end(job(point), done)
    assert json.loads((point / STATE).read_text())["status"] == "done"
    assert (tmp_path / "report.html").exists()


def test_the_page_does_not_show_the_directories_of_the_machine(sweep: DictConfig, tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert "python evaluate.py sweep=voter dataset.root=&lt;elsewhere&gt;/raw" in page
    assert "alice" not in page


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", ""])
def test_a_point_cannot_lead_out_of_its_sweep(name: str) -> None:
    with pytest.raises(ValueError, match="a point's name is that of a directory"):
        SweepConfig.model_validate({"title": "t", "axes": ["x"], "points": {name: {"at": [1]}}})
