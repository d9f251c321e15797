"""The commands as functions of a program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import TINY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import cvdd
from cvdd.calls import Run
from cvdd.composition.config_directory import config_directory

ROW = "+compare.real=['method=random_real','method.iterations=0']"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calls")


@pytest.fixture
def made(home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A comparison that was made by a call; of the same store, so it is made once."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("CVDD_STORE", str(home / "store"))
    return cvdd.evaluate(*TINY, "compare=none", ROW)


def test_a_call_returns_what_the_command_writes(made: Run, home: Path) -> None:
    assert made.output.parent == home / "outputs" / "evaluate"
    written = json.loads((made.output / "metrics.json").read_text())
    assert list(made.results) == written["results"]
    assert [result["row"] for result in made.results] == [made.row, "real"]
    assert made.metric == made.results[0]["top1"]
    (command,) = written["commands"]
    assert command.startswith("python evaluate.py")
    assert "compare=none" in command
    assert (made.output / "report.html").is_file()
    for name, place in made.artifacts.items():
        assert place.parent.parent == home / "store"
        assert place.is_dir(), name


def test_what_was_made_is_loaded(made: Run) -> None:
    own, real = made.load(), made.load("real")
    assert own.images.shape == real.images.shape == (20, 3, 32, 32)
    assert not torch.equal(own.images, real.images)
    assert own.epochs == 3
    samples, logits = next(own.batches(0))
    assert len(samples) == len(logits)
    with pytest.raises(ValueError, match=f"no images of reel were made here; choose from {made.row}, real"):
        made.load("reel")


def test_other_verbs_find_what_is_there(made: Run) -> None:
    images = cvdd.distill(*TINY)
    labels = cvdd.relabel(*TINY)
    members = cvdd.train(*TINY)
    assert images.artifacts.items() < labels.artifacts.items()
    assert labels.artifacts.items() < made.artifacts.items()
    assert torch.equal(images.load().images, made.load().images)
    assert (images.load().epochs, labels.load().epochs) == (0, 3)
    assert (images.metric, labels.metric) == (None, None)
    assert members.metric is not None
    assert set(members.artifacts) == {f"members/{name}" for name in ("resnet18", "resnet50", "shufflenetv2")}
    assert (images.results, members.results) == ((), ())
    with pytest.raises(ValueError, match="choose from none"):
        members.load()


REFUSED = {
    "method=nonsense": "method=nonsense: choose ",
    "methodd.lr=1": "there is no such field or group",
    "method.lr=-1": r"method\.lr=-1",
    "ipc=7": "there is no preset 7; choose",
    "protocol.epochs=1,2": r"protocol\.epochs=1,2: several values are a multirun's; call once for each of them",
    "ipc=1,10": "several values",
    "sweep=voting": "a sweep is a command; type python distill.py sweep=voting",
    "--multirun": "give overrides alone",
    "hydra/launcher=local": "starts jobs of a command; leave it out",
    "method.iterations": "write KEY=VALUE",
    "paths.output=/proc/nowhere": r"paths\.output=DIR",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_mistake_is_raised_with_what_to_write(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=REFUSED[override]):
        cvdd.distill(*TINY, override)
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("*/*/manifest.json"))


@pytest.mark.parametrize("override", [["ipc=10"], 3, None])
def test_an_override_is_a_string(override: object) -> None:
    with pytest.raises(ValueError, match=r"overrides are strings; write cvdd\.train\('ipc=10', 'method=cvdd'\)"):
        cvdd.train(override)  # type: ignore[arg-type]


def test_calls_from_several_threads_go_one_after_the_other(made: Run) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda verb: getattr(cvdd, verb)(*TINY), ("distill", "relabel")))
    assert [run.artifacts.items() <= made.artifacts.items() for run in runs] == [True, True]


def test_rows_that_are_the_same_are_told_and_others_are_not(made: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Neither is what would be made without an override that was typed."""
    cvdd.evaluate(*TINY, "compare=none", ROW)
    assert not [message for message in caplog.messages if "one and the same" in message]
    typed = ("compare=none", "+compare.again={method.checkpoint_every: 4}")
    cvdd.evaluate(*TINY, *typed)
    assert [message for message in caplog.messages if f"rows {made.row} and again are one and the same" in message]


def test_a_folder_of_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(
        "defaults: [cvdd_tiny, _self_]\nname: mine\niterations: 0\n"
    )
    monkeypatch.chdir(tmp_path)
    typed = tuple(item for item in TINY if not item.startswith("method."))
    found = cvdd.distill("method=mine", *typed, config_dir="conf")
    assert (found.row, list(found.artifacts)) == ("mine", ["mine/images"])
    with pytest.raises(ValueError, match="method=mine: choose"):
        cvdd.distill("method=mine", *typed)
    with pytest.raises(ValueError, match="there is no such directory"):
        cvdd.distill(*typed, config_dir="elsewhere")


def test_a_program_that_uses_hydra_itself_keeps_it(made: Run, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_directory()), version_base="1.2"):
        theirs = GlobalHydra.instance().hydra
        before = HydraConfig.instance().cfg
        cvdd.distill(*TINY)
        with pytest.raises(ValueError, match="choose"):
            cvdd.distill("method=nonsense")
        assert GlobalHydra.instance().hydra is theirs
        assert HydraConfig.instance().cfg is before
        assert compose("train").verb == "train"


def test_what_it_would_cost_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = cvdd.distill(*TINY, "cost=true")
    assert (found.metric, dict(found.artifacts)) == (None, {})
    assert re.search(r"^ ?images +1 set of images", capsys.readouterr().out, re.MULTILINE)


def test_nothing_heavy_is_imported_before_a_call() -> None:
    code = "import sys, cvdd; print(any(name.split('.')[0] in ('torch', 'hydra', 'pydantic') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
