"""Published numbers beside measured ones: the verdict of a run, and the list of recipes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose, compose_raw
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from report_helpers import Maker

from cvdd.artifact import Store
from cvdd.composition.config_directory import config_directory
from cvdd.composition.validation import check
from cvdd.report.__main__ import main
from cvdd.report.experiments import changed_fields, composed, differences, find_runs, read_recipes
from cvdd.report.tables import print_verdict
from cvdd.report.verdict import hold_against, verdict_sentence
from cvdd.schema import ExpectedConfig
from cvdd.support.config_base import ConfigError

NAME = "cvdd_table1_cifar10_ipc10_r18"


def expected(**changes: Any) -> ExpectedConfig:
    known = {"source": "a paper", "table": "table 1", "cell": "CIFAR-10", "student": "small", "value": 44.0}
    return ExpectedConfig.model_validate({**known, "tolerance": 2.0, **changes})


@pytest.fixture
def maker(tmp_path: Path, compose: Compose) -> Maker:
    return Maker(compose("evaluate"), Store(tmp_path / "store"))


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_the_best_epochs_of_the_first_row_are_held_against_the_number(maker: Maker) -> None:
    own, other = maker.distilled("own", "patches", 50), maker.distilled("other", "real", 0)
    # The best epochs of these students are one point above their last ones.
    results = [
        maker.result(own, [10.0, 11.0], "large"),
        maker.result(own, [40.0, 42.0]),
        maker.result(other, [90.0, 91.0]),
    ]
    verdict = hold_against(expected(), results)
    assert verdict is not None
    assert (verdict["measured"], verdict["n"], verdict["within"]) == (42.0, 2, True)
    # Two values a distance d apart have the standard error d / 2.
    assert verdict["standard_error"] == pytest.approx(1.0)
    assert verdict_sentence(verdict) == (
        "expected 44.0 (tolerance 2.0) (a paper, table 1: CIFAR-10), measured 42.0 +- 1.0 (best epoch), n = 2: "
        "within the tolerance"
    )
    last = hold_against(expected(epoch="last", note="says who"), results)
    assert last is not None
    assert (last["measured"], last["within"]) == (41.0, False)
    assert "CIFAR-10; says who), measured 41.0 +- 1.0 (last epoch)" in verdict_sentence(last)
    assert verdict_sentence(last).endswith(": outside the tolerance")


def test_another_experiment_is_not_held_against_the_number(maker: Maker) -> None:
    results = [maker.result(maker.distilled("own", "patches", 50), [43.0])]
    verdict = hold_against(expected(), results, ["method.lr", "recipe.epochs", "label.name", "protocol.lr"])
    assert verdict is not None
    assert verdict["within"] is None
    sentence = verdict_sentence(verdict)
    assert sentence == (
        "measured 44.0 (best epoch), n = 1; not held against 44.0 (tolerance 2.0) (a paper, table 1: CIFAR-10), "
        "because this run has other method.lr, recipe.epochs, label.name and 1 more"
    )


def test_what_a_run_changed_of_its_recipe_is_found(tmp_path: Path) -> None:
    config = composed(NAME)
    assert changed_fields(config) == ()
    assert changed_fields({**config, "seed": 7, "compare": {}}) == ()
    assert changed_fields({**config, "method": {**config["method"], "lr": 0.5}}) == ("method.lr",)
    assert changed_fields({**config, "expected": {**config["expected"], "cell": "nobody's"}, "seed": 7}) == ()


def test_a_running_command_keeps_its_hydra() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert running is not None
        composed(NAME)
        assert GlobalHydra.instance().hydra is running


def test_a_number_that_cannot_be_read_gives_no_verdict(maker: Maker) -> None:
    results = [maker.result(maker.distilled("own", "patches", 50), [40.0])]
    verdict = hold_against(expected(value=None, tolerance=None, note="the table is a picture"), results)
    assert verdict is not None
    assert (verdict["within"], verdict["standard_error"]) == (None, None)
    assert "measured 41.0 (best epoch), n = 1: the table is a picture" in verdict_sentence(verdict)
    assert hold_against(None, results) is None


def test_page_and_terminal_show_the_verdict(maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    made = maker.distilled("own", "patches", 50)
    results = [maker.result(made, [43.0, 43.0])]
    summary = maker.summary([made], results)
    assert "Published:" not in maker.page([made], results).text
    verdict = hold_against(expected(cell="<b>[red]"), results)
    maker.summary = lambda *_: {**summary, "verdict": verdict}  # type: ignore[method-assign]
    text = maker.page([made], results).text
    said = (
        "Published: expected 44.0 (tolerance 2.0) (a paper, table 1: <b>[red]), measured 44.0 \u00b1 0.0 (best epoch)"
    )
    assert said in text
    print_verdict(verdict)
    assert "table 1: <b>[red])" in " ".join(capsys.readouterr().out.split())
    print_verdict(None)
    assert not capsys.readouterr().out


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"value": None}, "expected.tolerance is a number exactly when expected.value is one"),
        ({"tolerance": None}, "expected.tolerance is a number exactly when expected.value is one"),
        ({"value": None, "tolerance": None}, "expected.value=null needs expected.note"),
    ],
)
def test_a_number_has_a_tolerance_and_no_number_has_a_reason(changes: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        expected(**changes)


def test_the_measured_student_must_be_trained(tmp_path: Path) -> None:
    raw = compose_raw(tmp_path, "evaluate", f"experiment={NAME}", "students=small_all", "~students.resnet18")
    with pytest.raises(ConfigError, match="expected.student=resnet18 is not among the students .*expected=null"):
        check(raw)
    raw = compose_raw(
        tmp_path, "evaluate", f"experiment={NAME}", "students=small_all", "~students.resnet18", "expected=null"
    )
    assert check(raw).expected is None


# --- the list ---------------------------------------------------------------------------------------------------------


def leave_run(folder: Path, config: Mapping[str, Any], measured: float, time: int) -> None:
    folder.mkdir(parents=True)
    verdict = {
        "expected": config["expected"],
        "measured": measured,
        "standard_error": 0.25,
        "n": 3,
        "within": abs(measured - config["expected"]["value"]) <= config["expected"]["tolerance"],
    }
    path = folder / "metrics.json"
    path.write_text(json.dumps({"config": config, "verdict": verdict}))
    os.utime(path, (time, time))


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["experiments", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_list_says_what_was_measured_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert listed(capsys, NAME)[0].split(maxsplit=4) == [NAME, "44.6", "(tolerance", "1.5)", "not measured here"]
    config = composed(NAME)
    shorter = {**config, "protocol": {**config["protocol"], "epochs": 3, "seeds": [7]}}
    leave_run(tmp_path / "outputs" / "evaluate" / "a", shorter, 20.0, 1000)
    assert listed(capsys, NAME)[0].endswith("not measured here; with other protocol.epochs: 20.0 +- 0.2, n = 3")
    # Other seeds, another machine and more rows measure the same cell.
    same = {
        **config,
        "protocol": {**config["protocol"], "seeds": [5, 6]},
        "paths": {"data": "x"},
        "compare": {"real": {}},
    }
    leave_run(tmp_path / "multirun" / "b" / "0", same, 45.0, 500)
    assert "measured 45.0 +- 0.2, n = 3, within tolerance (multirun/b/0)" in listed(capsys, NAME)[0]
    leave_run(tmp_path / "outputs" / "c", same, 40.0, 600)
    lines = listed(capsys, NAME)
    assert "measured 40.0 +- 0.2, n = 3, outside tolerance (outputs/c)" in lines[0]
    assert lines[1].startswith("1 recipes, 1 measured here")


def test_all_recipes_are_listed_or_those_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = listed(capsys)
    assert len(lines) > 200
    assert lines[-1].startswith(f"{len(lines) - 1} recipes, 0 measured here")
    assert len(listed(capsys, "table7", "no_bssl")) == 7
    assert any("unreadable" in line for line in lines)
    assert main(["experiments", "table99"]) == 2
    assert "table99" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in {"a": "{", "b": "[]", "c": "{}", "d": '{"verdict": null}', "e": '{"verdict": {}}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content)
    assert not list(find_runs([tmp_path]))
    assert "a/metrics.json: cannot be read" in caplog.text


def test_differences_leave_out_what_a_run_may_choose() -> None:
    one = {"seed": 0, "method": {"seed": 0, "lr": 0.1}, "ipc": {"images_per_class": 1}, "trainer": {"threads": 1}}
    other = {"seed": 1, "method": {"seed": 1, "lr": 0.2}, "ipc": {}, "trainer": None}
    assert list(differences(one, other)) == ["method.lr", "ipc.images_per_class"]
    named = {"method": {"name": "mine", "log_agreement": False}, "protocol": {"full_data": True}}
    assert not list(differences(named, {"method": {"name": "theirs"}, "protocol": {}}))


def test_only_files_with_a_number_are_recipes(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "plain.yaml").write_text("seed: 1\n")
    (folder / "number.yaml").write_text(f"expected: {json.dumps(expected().model_dump())}\n")
    assert [(recipe.name, recipe.expected) for recipe in read_recipes(tmp_path)] == [("number", expected())]
