"""The view of a running sweep: what directories, the store and its claims say, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

import cvdd.artifact.claims
import cvdd.report.watch
from cvdd.artifact import Store
from cvdd.artifact.claims import Leases
from cvdd.artifact.parts import FINISHED, OPEN, TAKEN, Table
from cvdd.artifact.sessions import FOLDER
from cvdd.artifact.uses import used_by
from cvdd.composition.sweep import STATE
from cvdd.report.__main__ import main
from cvdd.report.watch import Row, View, Watch, Work, show, watch_sweeps
from cvdd.running.jobs import JOB, read_job, sign_in
from cvdd.support.outcome import outcome_kept

POINTS = ("a", "b", "c", "d", "e")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of five points over ipc; nothing has begun."""
    points = {name: {"at": [index], "settings": {"seed": index}} for index, name in enumerate(POINTS)}
    callback = {
        "_target_": "cvdd.commands.sweep_callback.SweepCallback",
        "title": "Trial",
        "axes": ["seed"],
        "points": points,
    }
    tree = {
        "hydra": {
            "callbacks": {"sweep": callback},
            "job": {"name": "evaluate"},
            "overrides": {"task": ["sweep=trial"]},
        }
    }
    directory = tmp_path / "trial"
    directory.mkdir()
    OmegaConf.save(OmegaConf.create(tree), directory / "multirun.yaml")
    return directory


def leave(sweep: Path, point: str, status: str, **more: Any) -> Path:
    state = {"point": point, "status": status, "error": "", "node": {"seed": POINTS.index(point)}}
    folder = sweep / point
    folder.mkdir(parents=True)
    (folder / STATE).write_text(json.dumps(state | {"overrides": ["sweep=trial"]} | more))
    return folder


def begin(store: Store, kind: str, name: str, states: bytes = b"", seconds: tuple[float, ...] = ()) -> Path:
    """What a process leaves while it makes an artefact."""
    work = store.root / kind / ".partial" / name
    (work / FOLDER).mkdir(parents=True)
    store._uses.note(work)
    if states:
        Table(work).path.write_bytes(states)
    for index, value in enumerate(seconds):
        (work / FOLDER / f"{index}.txt").write_text(str(value))
    return work


def printed(view: View) -> str:
    stream = io.StringIO()
    show(view, Console(file=stream, width=200))
    return stream.getvalue()


def test_a_sweep_at_work(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points took 300 s and 500 s, one failed, one is at work for 100 s, one waits: 300 s and 400 s are left."""
    leave(sweep, "a", "done", seconds=300.0)
    leave(sweep, "b", "done", seconds=500.0)
    leave(sweep, "c", "failed", seconds=1.0)
    folder = leave(sweep, "d", "running", seconds=0.0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    store = Store(tmp_path / "store")
    sign_in(folder, store)
    os.utime(folder / JOB, (time.time() - 100, time.time() - 100))
    states = bytes([FINISHED] * 6 + [TAKEN] * 2 + [OPEN] * 4)
    begin(store, "members", "given-up")
    begin(store, "images", "digits-ipc10", states, seconds=(40.0, 20.0))
    view = Watch().look(sweep)
    (row,) = view.rows
    assert (view.mean, view.working, view.over) == (400.0, 1, False)
    assert (row.point, row.alive, row.seconds) == ("d", True, pytest.approx(100, abs=5))
    assert row.job == f"SLURM 77_3, {os.uname().nodename} process {os.getpid()}"
    # 60 s for 6 parts, two at once: a part in 5 s, and 6 are missing.
    assert row.work == Work("images/digits-ipc10", 6, 12, 2, 10.0)
    assert (row.work.rate, row.work.left) == (pytest.approx(0.2), pytest.approx(30.0))
    assert view.left == pytest.approx(700, abs=5)
    text = printed(view)
    assert "Trial: 2 of 5 points done, 1 at work, 1 failed, 1 not begun; 7 min a point, 9/h, about 12 min left" in text
    (line,) = (line for line in text.splitlines() if "digits-ipc10" in line)
    for cell in ("d ", "SLURM 77_3", "100 s", "images/digits-ipc10", "6 of 12", "12/min", "30 s"):
        assert cell in line


def test_a_job_that_ended_is_told_from_one_that_works(sweep: Path, tmp_path: Path) -> None:
    folder = leave(sweep, "a", "running")
    store = Store(tmp_path / "store")
    sign_in(folder, store)
    watch = Watch()
    assert [(row.alive, row.work) for row in watch.look(sweep).rows] == [(True, None)]
    work = begin(store, "members", "m-1")
    assert [(row.alive, row.work) for row in watch.look(sweep).rows] == [(True, Work("members/m-1"))]
    assert "in one piece" in printed(watch.look(sweep))
    work.rename(store.root / "members" / "m-1")
    assert watch.look(sweep).rows[0].work is None
    job = read_job(folder)
    assert job is not None
    users = tmp_path / "store" / ".users"
    # What an orderly end does.
    for file in users.glob(f"{job.user}.*"):
        file.unlink()
    view = watch.look(sweep)
    assert [(row.point, row.alive, row.seconds, row.job) for row in view.rows] == [("a", False, None, job.name)]
    assert (view.working, view.left, view.over) == (0, None, False)
    text = printed(view)
    assert "0 of 5 points done, 0 at work, 1 interrupted, 4 not begun; nobody works" in text
    # After a kill the list stays and nobody holds its lock.
    (users / f"{job.user}.txt").write_text("images/.partial/x\n")
    assert used_by(tmp_path / "store", cvdd.artifact.claims.Locks(), job.user) is None


def test_leases_are_watched_for_a_while(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvdd.report.watch, "claims_for", lambda root: Leases(beat=60, silence=0.05))
    folder = leave(sweep, "a", "running")
    users = tmp_path / "store" / ".users"
    users.mkdir(parents=True)
    (users / "dead.txt").write_text("")
    (users / "dead.lock.0").write_text("elsewhere 1\n")
    job = {"host": "elsewhere", "process": 1, "cluster": None, "store": str(tmp_path / "store"), "user": "dead"}
    (folder / JOB).write_text(json.dumps(job))
    watch = Watch()
    assert [(row.alive, row.job) for row in watch.look(sweep).rows] == [(True, "elsewhere process 1")]
    time.sleep(0.1)
    assert [row.alive for row in watch.look(sweep).rows] == [False]


def test_jobs_that_share_a_point_have_a_row_each(sweep: Path, tmp_path: Path) -> None:
    folder = leave(sweep, "b", "running")
    store = Store(tmp_path / "store")
    for place in (folder, folder / "workers" / "1", folder / "workers" / "2"):
        place.mkdir(parents=True, exist_ok=True)
        sign_in(place, store)
    job = json.loads((folder / JOB).read_text())
    (folder / "workers" / "2" / JOB).write_text(json.dumps(job | {"user": "gone", "process": 5}))
    rows = Watch().look(sweep).rows
    assert [(row.point, row.alive) for row in rows] == [("b", True), ("b", True)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}'])
def test_a_job_file_that_says_nothing(text: str, sweep: Path) -> None:
    folder = leave(sweep, "a", "running")
    (folder / JOB).write_text(text)
    assert Watch().look(sweep).rows == (Row("a", "", False, None, None),)


def test_points_without_names(tmp_path: Path) -> None:
    """The files of a finished point are 40 s apart, and nobody knows who makes the other one."""
    tree = {"hydra": {"job": {"name": "evaluate"}, "overrides": {"task": ["seed=0,1"]}}}
    OmegaConf.save(OmegaConf.create(tree), tmp_path / "multirun.yaml")
    for index in (0, 1):
        (tmp_path / f"{index}" / ".hydra").mkdir(parents=True)
        (tmp_path / f"{index}" / ".hydra" / "overrides.yaml").write_text(f"- seed={index}\n")
    result = {"row": "cvdd", "student": "s", "n": 1, "top1": 1.0, "standard_error": None, "top5": 2.0}
    metrics = tmp_path / "0" / "metrics.json"
    metrics.write_text(json.dumps({"results": [result], "code": {}}))
    os.utime(tmp_path / "0" / ".hydra" / "overrides.yaml", (1000, 1000))
    os.utime(metrics, (1040, 1040))
    view = Watch().look(tmp_path)
    assert (view.mean, [row.point for row in view.rows], view.left) == (40.0, ["1"], None)


def test_points_that_have_not_begun_are_not_over(tmp_path: Path) -> None:
    """Of six points two are made, one of an earlier command is there; a pattern shows what has begun."""
    tree = {"hydra": {"job": {"name": "train"}, "overrides": {"task": ["seed=range(6)", "committee.size=2"]}}}
    OmegaConf.save(OmegaConf.create(tree), tmp_path / "multirun.yaml")
    for number, seed in ((0, 0), (1, 1), (2, 9)):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        typed = [f"seed={seed}", "committee.size=2"]
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(json.dumps(typed))
        with outcome_kept(tmp_path / str(number), "train", typed):
            pass
    view = Watch().look(tmp_path)
    assert [(point.name, point.status, point.at) for point in view.points] == [
        *(("0", "done", ("0",)), ("1", "done", ("1",)), ("2", "missing", ("2",))),
        *(("3", "missing", ("3",)), ("4", "missing", ("4",)), ("5", "missing", ("5",))),
    ]
    assert not view.over
    assert "2 of 6 points done, 0 at work, 4 not begun; 0 s a point; nobody works" in printed(view)
    for task, sweeper in ((["students=glob(*)"], None), (["seed=0,1"], {"_target_": "theirs.Sweeper"})):
        tree["hydra"] |= {"overrides": {"task": task}} | ({"sweeper": sweeper} if sweeper else {})
        OmegaConf.save(OmegaConf.create(tree), tmp_path / "multirun.yaml")
        assert len(Watch().look(tmp_path).points) == 3


def test_directories_may_have_other_names_than_numbers(tmp_path: Path) -> None:
    tree = {
        "hydra": {
            "job": {"name": "train"},
            "overrides": {"task": ["recipe.epochs=1"]},
            "sweeper": {"params": {"seed": "4,4,5,6"}},
        }
    }
    OmegaConf.save(OmegaConf.create(tree), tmp_path / "multirun.yaml")
    for name, seed in (("one", 6), ("two", 4), ("1", 4)):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(f"[seed={seed}, recipe.epochs=1]")
    points = Watch().look(tmp_path).points
    assert [point.name for point in points] == ["1", "two", "2", "one"]
    assert [point.status for point in points] == ["not finished", "not finished", "missing", "not finished"]


def test_points_that_nobody_asked_for_keep_no_watch_waiting(sweep: Path) -> None:
    config = OmegaConf.load(sweep / "multirun.yaml")
    config.hydra.overrides.task = ["sweep=trial", "+point='a','b'"]
    OmegaConf.save(config, sweep / "multirun.yaml")
    leave(sweep, "a", "done", seconds=10.0)
    leave(sweep, "e", "running")
    view = Watch().look(sweep)
    assert (view.over, view.waiting, view.count("missing"), view.unasked) == (False, ["b"], 1, 2)
    leave(sweep, "b", "done", seconds=10.0)
    view = Watch().look(sweep)
    assert view.over
    assert "2 of 5 points done, 0 at work, 1 interrupted, 2 not asked for; 10 s a point" in printed(view)


def test_the_command_shows_a_sweep_once_or_until_it_is_over(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for point in POINTS[:4]:
        leave(sweep, point, "done", seconds=10.0)
    assert main(["watch", str(sweep)]) == 0
    assert "4 of 5 points done" in capsys.readouterr().out
    looks: list[float] = []

    sleep, here = time.sleep, threading.get_ident()

    def finish(seconds: float) -> None:
        # Threads that earlier tests left behind sleep too.
        if threading.get_ident() != here:
            sleep(seconds)
            return
        looks.append(seconds)
        leave(sweep, "e", "done", seconds=10.0)

    monkeypatch.setattr(time, "sleep", finish)
    watch_sweeps([str(sweep), "--every", "7"])
    assert looks == [7.0]
    assert "5 of 5 points done, 0 at work; 10 s a point" in capsys.readouterr().out


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "it has no multirun.yaml" in capsys.readouterr().err
    for wrong in (["watch", str(tmp_path), "--every", "0"], ["watch"], ["watch", str(tmp_path), "--every", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    assert "more than 0" in capsys.readouterr().err
