"""Launchers: what they are composed of, what follows from them, and one fresh process for each point."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf

from cvdd.composition.arguments import ArgumentError
from cvdd.composition.command import again, debug_limits
from cvdd.composition.config_directory import config_directory
from cvdd.composition.launching import (
    SHARE,
    check_launcher,
    command_number,
    launcher_field,
    require_launcher,
    share_of_work,
)
from cvdd.schema.surroundings import TrainerConfig
from cvdd.support.config_base import ConfigError

ROOT = Path(__file__).parents[1]

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

from hydra_plugins.cvdd_units import UnitsLauncher  # noqa: E402


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A configuration directory of one's own, in which a site's values are."""
    (tmp_path / "conf" / "local").mkdir(parents=True)
    (tmp_path / "conf" / "local" / "slurm.yaml").write_text("partition: day\naccount: lab\ngpus_per_node: null\n")
    return tmp_path / "conf"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Hydra's configuration is global; other tests must not see this one's."""
    yield
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def composed(*overrides: str, path: Path | None = None) -> DictConfig:
    """Compose evaluate as in a command, with what Hydra itself needs."""
    more = [f"hydra.searchpath=[file://{path}]"] if path else []
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra_compose("evaluate", [*more, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def launcher(*overrides: str, path: Path | None = None) -> dict[str, Any]:
    """Fields of the launcher; a developer's own site values are left out unless others are given."""
    own = ["~local@hydra.launcher"] if path is None and (config_directory() / "local").is_dir() else []
    node = composed(*own, *overrides, path=path).hydra.launcher
    return {name: node[name] for name in node if name != "submitit_folder"}


# --- composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slurm", "slurm_units", "slurm_ddp"])
def test_jobs_are_put_back_into_the_queue(name: str) -> None:
    """Told early enough for a save, requeued after time limits as after preemptions."""
    from cvdd.running.interruption import SECONDS_TO_SAFE_POINT

    fields = launcher(f"hydra/launcher={name}")
    assert fields["signal_delay_s"] > SECONDS_TO_SAFE_POINT + 60
    assert fields["max_num_timeout"] > 0
    assert fields["additional_parameters"] == {"requeue": True}
    # Lightning and SLURM know jobs of these names for something else.
    assert fields["name"] not in ("bash", "interactive")


@pytest.mark.parametrize("name", ["slurm", "slurm_units", "slurm_ddp"])
def test_values_of_a_site_are_in_a_file_of_its_own(name: str, site: Path) -> None:
    if (config_directory() / "local" / "slurm.yaml").exists():
        pytest.skip("a developer's own file comes first")
    fields = launcher(f"hydra/launcher={name}", path=site)
    assert (fields["partition"], fields["account"]) == ("day", "lab")
    assert fields["gpus_per_node"] == (2 if name == "slurm_ddp" else None)
    assert launcher(f"hydra/launcher={name}", "hydra.launcher.partition=night", path=site)["partition"] == "night"


def test_site_values_do_not_disturb_other_commands(site: Path) -> None:
    assert set(launcher(path=site)) == {"_target_"}


def test_points_have_directories_without_the_numbers_of_jobs() -> None:
    config = composed("hydra/launcher=slurm")
    assert OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"] == "${hydra:job.num}"  # type: ignore[index,call-overload]


# --- directories ------------------------------------------------------------------------------------------------------


class Noon(datetime):
    """All commands of the tests below start in one second."""

    microsecond_of_next = itertools.count(7)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 1, 2, 12, 0, 0, next(cls.microsecond_of_next))


@pytest.mark.parametrize("directory", ["hydra.run.dir", "hydra.sweep.dir"])
def test_commands_of_one_second_have_directories_of_their_own(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hydra.core.utils", "cvdd.composition.launching"):
        monkeypatch.setattr(f"{module}.datetime", Noon)
    one, other = composed(), composed()
    first, second = (str(OmegaConf.select(config, directory)) for config in (one, other))
    assert "2026-01-02_12-00-00_" in first
    assert first != second
    # Wherever it is asked for, and in a job that SLURM has put back into the queue.
    assert str(OmegaConf.select(one, directory)) == first
    assert str(OmegaConf.select(pickle.loads(pickle.dumps(one)), directory)) == first


def test_points_know_the_directory_of_their_sweep() -> None:
    sweep = composed()
    directory = str(sweep.hydra.sweep.dir)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        point = hydra.config_loader.load_sweep_config(pickle.loads(pickle.dumps(sweep)), ["seed=1"])
    assert str(point.hydra.sweep.dir) == directory


def test_ranks_agree_on_the_number_of_their_command() -> None:
    torchrun = {"RANK": "0", "MASTER_PORT": "29501"}
    assert command_number(torchrun) == command_number({**torchrun, "RANK": "1"}) == "29501"
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "0"}
    assert command_number(srun) == command_number({**srun, "SLURM_PROCID": "1"}) == "12-3"
    assert re.fullmatch(r"\d{6}", command_number({}))


# --- the trainer's fields ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "devices", "threads"),
    [
        ((), 1, None),
        (("hydra/launcher=local",), 1, None),
        (("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=6"), 1, 6),
        (("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=null"), 1, None),
        (("hydra/launcher=slurm_ddp", "hydra.launcher.tasks_per_node=8"), 8, 4),
        # Its tasks are no ranks: each trains for itself.
        (("hydra/launcher=slurm_units", "hydra.launcher.tasks_per_node=8"), 1, 4),
        (("hydra/launcher=slurm_ddp", "trainer.threads=3"), 2, 3),
    ],
)
def test_fields_of_the_trainer_follow_from_the_launcher(
    overrides: tuple[str, ...], devices: int, threads: int | None
) -> None:
    config = composed(*overrides)
    assert (config.trainer.devices, config.trainer.threads) == (devices, threads)


def test_without_a_command_the_trainer_is_one_process() -> None:
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        assert hydra_compose("evaluate").trainer.devices == 1


def test_gpus_follow_from_the_tasks() -> None:
    assert launcher("hydra/launcher=slurm_ddp", "hydra.launcher.tasks_per_node=4")["gpus_per_node"] == 4


def test_fields_that_a_launcher_has_not() -> None:
    composed()
    assert launcher_field("tasks_per_node") is None
    composed("hydra/launcher=slurm_units", "hydra.launcher.tasks_per_node=2")
    assert launcher_field("tasks_per_node") == 1


def trainer(devices: int) -> TrainerConfig:
    return TrainerConfig.model_validate({"accelerator": "cpu", "devices": devices})


@pytest.mark.parametrize(
    ("devices", "name", "tasks"), [(1, "basic", None), (4, "basic", None), (1, "slurm", 1), (2, "slurm_ddp", 2)]
)
def test_launchers_that_agree_with_the_trainer(devices: int, name: str, tasks: int | None) -> None:
    check_launcher(trainer(devices), name, tasks, sweeping=True)


@pytest.mark.parametrize(
    ("devices", "name", "tasks"), [(4, "slurm_ddp", 2), (1, "slurm", 2), (2, "slurm_ddp", 1), (1, "slurm_ddp", 2)]
)
def test_a_launcher_that_starts_other_processes_is_refused(devices: int, name: str, tasks: int) -> None:
    told = f"trainer.devices={devices} and hydra.launcher.tasks_per_node={tasks}: leave out trainer.devices"
    with pytest.raises(ConfigError, match=told):
        check_launcher(trainer(devices), name, tasks, sweeping=True)


@pytest.mark.parametrize("name", ["slurm", "local", "submitit_local"])
def test_a_launcher_that_hydra_would_ignore_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"hydra/launcher={name} .* add --multirun"):
        check_launcher(trainer(1), name, 1, sweeping=False)


def test_a_launcher_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    require_launcher(["hydra/launcher=slurm"])
    monkeypatch.setattr("cvdd.composition.launching.find_spec", lambda name: None)
    require_launcher(["hydra/launcher=local", "seed=1"])
    with pytest.raises(ArgumentError, match="hydra/launcher=slurm_units needs: pip install 'cvdd\\[slurm\\]'"):
        require_launcher(["hydra/launcher=slurm_units"])


# --- jobs that share a point ------------------------------------------------------------------------------------------


def test_a_share_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE, raising=False)
    assert share_of_work() == (0, 1)
    monkeypatch.setenv(SHARE, "3/8")
    assert share_of_work() == (3, 8)


class Submitted:
    """Stands in for submitit: remembers what is submitted, cancelled and waited for."""

    def __init__(self, number: int, events: list[str]) -> None:
        self.number, self.events = number, events

    def results(self) -> list[str]:
        self.events.append(f"wait {self.number}")
        return [f"result {self.number}"]

    def cancel(self, check: bool = True) -> None:
        self.events.append(f"cancel {self.number}")


def test_an_array_of_jobs_for_each_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = composed("hydra/launcher=slurm_units", "hydra.launcher.array_parallelism=3", f"hydra.sweep.dir={tmp_path}")
    made = UnitsLauncher(**{key: value for key, value in config.hydra.launcher.items() if key != "_target_"})
    made.config = config
    events: list[str] = []
    calls: list[tuple[Any, ...]] = []

    def map_array(function: Any, *columns: Any) -> list[Submitted]:
        calls.extend(zip(*columns, strict=True))
        return [Submitted(number, events) for number in range(len(calls))]

    monkeypatch.setattr(made, "_executor", lambda: SimpleNamespace(map_array=map_array))
    returned = made.launch([["seed=0"], ["seed=1"]], 4)
    expected = [(["seed=0"], 4), (["seed=0"], 4), (["seed=0"], 4), (["seed=1"], 5), (["seed=1"], 5), (["seed=1"], 5)]
    assert [(call[0], call[2]) for call in calls] == expected
    assert [call[3] for call in calls] == ["0", "1", "2"] * 2
    # What the first job returns counts; the others have nothing left to do then.
    assert returned == ["result 0", "result 3"]
    assert events == ["wait 0", "cancel 1", "cancel 2", "wait 3", "cancel 4", "cancel 5"]


@pytest.mark.parametrize(
    ("job", "rank", "share", "subdir"),
    [("0", "0", "0/6", "7"), ("0", "1", "1/6", "7/workers/1"), ("2", "1", "5/6", "7/workers/5")],
)
def test_only_the_first_job_writes_the_point(
    job: str, rank: str, share: str, subdir: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = composed("hydra/launcher=slurm_units", "hydra.launcher.array_parallelism=3", f"hydra.sweep.dir={tmp_path}")
    made = UnitsLauncher(**{key: value for key, value in config.hydra.launcher.items() if key != "_target_"})
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        callbacks = object()
        made.config, made.task_function = config, lambda config: None
        made.hydra_context = SimpleNamespace(config_loader=hydra.config_loader, callbacks=callbacks)
        monkeypatch.setenv("SLURM_NTASKS", "2")
        monkeypatch.setenv("SLURM_PROCID", rank)
        monkeypatch.setenv(SHARE, "")
        monkeypatch.setattr("submitit.JobEnvironment", lambda: SimpleNamespace(job_id="1234"))
        ran: list[DictConfig] = []
        # Hydra executes the modules of plugins again when its state is set; they then import this name anew.
        monkeypatch.setattr("hydra.core.utils.run_job", lambda **arguments: ran.append(arguments["config"]))
        made(["logger.tensorboard=true"], "hydra.sweep.dir", 7, job, Singleton.get_state())
    (point,) = ran
    HydraConfig.instance().set_config(point)
    assert os.environ[SHARE] == share
    assert str(point.hydra.sweep.subdir) == subdir
    first = share.startswith("0/")
    assert point.logger.tensorboard is first
    assert (made.hydra_context.callbacks is callbacks) is first


def test_jobs_know_the_folder_of_ones_own_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of submitit has none of the command's arguments."""
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug" / "mine.yaml").write_text("recipe: {epochs: 3}\n")
    (tmp_path / "ipc").mkdir()
    (tmp_path / "ipc" / "7.yaml").write_text("images_per_class: 7\ndraw: in_turn\nlabel_batch: 10\n")
    monkeypatch.setattr(sys, "argv", ["_submit.py", "folder"])
    composed(path=tmp_path)
    assert debug_limits("mine") == {"recipe.epochs": 3}
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        own = f"hydra.searchpath=[file://{tmp_path}]"
        assert again("distill", [own], ["ipc=7"]).ipc.images_per_class == 7
