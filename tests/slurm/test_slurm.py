"""Sweeps on a real SLURM, on this machine: spread, preempted and cancelled, and the same bits as without it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, ClusterError, cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that a command may take; in a fraction of it everything is done on an idle machine."""

ONE_THREAD = ("trainer.threads=1",)
SITE = (
    *("hydra.launcher.partition=main", "hydra.launcher.account=null", "hydra.launcher.qos=null"),
    *("hydra.launcher.constraint=null", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"),
)
"""This cluster, whatever a developer's conf/local says of another; trainer.threads follows from it."""

SQUARE = ("committee.size=1,2", "temperature.vote=1,5")
POINTS = [(1, 1), (1, 5), (2, 1), (2, 5)]

LONG = ("method.iterations=300", "method.checkpoint_every=10", "method.log_every=100", "method.grid_every=100")
"""Images that take so long that a job can be stopped while it makes them."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    # The directories of pytest can be too deep for sockets.
    with tempfile.TemporaryDirectory(prefix="cvdd-slurm-") as folder:
        try:
            with cluster(Path(folder)) as running:
                yield running
        except ClusterError as error:
            pytest.fail(str(error))


def command(verb: str, home: Path, *overrides: str) -> list[str]:
    places = (f"paths.store={home / 'store'}", f"paths.data={home / 'data'}", f"hydra.sweep.dir={home / 'sweep'}")
    return [sys.executable, str(ROOT / f"{verb}.py"), "--multirun", *TINY, *places, *overrides]


def run(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)


def finished(done: subprocess.CompletedProcess[str], home: Path) -> None:
    logs = [f"{log}:\n{log.read_text()[-3000:]}" for log in sorted((home / "sweep").glob(".submitit/*/*_log.*"))]
    assert done.returncode == 0, "\n".join([done.stdout[-3000:], done.stderr[-3000:], *logs])


def artefacts(home: Path) -> dict[str, Any]:
    """Checksums of the files of everything in a store, but the raw data, which are the same by definition."""
    found = {}
    for file in (home / "store").glob("*/*/manifest.json"):
        manifest = json.loads(file.read_text())
        found[f"{manifest['kind']}/{file.parent.name}"] = manifest["files"]
    assert found
    return found


def results(home: Path, point: int) -> list[dict[str, Any]]:
    metrics = json.loads((home / "sweep" / str(point) / "metrics.json").read_text())
    # What it cost is another matter.
    costs = ("seconds", "peak_memory_bytes")
    return [{key: value for key, value in one.items() if not key.endswith(costs)} for one in metrics["results"]]


def wait_for(condition: Callable[[], Any], launcher: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def local_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 2 x 2 points without SLURM, each in a fresh process."""
    home = tmp_path_factory.mktemp("local")
    finished(run(command("evaluate", home, "hydra/launcher=local", *SQUARE, *ONE_THREAD)), home)
    return home


@pytest.fixture(scope="module")
def local_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that took long, made without an interruption."""
    home = tmp_path_factory.mktemp("images")
    finished(run(command("distill", home, "hydra/launcher=local", *LONG, *ONE_THREAD)), home)
    return home


def test_a_sweep_over_members_and_temperature(slurm: Cluster, local_sweep: Path, tmp_path: Path) -> None:
    done = run(command("evaluate", tmp_path, "hydra/launcher=slurm", *SITE, *SQUARE), slurm.environment)
    finished(done, tmp_path)
    # Points are called the same whatever numbers their jobs have.
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == [".submitit", *"0123"]
    for point, (size, temperature) in enumerate(POINTS):
        overrides = (tmp_path / "sweep" / str(point) / ".hydra" / "overrides.yaml").read_text()
        assert f"committee.size={size}" in overrides
        assert f"temperature.vote={temperature}" in overrides
        assert results(tmp_path, point) == results(local_sweep, point)
        assert 0 <= results(tmp_path, point)[0]["top1"] <= 100
    assert artefacts(tmp_path) == artefacts(local_sweep)
    assert len(list((tmp_path / "sweep" / ".submitit").glob("*_?"))) == 4


@pytest.mark.parametrize(("jobs", "tasks"), [(2, 1), (1, 2)], ids=["two jobs", "two tasks"])
def test_a_point_is_shared(jobs: int, tasks: int, slurm: Cluster, local_sweep: Path, tmp_path: Path) -> None:
    spread = (f"hydra.launcher.array_parallelism={jobs}", f"hydra.launcher.tasks_per_node={tasks}")
    point = ("committee.size=2", "temperature.vote=5")
    done = run(command("evaluate", tmp_path, "hydra/launcher=slurm_units", *SITE, *spread, *point), slurm.environment)
    finished(done, tmp_path)
    assert results(tmp_path, 0) == results(local_sweep, 3)
    reference = artefacts(local_sweep)
    for name, files in artefacts(tmp_path).items():
        assert files == reference[name], name
    # The other job wrote below the point, not over it.
    assert (tmp_path / "sweep" / "0" / "workers" / "1" / ".hydra" / "overrides.yaml").is_file()
    sessions = [
        json.loads(file.read_text())["cost"]["sessions"] for file in (tmp_path / "store").glob("*/*/manifest.json")
    ]
    assert max(sessions) <= jobs * tasks


def test_two_tasks_are_ranks_of_one_command(slurm: Cluster, local_sweep: Path, tmp_path: Path) -> None:
    ranks = ("hydra/launcher=slurm_ddp", *SITE, "hydra.launcher.tasks_per_node=2")
    point = ("committee.size=2", "temperature.vote=5")
    finished(run(command("evaluate", tmp_path, *ranks, *point), slurm.environment), tmp_path)
    assert "devices: ${cvdd_launcher:tasks_per_node" in (tmp_path / "sweep/0/.hydra/config.yaml").read_text()
    assert results(tmp_path, 0) == results(local_sweep, 3)
    reference = artefacts(local_sweep)
    for name, files in artefacts(tmp_path).items():
        assert files == reference[name], name
    assert not (tmp_path / "sweep" / "0" / "workers").exists()
    # Both tasks ran, each with a log of its own.
    assert len(list((tmp_path / "sweep" / ".submitit").glob("*/*_[01]_log.out"))) == 2


def begin(slurm: Cluster, home: Path) -> subprocess.Popen[str]:
    """Start a long point through the launcher and wait until its images are being made."""
    launcher = subprocess.Popen(
        command("distill", home, "hydra/launcher=slurm", *SITE, *LONG),
        env=slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    wait_for(lambda: list((home / "store" / "images" / ".partial").glob("*")), launcher, "no images were begun")
    return launcher


def job_log(home: Path) -> str:
    return "".join(path.read_text() for path in sorted((home / "sweep" / ".submitit").glob("*/*_log.*")))


def test_a_preempted_job_goes_on_by_itself(slurm: Cluster, local_images: Path, tmp_path: Path) -> None:
    launcher = begin(slurm, tmp_path)
    time.sleep(3)
    (job,) = slurm.jobs("%i %T %P")
    assert job[1:] == ["RUNNING", "main"]
    slurm.call("srun", "--partition=urgent", "--nodes=2", "--ntasks=4", "true")
    out, errors = launcher.communicate(timeout=PATIENCE)
    finished(subprocess.CompletedProcess(launcher.args, launcher.returncode, out, errors), tmp_path)
    log = job_log(tmp_path)
    assert "SIGUSR2: saved after iteration" in log
    assert "this job is preempted" in log
    assert f"Requeued job {job[0]}" in log
    assert artefacts(tmp_path) == artefacts(local_images)
    (manifest,) = (tmp_path / "store").glob("images/*/manifest.json")
    assert json.loads(manifest.read_text())["cost"]["sessions"] == 2


def test_a_cancelled_command_is_repeated(slurm: Cluster, local_images: Path, tmp_path: Path) -> None:
    launcher = begin(slurm, tmp_path)
    members = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("members/*/manifest.json")}
    assert members
    (job,) = slurm.jobs()
    slurm.call("scancel", job[0])
    _, errors = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    assert "CANCELLED" in errors
    assert not list((tmp_path / "store").glob("images/*/manifest.json"))

    finished(run(command("distill", tmp_path, "hydra/launcher=slurm", *SITE, *LONG), slurm.environment), tmp_path)
    assert artefacts(tmp_path) == artefacts(local_images)
    assert {path: path.stat().st_mtime_ns for path in members} == members
