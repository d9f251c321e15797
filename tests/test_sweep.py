"""Sweeps: their points compose, an interrupted one goes on, and the report tells what its directories hold."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from helpers import TINY
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cvdd.commands.sweep_callback import SweepCallback
from cvdd.composition.arguments import ArgumentError
from cvdd.composition.config_directory import config_directory
from cvdd.composition.sweep import STATE, SweepConfig, read_sweep, same_command, with_points
from cvdd.composition.validation import check
from cvdd.report.__main__ import main
from cvdd.report.sweep_plots import Cell, places, plot, standalone
from cvdd.report.sweeps import read_directory, write_report
from cvdd.support.config_base import ConfigError

ROOT = Path(__file__).parents[1]
CONF = config_directory()
NAMES = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def load(name: str) -> SweepConfig:
    config = OmegaConf.load(CONF / "sweep" / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    sweep = read_sweep(config)
    assert sweep is not None
    return sweep


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_composes_at_each_of_its_points(name: str, tmp_path: Path) -> None:
    sweep = load(name)
    with_points([f"sweep={name}"], CONF)
    places = [f"paths.{part}={tmp_path / part}" for part in ("data", "store", "output")]
    local = ["~local"] if (CONF / "local").is_dir() else []
    seen = []
    # Once for all points, because Hydra keeps the files that it has read.
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for point in sweep.points:
            config = check(hydra_compose("evaluate", [*places, *local, f"sweep={name}", f"+point='{point}'"]))
            assert config.protocol.seeds == [0, 1, 2]
            assert list(config.compare) == ([point] if sweep.points[point].row else [])
            seen.append(config.model_dump_json())
    # None is computed twice.
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_does_not_name_a_data_set(name: str, compose: Compose) -> None:
    with_points([f"sweep={name}"], CONF)
    chosen = ["dataset=cifar10", "committee=small", "recipe=cifar", "prior=cifar10", "students=small", "protocol=paper"]
    point = list(load(name).points)[-2]
    config = compose("evaluate", *chosen, f"sweep={name}", f"+point='{point}'")
    assert (config.dataset.name, config.protocol.name) == ("cifar10", "paper")


def test_points_set_what_their_names_say(compose: Compose) -> None:
    def at(sweep: str, point: str) -> Any:
        with_points([f"sweep={sweep}"], CONF)
        return compose("evaluate", f"sweep={sweep}", f"+point='{point}'")

    config = at("n_and_temperature", "N3_T0.5")
    assert (config.committee.size, config.temperature.vote, config.committee.voter) == (3, 0.5, "prior")
    assert at("n_and_temperature", "N2_random").committee.voter == "random"
    assert at("ipc", "ipc50").ipc.images_per_class == at("ipc", "ipc50").patches.images_per_class == 50
    assert at("lr_smoothing", "eta1.5").protocol.eta == 1.5
    left_out = at("members_left_out", "mobilenetv2").committee.fixed
    assert len(left_out) == 6
    assert "mobilenetv2" not in {member for pair in left_out for member in pair}
    row = at("batch_specific_labels", "random_real_running").compare["random_real_running"]
    assert row["label.bn_mode"] == "running"
    assert row["method.iterations"] == 0


def test_pairs_of_members_are_all_there() -> None:
    places = {frozenset(point.at) for point in load("member_pairs").points.values()}
    assert len(places) == 15
    assert sum(len(place) == 1 for place in places) == 5


# --- arguments --------------------------------------------------------------------------------------------------------


def test_the_points_stand_beside_the_sweep() -> None:
    assert with_points(["seed=1"], CONF) == ["seed=1"]
    assert with_points(["sweep=voter", "seed=1"], CONF) == [
        "sweep=voter",
        "+point='prior','equal','random','random_real'",
        "seed=1",
    ]
    assert with_points(["seed=1", "sweep=voter", "point=equal,prior"], CONF)[1:] == [
        "sweep=voter",
        "+point='equal','prior'",
    ]
    assert with_points(["sweep=voter", "--cfg", "job"], CONF) == ["sweep=voter", "--cfg", "job"]
    assert with_points(["sweep=nothing"], CONF) == ["sweep=nothing"]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["point=N1"], "choose one with sweep=NAME"),
        (["sweep=voter,ipc"], "choose one"),
        (["sweep=voter", "point=best"], "sweep=voter has the points prior, equal, random, random_real"),
        (["sweep=voter", "committee.voter=equal"], "sweep=voter varies committee.voter itself"),
        (["sweep=n_and_temperature", "temperature='2'"], "sweep=n_and_temperature varies temperature.vote itself"),
        (["sweep=ipc", "ipc='10'"], "sweep=ipc varies ipc.images_per_class itself"),
        (["sweep=voter", "seed=0,1"], "sweep=voter has its points already"),
        (["sweep=voter", "seed=range(3)"], "sweep=voter has its points already"),
        (["sweep=voter", "students=glob(*)"], "sweep=voter has its points already"),
    ],
)
def test_what_a_sweep_would_ignore_is_refused(arguments: list[str], answer: str) -> None:
    with pytest.raises(ArgumentError, match=answer):
        with_points(arguments, CONF)


@pytest.mark.parametrize(
    "argument", ["committee=small", "method.iterations=9", "protocol.seeds=[0,1]", "trainer=cpu", "label=resnet18"]
)
def test_what_a_sweep_leaves_open_is_taken(argument: str) -> None:
    assert argument in with_points(["sweep=n_and_temperature", argument], CONF)


@pytest.mark.parametrize(
    ("sweep", "problem"),
    [
        ("{title: a, axes: [x], plot: heat_map, points: {p: {at: [1]}}}", "two axes"),
        ("{title: a, axes: [x, y], points: {p: {at: [1]}}}", "a place on each of x, y"),
        ("{title: a, axes: [x], points: {a/b: {at: [1]}}}", "name is that of a directory"),
        ("{title: a, axes: [x], points: {p: {at: [1], setting: {}}}}", "setting"),
    ],
)
def test_a_sweep_of_ones_own_is_checked(sweep: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(f"hydra: {{callbacks: {{sweep: {sweep}}}}}\n")
    with pytest.raises(ArgumentError, match=problem):
        with_points(["sweep=mine", "--config-dir", str(tmp_path)], CONF)


def test_the_same_command_elsewhere_is_the_same() -> None:
    typed = ["sweep=voter", "+point='prior','equal'", "dataset=cifar10", "trainer.threads=1"]
    assert same_command(["dataset=cifar10", "sweep=voter", "+point='equal'", "paths.store=x"], typed)
    assert not same_command(["sweep=voter", "+point='equal'"], typed)


# --- the report -------------------------------------------------------------------------------------------------------

SQUARE = """# @package _global_
hydra:
  mode: MULTIRUN
  sweep: {dir: multirun/square, subdir: "${hydra:runtime.choices.point}"}
  callbacks:
    sweep:
      _target_: cvdd.commands.sweep_callback.SweepCallback
      title: A square
      axes: [eta, N]
      plot: heat_map
      points:
        N1_eta1: {at: [1, 1], settings: {committee: {size: 1}, protocol: {eta: 1}}}
        N9: {at: [null, 9], settings: {committee: {size: 9}}}
        N1_eta2: {at: [2, 1], settings: {committee: {size: 1}, protocol: {eta: 2}}}
        N2_eta1: {at: [1, 2], settings: {committee: {size: 2}, protocol: {eta: 1}}}
        N2_eta2: {at: [2, 2], settings: {committee: {size: 2}, protocol: {eta: 2}}, row: {method.iterations: 0}}
"""


def rows_of(directory: Path) -> dict[str, dict[str, str]]:
    with (directory / "results.csv").open() as file:
        return {row["point"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_ends_in_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "square.yaml").write_text(SQUARE)
    command = [
        *(sys.executable, str(ROOT / "evaluate.py"), "--config-dir", "mine", "sweep=square", *TINY),
        *("protocol.seeds=[0,1]", "label.teachers=[resnet18]", "method.iterations=2", "trainer.threads=1"),
    ]
    sweep = tmp_path / "multirun" / "square"

    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        begun = time.monotonic()
        while not (sweep / "N1_eta2" / STATE).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() - begun < 300
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert main([str(sweep)]) == 0
    told = capsys.readouterr().out
    assert "1 of 5 points are done; 1 failed (N9); 1 not finished (N1_eta2); 2 missing (N2_eta1, N2_eta2)." in told
    assert {name: row["status"] for name, row in rows_of(sweep).items()} == {
        "N1_eta1": "done",
        "N9": "failed",
        "N1_eta2": "not finished",
        "N2_eta1": "missing",
        "N2_eta2": "missing",
    }
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/*/manifest.json")}
    assert made

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 of 5 points are done; 1 failed (N9)." in (sweep / "table.md").read_text()
    rows = rows_of(sweep)
    for name, row in rows.items():
        if name == "N9":
            assert "committee.size=9" in row["error"]
            continue
        metrics = json.loads((sweep / name / "metrics.json").read_text())
        (result,) = [one for one in metrics["results"] if one["row"] == ("N2_eta2" if name == "N2_eta2" else "cvdd")]
        one, other = result["top1_by_seed"]
        assert float(row["top1"]) == pytest.approx((one + other) / 2)
        assert float(row["standard_error"]) == pytest.approx(abs(one - other) / 2)
        assert bool(row["agreement"]) == (name == "N2_eta1")
        assert row["eta"] == name[-1]
        assert row["N"] == name[1]
        assert f"{statistics.fmean((one, other)):.1f} \u00b1" in (sweep / "report.html").read_text()
    # Nothing that the first command finished was made again.
    assert {path: path.stat().st_mtime_ns for path in made} == made


def result(student: str = "net", row: str = "cvdd", **changes: Any) -> dict[str, Any]:
    numbers = {"n": 2, "top1": 50.0, "std": 1.4142, "standard_error": 1.0, "best_top1": 52.0, "top5": 90.0, "loss": 1.0}
    return {"row": row, "student": student, "protocol": "p", "top1_by_seed": [49.0, 51.0], **numbers, **changes}


@pytest.fixture
def voter(tmp_path: Path) -> Path:
    """A directory of sweep=voter, as it begins."""
    config = OmegaConf.load(CONF / "sweep" / "voter.yaml")
    config.hydra.overrides = {"task": ["sweep=voter", "+point='prior','equal'", "seed=1"]}
    config.hydra.job = {"name": "evaluate"}
    OmegaConf.save(config, tmp_path / "multirun.yaml")
    return tmp_path


def leave(directory: Path, point: str, status: str, *results: dict[str, Any], **changes: Any) -> None:
    state = {"point": point, "status": status, "error": "", "node": load("voter").node(point)}
    state |= {"overrides": ["sweep=voter", f"+point='{point}'", "seed=1"], **changes}
    (directory / point).mkdir()
    (directory / point / STATE).write_text(json.dumps(state))
    if results:
        metrics = {"results": list(results), "code": {"commit": "0123456789abcdef"}}
        (directory / point / "metrics.json").write_text(json.dumps(metrics))


def test_the_report_of_a_running_sweep_shows_what_is_missing(voter: Path) -> None:
    leave(voter, "prior", "done", result())
    leave(voter, "equal", "failed", error="no BatchNorm <layers> in it\nsecond line")
    leave(voter, "random", "running")
    page = write_report(voter).read_text()
    assert "1 of 4 points are done; 1 failed (equal); 1 not finished (random); 1 missing (random_real)." in page
    assert 'colspan="11"><div class="reason">failed: no BatchNorm &lt;layers&gt; in it' in page
    assert "python evaluate.py sweep=voter seed=1" in page
    table = (voter / "table.md").read_text().splitlines()
    assert "| prior | prior | cvdd | net | p | 2 | 50.0 \u00b1 1.0 | 52.0 | 90.0 | - | - | done |" in table
    assert "| equal | equal |  |  |  |  |  |  |  |  |  | failed: no BatchNorm <layers> in it second line |" in table
    assert rows_of(voter)["equal"]["error"] == "no BatchNorm <layers> in it"
    assert (voter / "plot-net.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_a_callback_notes_how_far_a_point_is_and_writes_the_report(voter: Path) -> None:
    whole = OmegaConf.load(voter / "multirun.yaml")
    arguments = {key: value for key, value in whole.hydra.callbacks.sweep.items() if key != "_target_"}
    callback = SweepCallback(**arguments)
    callback.on_multirun_start(whole)

    def job(point: str) -> DictConfig:
        runtime = {"output_dir": str(voter / point), "choices": {"point": point}}
        return OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "runtime": runtime}})

    def statuses() -> list[str]:
        return [point.status for point in read_directory(voter).points]

    callback.on_job_start(job("equal"))
    assert statuses() == ["missing", "not finished", "missing", "missing"]
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ConfigError("temperature.vote=0: must be greater than 0")
    callback.on_job_end(job("equal"), failed)
    assert "temperature.vote=0: must be greater than 0" in (voter / "report.html").read_text()
    callback.on_job_start(job("prior"))
    (voter / "prior" / "metrics.json").write_text(json.dumps({"results": [result()], "code": {}}))
    callback.on_job_end(job("prior"), JobReturn(status=JobStatus.COMPLETED))
    assert statuses() == ["done", "failed", "missing", "missing"]
    assert rows_of(voter)["prior"]["top1"] == "50.0"


def test_a_point_of_a_verb_without_students_is_done_all_the_same(voter: Path) -> None:
    leave(voter, "prior", "done")
    assert read_directory(voter).points[0].status == "done"
    assert (
        "| prior | prior |  |  |  |  |  |  |  |  |  | done |" in (write_report(voter).parent / "table.md").read_text()
    )


def test_a_report_without_any_result_yet(voter: Path) -> None:
    assert "0 of 4 points are done" in write_report(voter).read_text()


def test_what_another_command_left_does_not_count(voter: Path) -> None:
    leave(voter, "prior", "done", result(), overrides=["sweep=voter", "+point='prior'", "seed=2"])
    leave(voter, "equal", "done", result(), node={"committee": {"voter": "random"}})
    leave(voter, "random", "running", result())
    assert [point.status for point in read_directory(voter).points] == ["missing", "missing", "not finished", "missing"]


def test_a_point_of_a_row_shows_that_row_for_each_student(voter: Path) -> None:
    rows = [result("a"), result("b"), result("a", "random_real", top1=30.0), result("b", "random_real", top1=20.0)]
    leave(voter, "random_real", "done", *rows)
    sweep = read_directory(voter)
    assert sweep.students() == ["a", "b"]
    assert [one["top1"] for one in sweep.points[-1].results] == [30.0, 20.0]
    assert write_report(voter).read_text().count("<svg") == 2


def test_a_directory_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no multirun.yaml"):
        read_directory(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "no multirun.yaml" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


# --- the plots --------------------------------------------------------------------------------------------------------


def cell(*at: str | None, mean: float | None = 50.0, word: str = "") -> Cell:
    return Cell(at, mean, None if mean is None else 1.0, (), word)


def test_numbers_on_an_axis_are_in_order_and_names_follow() -> None:
    cells = [cell("equal"), cell("10"), cell(None), cell("0.5"), cell("random"), cell("2")]
    assert places(cells, 0) == ["0.5", "2", "10", "equal", "random"]


@pytest.mark.parametrize("kind", ["curve", "heat_map"])
def test_points_without_a_number_show_their_word(kind: Any) -> None:
    cells = [cell("1", "a"), cell("2", "a", mean=None, word="failed"), cell(None, "b"), cell("2", "c", mean=40.0)]
    picture = plot(kind, ["x", "y"], cells, "test", "net")
    assert (">1 failed<" if kind == "curve" else ">failed<") in picture
    assert (">50.0 \u00b1 1.0<" in picture) == (kind == "heat_map")


def test_a_picture_of_its_own_carries_its_colours() -> None:
    picture = plot("curve", ["x"], [cell("1"), cell("2")], "test", "net")
    used = {part.split(")")[0] for part in picture.split("var(")[1:]}
    style = standalone(picture).partition("</style>")[0]
    assert used
    assert all(f"{name}:" in style for name in used)
