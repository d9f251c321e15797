"""Dashboards: the workspace as code, and what a server is told of runs and of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import configure
from wandb_server import ENTITY, Server, serving

from cvdd import dashboard
from cvdd.dashboard import AXES, build, main, spec_of
from cvdd.running.loggers import make_loggers, reporting_to

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the client takes for its own, and a home of its own for the client."""
    import wandb

    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as running:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_SILENT", "true")
        wandb.teardown()
        yield running
        wandb.teardown()
    assert not running.unanswered


def panels(tree: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Configurations of the panels by section and title."""
    sections = tree["spec"]["section"]["panelBankConfig"]["sections"]
    return {
        section["name"]: {panel["config"].get("chartTitle", ""): panel["config"] for panel in section["panels"]}
        for section in sections
    }


def log_rows(output: Path, *overrides: str, steps: range, error: BaseException | None = None) -> None:
    config = configure(output, "logger.wandb=true", "logger.project=trial", f"paths.output={output}", *overrides)
    output.mkdir(exist_ok=True)
    loggers = make_loggers(config, "evaluate seed=0", "0123abcd", "today")
    with reporting_to(loggers):
        for step in steps:
            for logger in loggers:
                logger.log_metrics({"distill/loss": float(step)}, step=step)
        if error is not None:
            raise error


def test_the_workspace_shows_what_is_asked_for() -> None:
    tree = spec_of(build("me", "trial", "n_and_temperature", AXES))
    shown = panels(tree)
    assert list(shown) == ["Sweep", "Accuracy against IPC", "Images", "Distillation", "Throughput"]
    heat_map = shown["Sweep"]["Top-1 over temperature.vote and committee.size"]
    assert (heat_map["xAxis"], heat_map["yAxis"], heat_map["zAxis"]) == (
        "config:temperature.value.vote",
        "config:committee.value.size",
        "summary:result/top1",
    )
    assert [point["offset"] for point in heat_map["customGradient"]] == pytest.approx([0, 100 / 3, 200 / 3, 100])
    assert shown["Accuracy against IPC"]["Top-1 against IPC"]["xAxis"] == "config:ipc.value.images_per_class"
    assert shown["Images"]["Distilled images"]["mediaKeys"] == ["distill/images"]
    assert shown["Throughput"]["Images a second"]["metrics"] == ["result/images_per_second"]
    assert "n_and_temperature" in json.dumps(tree["spec"]["section"]["runSets"][0])
    assert (tree["entity"], tree["project"], tree["displayName"]) == ("me", "trial", "cvdd: n_and_temperature")


def test_the_spec_is_the_same_every_time() -> None:
    one, two = (json.dumps(spec_of(build("", "trial", None, AXES))) for _ in range(2))
    assert one == two
    assert one != json.dumps(spec_of(build("", "trial", None, ("method.lr", "committee.size"))))


def test_a_field_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--axes", "temperature.votes", "committee.size"]) == 2
    assert "--axes temperature.votes: there is no such field" in capsys.readouterr().err
    assert main(["--axes", "committee.size", "votes.size"]) == 2
    assert "choose from committee.size" in capsys.readouterr().err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main([]) == 2
    assert "pip install 'cvdd[wandb]'" in capsys.readouterr().err


def test_offline_the_spec_is_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.chdir(tmp_path)
    expected = spec_of(build("me", "cvdd", None, AXES))
    assert main(["--entity", "me", "--spec", "asked.json"]) == 0
    assert json.loads((tmp_path / "asked.json").read_text()) == expected
    assert main(["--spec", "asked.json/spec"]) == 2
    assert "asked.json/spec cannot be written (Not a directory)" in capsys.readouterr().err
    for name, value, reason in (
        ("WANDB_MODE", "offline", "WANDB_MODE=offline"),
        ("WANDB_BASE_URL", "http://127.0.0.1:9", "refused"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            wandb.teardown()
            capsys.readouterr()
            # For whoever waits for the workspace it is a failure.
            assert main(["--entity", "me"]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert "The spec is in dashboard.json" in said
        assert json.loads((tmp_path / "dashboard.json").read_text()) == expected
        (tmp_path / "dashboard.json").unlink()
    assert not server.views


def test_the_workspace_arrives(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--project", "trial", "--group", "today"]) == 0
    ((name, view),) = server.views.items()
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "trial", "cvdd: today")
    assert panels(view).keys() == panels(spec_of(build("", "trial", "today", AXES))).keys()
    assert f"/{ENTITY}/trial?nw=" in capsys.readouterr().out
    assert name.startswith("nw-")


def test_a_requeued_job_goes_on_in_the_same_run(server: Server, tmp_path: Path) -> None:
    """The first job is preempted after two rows; the second, in the same directory, adds two more."""
    with pytest.raises(SystemExit):
        log_rows(tmp_path / "out", steps=range(2), error=SystemExit(138))
    ((name, run),) = server.runs.items()
    assert (name, run.exit_code, run.summary["error"]) == ("0123abcd", 1, "SystemExit")
    log_rows(tmp_path / "out", steps=range(2, 4))
    assert list(server.runs) == ["0123abcd"]
    assert [(row["trainer/global_step"], row["distill/loss"]) for row in run.history] == [
        (step, float(step)) for step in range(4)
    ]
    assert (run.exit_code, run.summary["error"]) == (0, "")
    fields = {key: run.fields[key] for key in ("displayName", "groupName", "jobType", "project")}
    assert fields == {
        "displayName": "evaluate seed=0",
        "groupName": "today",
        "jobType": "evaluate",
        "project": "trial",
    }
    config = json.loads(run.fields["config"])
    assert config["method"]["value"]["name"] == "cvdd"
    assert "host" not in run.fields
    first, second = (tmp_path / "out" / "csv" / name for name in ("metrics-1.csv", "metrics.csv"))
    assert [len(file.read_text().splitlines()) for file in (first, second)] == [3, 3]
    assert str(tmp_path) not in json.dumps(run.fields)


def test_an_offline_run_is_sent_later(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        log_rows(tmp_path / "out", "logger.wandb_mode=offline", steps=range(3), error=ValueError("broken"))
    assert not server.runs
    (folder,) = (tmp_path / "out").glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    ((name, run),) = server.runs.items()
    assert (name, run.exit_code, run.summary["error"]) == ("0123abcd", 1, "ValueError")
    assert [row["distill/loss"] for row in run.history] == [0.0, 1.0, 2.0]
    assert run.fields["groupName"] == "today"


def test_titles_are_unique() -> None:
    assert len(set(dashboard.CURVES)) == len(set(dashboard.CURVES.values()))
