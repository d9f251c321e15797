"""Sweeps: what their callback leaves in a point's directory, and what their page shows of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import cvdd.report.sweeps
from cvdd.artifact.files import write_atomically
from cvdd.commands.sweep_callback import SweepCallback
from cvdd.composition.config_directory import config_directory
from cvdd.composition.sweep import STATE, SweepConfig
from cvdd.report.sweeps import Sweep, read_directory, write_report


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


def job(folder: Path, **settings: object) -> DictConfig:
    runtime = {"output_dir": str(folder), "choices": {"point": folder.name}}
    return OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "runtime": runtime}, **settings})


def measured(folder: Path, top1: float) -> None:
    """What evaluate leaves."""
    result = {"row": "cvdd", "student": "net", "protocol": "p", "n": 1, "top1": top1, "top1_by_seed": [top1]}
    result |= {"std": None, "standard_error": None, "best_top1": top1, "top5": 90.0, "loss": 1.0}
    (folder / "metrics.json").write_text(json.dumps({"results": [result], "code": {}}))


def typed(sweep: DictConfig, directory: Path, verb: str, *overrides: str) -> SweepCallback:
    """Begin another command in the directory of a sweep."""
    sweep.hydra.overrides.task = ["sweep=voter", *overrides]
    sweep.hydra.job.name = verb
    OmegaConf.save(sweep, directory / "multirun.yaml")
    return begun(sweep)


def statuses(directory: Path) -> list[str]:
    return [point.status for point in read_directory(directory).points]


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


def made_once(sweep: DictConfig, directory: Path) -> Path:
    """Make a point by a command that gives seed=1; its students reach 51.5 %."""
    point, callback = directory / "prior", typed(sweep, directory, "evaluate", "seed=1")
    callback.on_job_start(job(point))
    measured(point, 51.5)
    callback.on_job_end(job(point), JobReturn(status=JobStatus.COMPLETED))
    return point


def test_numbers_of_an_earlier_command_are_not_shown_as_those_of_the_next(sweep: DictConfig, tmp_path: Path) -> None:
    point, done = made_once(sweep, tmp_path), JobReturn(status=JobStatus.COMPLETED)
    assert statuses(tmp_path) == ["done", "missing", "missing", "missing"]
    assert "51.5" in (tmp_path / "report.html").read_text()
    # The same verb with something else, and something else with the same overrides.
    for verb, overrides in (("evaluate", ["seed=1", "protocol.epochs=9"]), ("distill", ["seed=1"])):
        callback = typed(sweep, tmp_path, verb, *overrides)
        assert statuses(tmp_path) == ["missing"] * 4
    callback.on_job_start(job(point))
    assert not (point / "metrics.json").exists()
    callback.on_job_end(job(point), done)
    assert statuses(tmp_path) == ["done", "missing", "missing", "missing"]
    assert "51.5" not in (tmp_path / "report.html").read_text()
    typed(sweep, tmp_path, "evaluate", "seed=1")
    assert statuses(tmp_path) == ["missing"] * 4


def test_a_report_is_of_what_is_there_when_it_is_written(
    sweep: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another point ends, and writes its report, after this one has looked and before it writes."""
    callback, other = typed(sweep, tmp_path, "evaluate", "seed=1"), typed(sweep, tmp_path, "evaluate", "seed=1")
    done = JobReturn(status=JobStatus.COMPLETED)
    callback.on_job_start(job(tmp_path / "prior"))
    other.on_job_start(job(tmp_path / "equal"))
    draw, ends = cvdd.report.sweeps.csv_table, ["equal"]

    def between(seen: Sweep) -> str:
        table = draw(seen)
        if ends:
            other.on_job_end(job(tmp_path / ends.pop()), done)
        return table

    monkeypatch.setattr(cvdd.report.sweeps, "csv_table", between)
    callback.on_job_end(job(tmp_path / "prior"), done)
    assert "not finished" not in (tmp_path / "results.csv").read_text()
    assert "2 of 4 points are done; 2 missing" in (tmp_path / "report.html").read_text()
    assert "2 of 4 points are done; 2 missing" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "file").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_question_about_the_cost_changes_nothing(sweep: DictConfig, tmp_path: Path) -> None:
    point, done = made_once(sweep, tmp_path), JobReturn(status=JobStatus.COMPLETED)
    noted = {path: path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()}
    for overrides, status in ((["seed=1"], "done"), (["seed=1", "protocol.epochs=9"], "missing")):
        callback = typed(sweep, tmp_path, "evaluate", *overrides, "cost=true")
        callback.on_job_start(job(point, cost=True))
        callback.on_job_end(job(point, cost=True), done)
        assert statuses(tmp_path) == [status, "missing", "missing", "missing"]
    # Hydra's own file is of the last command.
    assert {path for path, text in noted.items() if path.read_text() != text} == {tmp_path / "multirun.yaml"}


def test_a_repeated_command_finds_again_what_is_done(sweep: DictConfig, tmp_path: Path) -> None:
    for top1 in (51.5, 51.5):
        callback = typed(sweep, tmp_path, "evaluate", "seed=1")
        for name in ("prior", "equal"):
            callback.on_job_start(job(tmp_path / name))
            measured(tmp_path / name, top1)
            callback.on_job_end(job(tmp_path / name), JobReturn(status=JobStatus.COMPLETED))
        assert statuses(tmp_path) == ["done", "done", "missing", "missing"]


def test_the_page_does_not_show_the_directories_of_the_machine(sweep: DictConfig, tmp_path: Path) -> None:
    callback, failed = begun(sweep), JobReturn(status=JobStatus.FAILED)
    failed.return_value = FileNotFoundError("dataset.root=/home/alice/raw is not there")
    callback.on_job_start(job(tmp_path / "prior"))
    callback.on_job_end(job(tmp_path / "prior"), failed)
    page = write_report(tmp_path).read_text()
    assert "failed: dataset.root=&lt;elsewhere&gt;/raw is not there" in page
    assert "python evaluate.py sweep=voter dataset.root=&lt;elsewhere&gt;/raw" in page
    assert not [
        path for path in tmp_path.iterdir() if path.suffix in (".csv", ".md", ".html") and "alice" in path.read_text()
    ]


def test_places_that_are_directories_stay_different(sweep: DictConfig, tmp_path: Path) -> None:
    places = ["/home/alice/raw", "/home/bob/raw", 3, None]
    for point, place in zip(("prior", "equal", "random", "random_real"), places, strict=True):
        sweep.hydra.callbacks.sweep.points[point].at = [place]
    OmegaConf.save(sweep, tmp_path / "multirun.yaml")
    shown = [point.at for point in read_directory(tmp_path).points]
    assert shown == [("<elsewhere>/raw",), ("<elsewhere>/raw (2)",), ("3",), (None,)]


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", ""])
def test_a_point_cannot_lead_out_of_its_sweep(name: str) -> None:
    with pytest.raises(ValueError, match="a point's name is that of a directory"):
        SweepConfig.model_validate({"title": "t", "axes": ["x"], "points": {name: {"at": [1]}}})
