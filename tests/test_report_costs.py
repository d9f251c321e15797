"""What a run cost, with everything that it was made from; and which row a page is about."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from helpers import tiny_context
from omegaconf import OmegaConf
from report_helpers import MEMBERS, Maker, Page

import cvdd.commands.runtime
from cvdd.artifact import Artifact, Store
from cvdd.chain.compare import Distilled
from cvdd.chain.spent import spent_on
from cvdd.commands.runtime import Invocation, run
from cvdd.report.columns import best_shown
from cvdd.report.costs import all_artifacts, stage_costs
from cvdd.report.page import render_page
from cvdd.report.sweeps import csv_table, read_directory
from cvdd.report.tables import print_artifact, print_results
from cvdd.report.watch import Watch
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import OUTCOME


@pytest.fixture
def maker(compose: Compose, tmp_path: Path) -> Maker:
    settings = ("method.iterations=100", "committee.size=2", "label.batch_size=6", "protocol.seeds=[0,1]")
    return Maker(compose("evaluate", *settings), Store(tmp_path / "store"))


def plain(store: Store, kind: str, parents: list[Artifact]) -> Artifact:
    return store.make(kind, f"made-up-{kind}", {"kind": kind}, parents, lambda work: {"images": 6})


# --- costs ------------------------------------------------------------------------------------------------------------


def test_everything_behind_a_run_is_in_one_line(maker: Maker) -> None:
    """Also what is a parent's parent, and what several rows share."""
    main = maker.distilled("cvdd", "patches", 100)
    recorded = plain(maker.store, "statistics", [plain(maker.store, "herds", [])])
    other = replace(main, row="edc", images=plain(maker.store, "images", [recorded]))
    more = replace(main, row="of two seeds", others=((maker.images("second", "real", 0), None),))
    rows = [main, replace(main, row="again"), other, more]
    results = [maker.result(made, [1.0, 2.0]) for made in rows]
    members = {name: maker.member(name) for name in MEMBERS}
    listed = all_artifacts(members, rows, results)
    kinds = Counter(artifact.kind for artifact in listed)
    assert (kinds["statistics"], kinds["herds"], kinds["patches"], kinds["images"]) == (1, 1, 1, 3)
    costs = stage_costs(members, listed, rows, results)
    assert sum(cost.artifacts for cost in costs) == len(listed)
    assert sum(cost.bytes for cost in costs) == sum(artifact.bytes for artifact in listed)
    assert next(cost.what for cost in costs if cost.stage == "images") == "cvdd; again"
    assert [cost.what for cost in costs if cost.what.startswith("statistics")] == ["statistics: made-up-statistics"]


def test_what_each_seed_has_of_its_own_is_one_line(maker: Maker) -> None:
    patches = [maker.store.make("patches", "medium-10", {"seed": seed}, [], lambda work: {}) for seed in range(3)]
    sets = [plain(maker.store, f"images{index}", [one]) for index, one in enumerate(patches)]
    main = replace(maker.distilled("cvdd", "patches", 100), images=sets[0], others=((sets[1], None), (sets[2], None)))
    costs = stage_costs({}, all_artifacts({}, [main], []), [main], [])
    (line,) = (cost for cost in costs if cost.what == "patches: medium-10")
    assert (line.artifacts, line.bytes) == (3, sum(one.bytes for one in patches))


def test_what_is_no_longer_in_the_store_is_left_out(maker: Maker) -> None:
    main = maker.distilled("cvdd", "patches", 100)
    (maker.patches().path / "manifest.json").unlink()
    assert "patches" not in {artifact.kind for artifact in all_artifacts({}, [main], [])}


def test_the_parts_of_images_are_their_cost(maker: Maker) -> None:
    part = plain(maker.store, "image_parts", [plain(maker.store, "teachers", [])])
    images = plain(maker.store, "images", [part])
    seconds = [one.manifest["cost"]["wall_seconds"] for one in (part, images)]
    assert spent_on(images).seconds == pytest.approx(sum(seconds))
    assert spent_on(part).seconds == seconds[0]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_page_of_a_row_is_about_that_row(maker: Maker) -> None:
    """As the point of a sweep that is a row."""
    main, noise = maker.distilled("cvdd", "patches", 100), maker.distilled("noise", "noise", 100)
    results = [maker.result(made, [60.0 + index, 61.0]) for index, made in enumerate((main, noise))]
    summary = maker.summary([main, noise], results)
    for shown, title in (("", "cvdd on"), ("noise", "noise on")):
        context = replace(maker.context, shown=shown)
        page = Page(render_page(context, summary, [main, noise], results))
        assert f"<h1>{title}" in page.source
        headline = page.source.partition('class="headline')[2].partition("</p>")[0]
        assert f">{title.split()[0]} 6" in headline


def test_real_data_have_no_best_epoch(maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    made = maker.distilled("cvdd", "patches", 100, stored=False)
    results = [maker.result(made, [60.0, 61.0]), maker.result(None, [90.0, 91.0])]
    summaries = [result.summary() for result in results]
    assert [best_shown(one) for one in summaries] == ["61.5", "-"]
    assert summaries[0]["image_count"] == 6
    print_results(summaries, "validation")
    printed = capsys.readouterr().out
    assert "not stored" in printed
    assert "validation images" in printed


def test_each_seed_with_images_of_its_own_is_said(maker: Maker) -> None:
    def sentence(made: Distilled) -> bool:
        return "those of the first one" in maker.page([made], [maker.result(made, [60.0, 61.0])]).text

    made = maker.distilled("cvdd", "patches", 100)
    assert not sentence(made)
    assert sentence(replace(made, others=((maker.images("other", "patches", 100), None),)))


def test_a_path_is_printed_as_it_is(maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Store(tmp_path / "[old]store[/x]").make("labels", "a", {}, [], lambda work: {})
    print_artifact(made, {"images": "[bold]here"})
    printed = "".join(capsys.readouterr().out.replace("\u2502", "").split())
    assert "[old]store[/x]" in printed
    assert "[bold]here" in printed


# --- directories ------------------------------------------------------------------------------------------------------


def result(row: str) -> dict[str, Any]:
    return {"row": row, "student": "s", "n": 1, "top1": 1.0, "standard_error": None, "top5": 2.0, "best_top1": 1.5}


@pytest.fixture
def multirun(tmp_path: Path) -> Path:
    """Two points that are done."""
    tree = {"hydra": {"job": {"name": "evaluate"}, "overrides": {"task": ["seed=0,1"]}}}
    OmegaConf.save(OmegaConf.create(tree), tmp_path / "multirun.yaml")
    for index in (0, 1):
        folder = tmp_path / str(index)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- seed={index}\n")
        measured = {"results": [result("cvdd"), result("random_real")], "code": {}, "agreement": {"a, b": 0.25}}
        measured["dataset"] = {"test": {"evaluate_on": "validation"}}
        (folder / "metrics.json").write_text(json.dumps(measured))
        outcome = {"status": "done", "error": "", "verb": "evaluate", "overrides": [f"seed={index}"], "began": 1000.0}
        (folder / OUTCOME).write_text(json.dumps(outcome))
        os.utime(folder / OUTCOME, (1030 + 20 * index, 1030 + 20 * index))
    return tmp_path


def test_agreement_is_of_the_row_that_was_voted_on(multirun: Path) -> None:
    sweep = read_directory(multirun)
    assert {point.measured for point in sweep.points} == {"validation"}
    rows = [line.split(",") for line in csv_table(sweep).splitlines()]
    place, row = rows[0].index("agreement"), rows[0].index("row")
    assert {(line[row], line[place]) for line in rows[1:]} == {("cvdd", "0.25"), ("random_real", "")}


@pytest.mark.parametrize("text", ["{}", '{"results": []}', '{"results": [{}], "code": {}}', "{"])
def test_a_point_whose_results_are_damaged_is_no_result(text: str, multirun: Path) -> None:
    (multirun / "1" / "metrics.json").write_text(text)
    statuses = [(point.status, "metrics.json" in point.error) for point in read_directory(multirun).points]
    assert statuses == [("done", False), ("failed", True)]


@pytest.mark.parametrize("text", ["hydra: {", "a: 1", "- 1", "hydra: 3"])
def test_a_damaged_description_of_a_multirun_is_named(text: str, multirun: Path) -> None:
    (multirun / "multirun.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"multirun\.yaml cannot be read"):
        read_directory(multirun)


def test_points_take_the_time_from_their_first_job_to_their_last(multirun: Path) -> None:
    """Whatever was asked about them since."""
    assert Watch().look(multirun).mean == 40
    for index in (0, 1):
        file = multirun / str(index) / OUTCOME
        file.write_text(
            json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "began"})
        )
        os.utime(file, (1030, 1030))
        os.utime(multirun / str(index) / ".hydra" / "overrides.yaml", (2000 - 980 * index, 2000 - 980 * index))
    # Of the first nothing can be said, for its cost was asked for afterwards.
    assert Watch().look(multirun).mean == 10


def test_a_command_forgets_what_another_one_left_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_context(tmp_path).config
    old = config.paths.output / "report.html"
    old.write_text("of another command")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cvdd.commands.runtime, "VERBS", {"evaluate": interrupted})
    with pytest.raises(KeyboardInterrupt):
        run(config, Invocation(()))
    assert not old.exists()
