"""The four commands as a user sees them: what they print, what they leave behind, and what they do the second time."""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TINY, configure
from PIL import Image

from cvdd.artifact.cleaning import sealed
from cvdd.chain.unit_files import load_history
from cvdd.commands.runtime import Invocation, run
from cvdd.report.summary import COLUMNS
from cvdd.support.config_base import ConfigError
from cvdd.support.provenance import code_version

SMALL = (
    *TINY,
    "~committee.members.shufflenetv2",
    "committee.members.resnet50.bn_scale=0.5",
    "method.r_bn=0.02",
    "recipe.epochs=1",
    "method.iterations=4",
    "method.log_every=1",
    "protocol.epochs=2",
    "prior.source=measured",
    "prior.values=null",
    "prior.images_per_class=2",
    "prior.iterations=2",
    "prior.epochs=2",
    "trainer.threads=1",
)
TABLE = (
    "compare=random_real",
    "protocol.full_data=true",
    "protocol.seeds=[0,1]",
    "+backbone@students.tiny_convnet3=tiny_convnet3",
)
GIVEN = ("prior.source=given", "prior.values={resnet18: 40, resnet50: 30}")
MEMBERS = ("resnet18", "resnet50")
STUDENTS = ("tiny_resnet18", "tiny_convnet3")
ROWS = ("cvdd", "random_real")


@dataclass(frozen=True)
class Outcome:
    """What a command returned and where it wrote."""

    metric: float | None
    output: Path
    store: Path

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.output / "metrics.json").read_text())

    def rows(self) -> list[dict[str, str]]:
        with (self.output / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def logged(self) -> list[dict[str, float]]:
        with (self.output / "csv" / "metrics.csv").open() as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def command(store: Path, output: Path, verb: str, *overrides: str) -> Outcome:
    typed = (*SMALL, *overrides)
    places = (f"paths.store={store}", f"paths.output={output}")
    metric = run(configure(output, *typed, *places, verb=verb), Invocation((*typed, *places))).metric
    return Outcome(metric, output, store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verbs") / "store"


@pytest.fixture(scope="module")
def evaluated(store: Path) -> Outcome:
    """The comparison with everything in it, made once."""
    return command(store, store.parent / "evaluated", "evaluate", *TABLE)


def state(store: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in store.rglob("*")
        # Locks, and what running processes use.
        if path.is_file() and path.suffix != ".lock" and ".users" not in path.parts
    }


@pytest.mark.parametrize(
    "overrides", [("method=full", "label=hard", "protocol=hard"), ("method=random_real",), ("method=rded",)]
)
def test_methods_that_keep_real_images_end_with_a_page(
    evaluated: Outcome, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    typed = (*overrides, "method.iterations=0", *GIVEN, "compare=none", "protocol.epochs=1", "protocol.seeds=[0]")
    outcome = command(evaluated.store, tmp_path / "out", "evaluate", *typed)
    assert "<html" in (outcome.output / "report.html").read_text()
    assert [row["row"] for row in outcome.rows()] == [outcome.metrics()["results"][0]["row"]]


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_prints_its_members_and_returns_their_mean(
    evaluated: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = state(evaluated.store)
    trained = command(evaluated.store, tmp_path / "out", "train")
    assert state(evaluated.store) == before
    members = [artifact for artifact in sealed(evaluated.store) if artifact.kind == "members"]
    voting = [artifact for artifact in members if artifact.name.endswith(MEMBERS)]
    assert len(voting) == len(MEMBERS)
    assert trained.metric == pytest.approx(statistics.fmean(member.metrics["test_top1"] for member in voting))
    printed = capsys.readouterr().out
    for member in voting:
        line = next(line for line in printed.splitlines() if line.rstrip().endswith(member.path.name))
        assert f"{member.metrics['test_top1']:.1f}" in line
        assert f"{member.metrics['parameters']:,}" in line


# --- distill ----------------------------------------------------------------------------------------------------------


def test_distill_leaves_a_picture_and_tells_where_the_images_are(
    evaluated: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    before = state(evaluated.store)
    distilled = command(evaluated.store, tmp_path / "out", "distill")
    assert state(evaluated.store) == before
    assert distilled.metric is None
    printed = capsys.readouterr().out
    name = evaluated.metrics()["results"][0]["images"]
    assert str(evaluated.store / "images" / name) in printed
    assert str(distilled.output / "images.png") in printed
    # Ten classes a column, two images a row, each enlarged twice with a border of two pixels.
    with Image.open(distilled.output / "images.png") as picture:
        assert picture.size == (2 * 66 + 2, 10 * 66 + 2)
        assert len(picture.convert("L").getcolors()) > 50


def test_artefacts_of_other_code_are_used_with_a_word(
    evaluated: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(evaluated.store, tmp_path / "same", "distill")
    assert "other code" not in caplog.text
    changed = {**code_version(), "source": "0" * 12}
    monkeypatch.setattr("cvdd.support.provenance.code_version", lambda: changed)
    command(evaluated.store, tmp_path / "other", "distill")
    assert re.search(r"(\d+) of the \1 artefacts of this run were made by other code .*paths\.store=DIR", caplog.text)


def test_a_picture_of_a_large_set_shows_some_of_it(
    evaluated: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys.modules["cvdd.verbs.distill"], "PIXELS", 64**2 * 19)
    monkeypatch.setattr("cvdd.report.gallery.CLASSES", 4)
    monkeypatch.setattr("cvdd.report.gallery.SLOTS", 1)
    distilled = command(evaluated.store, tmp_path / "out", "distill")
    assert "images.png (4 of 10 classes, evenly spread; 1 of 2 slots)" in capsys.readouterr().out
    with Image.open(distilled.output / "images.png") as picture:
        assert picture.size == (66 + 2, 4 * 66 + 2)


def test_terms_are_logged_as_they_enter_the_loss(evaluated: Outcome, tmp_path: Path) -> None:
    """One unit a stack, so that its weights and terms are those of the stack; with bn_scale and r_bn of their own."""
    overrides = ("method.units_per_stack=1", "method.ce=2")
    distilled = command(evaluated.store, tmp_path / "out", "distill", *overrides, *GIVEN)
    rows = [row for row in distilled.logged() if "distill/loss" in row]
    assert len(rows) == 2 * 4
    for row in rows:
        shares = {name: row[f"distill/weight/{name}"] for name in MEMBERS}
        assert sum(shares.values()) == pytest.approx(1)
        terms = sum(share * (row[f"distill/ce/{name}"] + row[f"distill/bn/{name}"]) for name, share in shares.items())
        assert row["distill/loss"] == pytest.approx(terms, rel=1e-4)
    (images,) = (a for a in sealed(evaluated.store) if a.kind == "images" and a.metrics["stacks"] == 2)
    stored = load_history(images)["slot0000_block0000"]["rows"][0]
    assert rows[0]["distill/bn/resnet50"] == pytest.approx(0.02 * 0.5 * stored["bn"]["resnet50"], rel=1e-5)
    assert rows[0]["distill/bn/resnet18"] == pytest.approx(0.02 * stored["bn"]["resnet18"], rel=1e-5)
    assert rows[0]["distill/ce/resnet18"] == pytest.approx(2 * stored["ce"]["resnet18"], rel=1e-5)


# --- relabel ----------------------------------------------------------------------------------------------------------


def test_relabel_names_images_and_teachers(
    evaluated: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    before = state(evaluated.store)
    assert command(evaluated.store, tmp_path / "out", "relabel").metric is None
    assert state(evaluated.store) == before
    printed = capsys.readouterr().out
    main = evaluated.metrics()["results"][0]
    assert str(evaluated.store / "labels" / main["labels"]) in printed
    assert str(evaluated.store / "images" / main["images"]) in printed
    for name, member in evaluated.metrics()["members"].items():
        assert f"{name} {member['label_weight']:.3f}" in printed


def test_relabel_has_nothing_to_make_without_teachers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label\.teachers=none makes no labels: .*Run evaluate\.py"):
        command(tmp_path / "store", tmp_path / "out", "relabel", "label=hard", "protocol=hard")


def test_relabel_has_nothing_to_make_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label\.store=none computes .*label\.store=logits"):
        command(tmp_path / "store", tmp_path / "out", "relabel", "label.store=none")
    assert not list((tmp_path / "store").glob("members/*"))


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_returns_its_own_first_row(evaluated: Outcome) -> None:
    results = evaluated.metrics()["results"]
    assert [(result["row"], result["student"]) for result in results] == [
        (row, student) for row in ("cvdd", "random_real", "full_data") for student in STUDENTS
    ]
    assert evaluated.metric == results[0]["top1"] == pytest.approx(statistics.fmean(results[0]["top1_by_seed"]))
    assert [result["protocol"] for result in results] == ["tiny"] * 4 + ["recipe tiny"] * 2
    for result in results:
        assert (result["n"], result["seeds"]) == (2, [0, 1])
        assert (result["image_bytes"] is None) == (result["row"] == "full_data")
        of_real_data = result["row"] == "full_data"
        assert (result["best_top1"] is None) == of_real_data
        assert 0 <= result["top1"] <= (100 if of_real_data else result["best_top1"]) <= 100


def test_the_table_for_spreadsheets_holds_the_same_numbers(evaluated: Outcome) -> None:
    rows, results = evaluated.rows(), evaluated.metrics()["results"]
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(results)
    for row, result in zip(rows, results, strict=True):
        for column in COLUMNS:
            value = result[column]
            if isinstance(value, (int, float)):
                assert float(row[column]) == value, column
            else:
                assert row[column] == ("" if value is None else str(value)), column


def test_priors_stand_in_the_summary(evaluated: Outcome, tmp_path: Path) -> None:
    measured = {name: member["prior"] for name, member in evaluated.metrics()["members"].items()}
    students = [artifact for artifact in sealed(evaluated.store) if artifact.kind == "students"]
    known = {student.metrics["top1"] for student in students if "prior-" in student.name}
    assert list(measured) == list(MEMBERS)
    assert set(measured.values()) == known
    members = command(evaluated.store, tmp_path / "out", "evaluate", *GIVEN).metrics()["members"]
    assert {name: member["prior"] for name, member in members.items()} == {"resnet18": 40.0, "resnet50": 30.0}
    assert members["resnet18"]["label_weight"] > members["resnet50"]["label_weight"]


def test_the_page_holds_the_numbers_and_the_cost_of_the_priors(evaluated: Outcome) -> None:
    page = (evaluated.output / "report.html").read_text()
    for result in evaluated.metrics()["results"]:
        assert f"{result['top1']:.1f} \u00b1 {result['standard_error']:.1f}" in page
    assert "recipe tiny" in page
    assert "images and students for resnet18, resnet50" in page
    artifacts = [artifact for artifact in sealed(evaluated.store) if "-prior-" in artifact.name]
    assert {artifact.kind for artifact in artifacts} == {"images", "students"}
    assert all(artifact.digest in page for artifact in artifacts)


def test_the_csv_log_has_members_terms_and_students_curves(evaluated: Outcome) -> None:
    logged = evaluated.logged()
    distilling = [row for row in logged if "distill/loss" in row]
    assert [row["step"] for row in distilling] == [1, 2, 3, 4]
    for row in distilling:
        for name in MEMBERS:
            assert row[f"distill/ce/{name}"] > 0
            assert row[f"distill/bn/{name}"] > 0
            assert 0 < row[f"distill/weight/{name}"] < 1
    results = {(result["row"], result["student"]): result for result in evaluated.metrics()["results"]}
    for row, prefix in (("cvdd", ""), ("random_real", "random_real/")):
        for student in STUDENTS:
            for seed in (0, 1):
                curve = [entry for entry in logged if f"{prefix}evaluate/{student}/seed{seed}/train_loss" in entry]
                assert [entry["step"] for entry in curve] == [1, 2]
                last = curve[-1][f"{prefix}evaluate/{student}/seed{seed}/top1"]
                assert last == pytest.approx(results[row, student]["top1_by_seed"][seed])
    assert any("train/resnet18/train_loss" in row for row in logged)
    assert any("prior of resnet18/distill/loss" in row for row in logged)
    final = [row["result/cvdd/tiny_resnet18/top1"] for row in logged if "result/cvdd/tiny_resnet18/top1" in row]
    assert final == [evaluated.metric]


def test_a_second_run_makes_nothing_and_shows_the_same(
    evaluated: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    before = state(evaluated.store)
    second = command(evaluated.store, tmp_path / "out", "evaluate", *TABLE)
    assert state(evaluated.store) == before
    assert second.metric == evaluated.metric
    assert second.metrics()["results"] == evaluated.metrics()["results"]
    printed = capsys.readouterr().out.splitlines()
    for result in evaluated.metrics()["results"]:
        (line,) = (line for line in printed if {result["row"], result["student"]} <= set(line.split()))
        assert f"{result['top1']:.1f} +- {result['standard_error']:.1f}" in line
        assert result["protocol"] in line


def test_a_point_that_is_a_row_is_shown_as_that_row(evaluated: Outcome, tmp_path: Path) -> None:
    typed = (*SMALL, *TABLE, f"paths.store={evaluated.store}", f"paths.output={tmp_path}")
    metric = run(configure(tmp_path, *typed), Invocation(typed, point=("initialisation", "random_real"))).metric
    outcome = Outcome(metric, tmp_path, evaluated.store)
    own, row = (next(float(one["top1"]) for one in outcome.rows() if one["row"] == name) for name in ROWS)
    (shown,) = (values for values in outcome.logged() if "result/top1" in values)
    assert (metric, shown["result/top1"]) == (pytest.approx(row, abs=0.01), pytest.approx(row, abs=0.01))
    assert own != row
    described = yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())
    assert (described["method"]["init"], described["compare"]) == ("real", {})
