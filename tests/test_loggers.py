"""Loggers: what they were told is read back from the files that they write, without any network."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, configure
from pytorch_lightning.loggers import CSVLogger

import cvdd.chain.compare
import cvdd.chain.images
import cvdd.chain.recover
from cvdd import dashboard
from cvdd.artifact import Store
from cvdd.chain.context import Context
from cvdd.chain.priors import Priors
from cvdd.commands.runtime import Invocation, invocation_lines, run, run_id, run_name
from cvdd.composition.portable import portable_config
from cvdd.running.loggers import reporting_to
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.distill_module import NonFiniteLoss
from cvdd.verbs.evaluate import SHOWN

SMALL = (
    *TINY,
    "~committee.members.shufflenetv2",
    "recipe.epochs=1",
    "method.iterations=2",
    "method.log_every=1",
    "method.grid_every=2",
    "protocol.epochs=1",
    "trainer.threads=1",
)
OFFLINE = ("logger.wandb=true", "logger.wandb_mode=offline", "logger.project=trial")
MEMBERS = ("resnet18", "resnet50")


@pytest.fixture(autouse=True)
def wandb_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep everything that wandb writes, its caches and settings too, inside the test's folder."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(home))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    return home


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: members and images are made once."""
    return tmp_path_factory.mktemp("loggers") / "store"


def command(output: Path, store: Path, *overrides: str, verb: str = "evaluate", sweep: str | None = None) -> Path:
    typed = (f"paths.store={store}", f"paths.output={output}", *overrides)
    run(configure(output, *SMALL, *typed, verb=verb), Invocation(typed, sweep))
    return output


def offline_run(output: Path) -> Any:
    pytest.importorskip("wandb")
    from wandb_records import read_run

    (path,) = output.glob("wandb/offline-run-*/run-*.wandb")
    # A process of wandb's own writes the file; the run's process goes on before the last flush.
    deadline = time.monotonic() + 20
    while (told := read_run(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return told


def csv_rows(output: Path) -> list[dict[str, str]]:
    with (output / "csv" / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_wandb_is_told_everything_but_where_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store of its own, so that all stages run and are logged."""
    pytest.importorskip("wandb")
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-this-machine")
    output = command(tmp_path / "out", tmp_path / "store", *OFFLINE, "temperature.vote=2.5", sweep="evaluate_today")
    told = offline_run(output)
    assert told.exit_code == 0
    assert told.settings["display_name"] == "evaluate temperature.vote=2.5"
    assert told.settings["run_group"] == "evaluate_today"
    assert told.settings["job_type"] == "evaluate"
    assert told.settings["project"] == "trial"
    assert told.config["temperature"]["vote"] == 2.5
    assert told.config["committee"]["members"]["resnet50"]["backbone"]["target"] == "cvdd.backbones.resnet.resnet"
    assert "paths" not in told.config
    assert str(tmp_path) not in json.dumps(told.config)
    keys = {key for row in told.history for key in row}
    for name in MEMBERS:
        assert {f"distill/{term}/{name}" for term in ("ce", "bn", "weight")} <= keys
        assert f"train/{name}/train_loss" in keys
    student = "evaluate/tiny_resnet18/seed0"
    assert {"distill/loss", f"{student}/top1", f"{student}/train_loss", "result/cvdd/tiny_resnet18/top1"} <= keys
    logged = [row for row in csv_rows(output) if "distill/loss" in row]
    sent = [row for row in told.history if "distill/loss" in row]
    assert [row["trainer/global_step"] for row in sent] == [int(row["step"]) for row in logged] == [1, 2]
    for key in ("distill/loss", "distill/bn/resnet50", "distill/weight/resnet18"):
        assert [row[key] for row in sent] == pytest.approx([float(row[key]) for row in logged])
    metrics = json.loads((output / "metrics.json").read_text())
    (final,) = (
        row["result/cvdd/tiny_resnet18/top1"] for row in told.history if "result/cvdd/tiny_resnet18/top1" in row
    )
    assert final == metrics["results"][0]["top1"]
    (image,) = (row["distill/images"] for row in told.history if "distill/images" in row)
    path = image["filenames"][0]
    assert any(found.read_bytes().startswith(b"\x89PNG") for found in output.glob(f"wandb/offline-run-*/files/{path}"))
    shown = {
        value for name, value in vars(dashboard).items() if name.isupper() and str(value)[:7] in ("result/", "distill")
    }
    assert len(shown) == 8
    assert shown <= keys
    elsewhere = ("Agreement by pair", "Distance of features by member")
    patterns = {title: pattern for title, pattern in dashboard.CURVES.items() if title not in elsewhere}
    assert not [title for title, pattern in patterns.items() if not any(re.fullmatch(pattern, key) for key in keys)]
    made = {key.removeprefix("artifact/"): name for key, name in told.summary.items() if key.startswith("artifact/")}
    assert set(made) == {"cvdd/images", "cvdd/labels", "cvdd/tiny_resnet18/seed0"}
    assert {path.name for path in (tmp_path / "store").glob("*/*-*")} >= set(made.values())
    assert made["cvdd/images"] == metrics["results"][0]["images"]
    assert told.summary["error"] == ""
    (own,) = (row for row in told.history if "result/top1" in row)
    assert own["result/top1"] == final
    # One student has no standard error.
    result = {key: value for key, value in metrics["results"][0].items() if key in SHOWN and value is not None}
    assert {key: own[f"result/{key}"] for key in result} == pytest.approx(result)
    assert set(SHOWN) - set(result) == {"standard_error"}
    seconds = result["image_seconds"]
    assert own["result/images_per_second"] == pytest.approx(2 * 10 / seconds)
    sent = [*output.glob("wandb/offline-run-*/run-*.wandb"), *output.glob("wandb/offline-run-*/files/**/*.*")]
    for secret in (str(tmp_path), "name-of-this-machine", sys.executable):
        assert not [path for path in sent if secret.encode() in path.read_bytes()], secret


def test_wandb_knows_a_repeated_run_and_a_run_alone(tmp_path: Path, store: Path) -> None:
    pytest.importorskip("wandb")
    first, second, other = (
        offline_run(command(tmp_path / name, store, *OFFLINE, *more, verb="distill"))
        for name, more in (("a", ()), ("b", ("trainer.workers=0",)), ("c", ("logger.group=mine", "seed=1")))
    )
    assert first.settings["run_id"] == second.settings["run_id"]
    assert other.settings["run_id"] != first.settings["run_id"]
    assert (first.settings["run_group"], other.settings["run_group"]) == ("", "mine")
    assert first.settings["display_name"] == second.settings["display_name"] == "distill"
    assert other.settings["display_name"] == "distill seed=1"
    assert {told.exit_code for told in (first, second, other)} == {0}


def test_a_run_that_fails_is_marked_as_failed(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(cvdd.chain.recover, "normalise", lambda pixels, mean, std: pixels.float() * float("nan"))
        with pytest.raises(NonFiniteLoss):
            command(output, store, *OFFLINE, "method.lr=0.2", verb="distill")
    told = offline_run(output)
    assert (told.preempted, told.exit_code, told.summary["error"]) == (False, 1, "NonFiniteLoss")
    assert (output / "csv" / "hparams.yaml").exists()
    # The next job of a sweep has a run of its own.
    following = offline_run(command(tmp_path / "next", store, *OFFLINE, "method.lr=0.3", verb="distill"))
    assert following.exit_code == 0
    assert following.settings["run_id"] != offline_run(output).settings["run_id"]


def test_an_interrupted_run_is_marked_as_failed(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cvdd.chain.images, "recover_stack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "out", store, *OFFLINE, "method.lr=0.15", verb="distill")
    assert offline_run(tmp_path / "out").exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_a_signal_ends_is_finished_and_marked_as_preempted(
    number: int, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    before = signal.signal(number, signal.SIG_DFL)

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(cvdd.chain.images, "recover_stack", stopped)
    try:
        with pytest.raises(SystemExit) as ended:
            command(tmp_path / "out", store, *OFFLINE, "method.lr=0.16", verb="distill")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    told = offline_run(tmp_path / "out")
    assert (told.preempted, told.exit_code, told.summary["error"]) == (True, 1, "SystemExit")


@pytest.mark.parametrize("ended", [SystemExit(143), ValueError("of the work"), None])
def test_a_logger_that_cannot_be_closed_hides_nothing(
    ended: BaseException | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal ends a sweep, and an error of whoever is told of it would let it go on."""
    logger = CSVLogger(save_dir=tmp_path, name="", version="csv")
    logger.log_metrics({"loss": 1.0}, step=0)
    shutil.rmtree(tmp_path / "csv")

    def work() -> None:
        with reporting_to([logger]):
            if ended is not None:
                raise ended

    with pytest.raises(FileNotFoundError if ended is None else type(ended)) as found:
        work()
    assert ended is None or found.value is ended
    assert ("CSVLogger could not be closed" in caplog.text) == (ended is not None)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("No API key configured", "log in with wandb login, or set logger.wandb_mode=offline"),
        ("run 0a1b was previously created and deleted", "choose another project, logger.project=NAME instead of cvdd"),
    ],
)
def test_wandb_that_refuses_is_told_before_any_work(
    said: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**settings: Any) -> None:
        raise wandb.errors.UsageError(said)

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=re.escape(f"{said}; {advice}")):
        command(tmp_path / "out", tmp_path / "store", "logger.wandb=true")
    assert not list((tmp_path / "store").glob("members/*"))


@pytest.mark.parametrize(
    ("package", "override"),
    [("wandb", "logger.wandb=true"), ("tensorboard", "logger.tensorboard=true")],
)
def test_a_package_that_is_missing(
    package: str, override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_lightning.loggers import tensorboard, wandb

    absent = {"wandb": (wandb, "_WANDB_AVAILABLE"), "tensorboard": (tensorboard, "_TENSORBOARD_AVAILABLE")}
    module, flag = absent[package]
    monkeypatch.setattr(module, flag, False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(ConfigError, match=rf"{override} needs: pip install 'cvdd\[{package}\]'"):
        command(tmp_path / "out", tmp_path / "store", override)


# --- TensorBoard and csv ----------------------------------------------------------------------------------------------


def test_tensorboard_has_scalars_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = command(tmp_path / "out", tmp_path / "store", "logger.tensorboard=true", verb="distill")
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    rows = [row for row in csv_rows(output) if "distill/loss" in row]
    for key in ("distill/loss", *(f"distill/{term}/{name}" for term in ("ce", "bn", "weight") for name in MEMBERS)):
        scalars = events.Scalars(key)
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([float(row[key]) for row in rows], rel=1e-5)
    (image,) = events.Images("distill/images")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.height > 60


def test_csv_is_always_written(tmp_path: Path, store: Path) -> None:
    command(tmp_path / "warm", store, verb="train")
    output = command(tmp_path / "out", store, "method.lr=0.1", verb="distill")
    assert not {"wandb", "tensorboard"} & {path.name for path in output.iterdir()}
    assert [int(row["step"]) for row in csv_rows(output)] == [1, 2]
    assert "wandb" not in sys.modules or sys.modules["wandb"].run is None


def test_seeds_with_images_of_their_own_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has the keys of images that are made once; an assistant that makes one seed agrees on its label."""
    monkeypatch.setattr(cvdd.chain.compare, "distil", lambda context, row, priors: context)
    config = configure(tmp_path, *SMALL, "protocol.images=per_seed", "protocol.seeds=[3,0]")
    context = Context(config, Store(tmp_path / "store"), torch.device("cpu"))
    row = replace(context, label="other")
    priors = Priors({})

    def labels(of: Context, name: str, seeds: list[int]) -> dict[int, Any]:
        made: Any = cvdd.chain.compare.make_sets(of, name, priors, seeds)
        return {seed: (each.label, each.config.method.seed) for seed, each in made.items()}

    assert labels(context, "cvdd", [3, 0]) == {3: ("", 3), 0: ("cvdd seed 0", 0)}
    assert labels(row, "other", [3, 0]) == {3: ("other", 3), 0: ("other seed 0", 0)}
    assert labels(context, "cvdd", [0]) == {0: ("cvdd seed 0", 0)}


# --- names and what is hidden -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ((), "train"),
        (("ipc='10'", "seed=3"), "train ipc='10' seed=3"),
        (("paths.store=x", "+paths.more=y", "trainer=cpu", "logger.wandb=true", "hydra/launcher=local"), "train"),
        (("loggers=1", "~compare"), "train loggers=1 ~compare"),
    ],
)
def test_names_say_what_was_chosen(typed: tuple[str, ...], name: str, tmp_path: Path) -> None:
    assert run_name(configure(tmp_path, verb="train"), Invocation(typed)) == name


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("dataset.root=/home/alice/my data", "dataset.root=<elsewhere>/my data"),
        ("dataset.root='/home/alice/a,b'", "dataset.root='<elsewhere>/a,b'"),
        ("+committee.members.x.checkpoint=/scratch/y.pth", "+committee.members.x.checkpoint=<elsewhere>/y.pth"),
        ("method.apm.teachers.paths=[/a/b,'/c/d']", "method.apm.teachers.paths=[<elsewhere>/b,'<elsewhere>/d']"),
        ("+compare.x={dataset.root:/a/b, seed: 1}", "+compare.x={dataset.root:<elsewhere>/b, seed: 1}"),
        ("+compare.x=[dataset.root=/a/b,seed=1]", "+compare.x=[dataset.root=<elsewhere>/b,seed=1]"),
        ("dataset.origin=https://site.org/data", "dataset.origin=https://site.org/data"),
        ("dataset.root=../raw", "dataset.root=../raw"),
        ("dataset.root=DATA/raw", "dataset.root=<paths.data>/raw"),
    ],
)
def test_what_was_typed_is_shown_without_the_directories_of_the_machine(typed: str, shown: str, tmp_path: Path) -> None:
    config = configure(tmp_path, verb="train")
    invocation = Invocation((typed.replace("DATA", str(config.paths.data)), "seed=3"))
    assert run_name(config, invocation) == f"train {shown} seed=3"
    (line,) = invocation_lines(config, invocation)
    assert shlex.split(line) == ["python", "train.py", shown, "seed=3"]


def test_numbers_are_shown_as_they_are_typed(tmp_path: Path) -> None:
    invocation = Invocation(("ipc='10'", "temperature='1','5'", "dataset.name='a b'"))
    (line,) = invocation_lines(configure(tmp_path, verb="train"), invocation)
    assert line.startswith("python train.py ipc=10 temperature=1,5 ")
    assert shlex.split(line)[-1] == "dataset.name='a b'"


def test_points_that_two_sweeps_share_are_runs_of_their_own(tmp_path: Path) -> None:
    config = configure(tmp_path)
    points = [None, ("voter", "prior"), ("n_and_temperature", "N2_T5")]
    assert len({run_id(config, Invocation((), point=point)) for point in points}) == 3


def test_other_machines_give_the_same_identity(tmp_path: Path) -> None:
    data = ("dataset=cifar10", "label.batch_size=10")
    one, two = (configure(tmp_path / name, *data) for name in ("one", "two"))
    assert one.dataset.root != two.dataset.root
    assert portable_config(one) == portable_config(two)
    assert portable_config(one)["dataset"]["root"] == "<paths.data>/cifar10"
    assert run_id(one, Invocation(())) == run_id(two, Invocation(("seed=0",)))
    elsewhere = configure(tmp_path / "one", *data, f"dataset.root={tmp_path.parent}/raw")
    assert portable_config(elsewhere)["dataset"]["root"] == "<elsewhere>/raw"
