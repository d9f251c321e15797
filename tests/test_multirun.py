"""The report of a multirun that was typed, whose points have numbers and not names."""

from __future__ import annotations

import csv
import errno
import json
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cvdd.report.sweeps import progress, read_directory, write_report
from cvdd.report.watch import Watch
from cvdd.support.outcome import OUTCOME, PointFailed, outcome_kept

RESULT = {
    "row": "cvdd",
    "student": "net",
    "protocol": "p",
    "n": 2,
    "top1_by_seed": [49.0, 51.0],
    "top1": 50.0,
    "std": 1.4142,
    "standard_error": 1.0,
    "best_top1": 52.0,
    "top5": 90.0,
    "loss": 1.0,
}


def test_a_point_that_failed_is_told_from_one_that_is_made(tmp_path: Path) -> None:
    config = {"hydra": {"overrides": {"task": ["ipc.images_per_class=0,1"]}, "job": {"name": "evaluate"}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "multirun.yaml")
    for number in ("0", "1"):
        (tmp_path / number / ".hydra").mkdir(parents=True)
        (tmp_path / number / ".hydra" / "overrides.yaml").write_text(f'["ipc.images_per_class={number}"]')
    first = outcome_kept(tmp_path / "0", "evaluate", ["ipc.images_per_class=0"])
    with pytest.raises(PointFailed, match="no"), first:
        raise PointFailed("no such thing")
    sweep = read_directory(tmp_path)
    assert [(point.status, point.error) for point in sweep.points] == [
        ("failed", "no such thing"),
        ("not finished", ""),
    ]
    assert progress(sweep) == "0 of 2 points are done; 1 failed (0); 1 not finished (1)."
    with outcome_kept(tmp_path / "0", "evaluate", ["ipc.images_per_class=0"]):
        assert [point.status for point in read_directory(tmp_path).points] == ["not finished", "not finished"]


def test_a_full_disk_does_not_hide_why_a_point_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PointFailed, match="no such thing"), outcome_kept(tmp_path, "evaluate", []):
        raise PointFailed("no such thing")


def test_a_multirun_that_was_typed_has_the_axes_that_differ(tmp_path: Path) -> None:
    config = {"hydra": {"overrides": {"task": ["temperature='1','5'", "seed=1"]}, "job": {"name": "evaluate"}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "multirun.yaml")
    for number, vote in enumerate(("1", "5")):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        typed = [f"temperature='{vote}'", "seed=1"]
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(json.dumps(typed))
    metrics = {"results": [RESULT], "code": {}}
    (tmp_path / "1" / "metrics.json").write_text(json.dumps(metrics))
    sweep = read_directory(tmp_path)
    assert sweep.axes == ("temperature",)
    assert [(point.at, point.status) for point in sweep.points] == [(("1",), "not finished"), (("5",), "done")]
    assert progress(sweep) == "1 of 2 points are done; 1 not finished (0)."
    assert "<svg" in write_report(tmp_path).read_text()


def test_rows_that_stand_beside_a_point_are_shown_with_it(tmp_path: Path) -> None:
    """What random real images reach belongs to what the distilled ones do, with the bytes of both."""
    typed(tmp_path, "evaluate", "seed=0,1")
    real = RESULT | {
        "row": "random_real",
        "top1": 48.0,
        "image_bytes": 310_000,
        "label_bytes": 980_000,
        "seeds": [0, 1],
    }
    code = {"commit": "0123456789abcdef", "changed": "fedcba"}
    for number in (0, 1):
        with outcome_kept(begun(tmp_path, number, f"seed={number}"), "evaluate", [f"seed={number}"]):
            metrics = {"results": [RESULT, real], "code": code}
            (tmp_path / str(number) / "metrics.json").write_text(json.dumps(metrics))
    rows = in_table(tmp_path)
    assert [(row["point"], row["row"], row["top1"]) for row in rows] == [
        (number, name, top1) for number in "01" for name, top1 in (("cvdd", "50.0"), ("random_real", "48.0"))
    ]
    assert (rows[1]["image_bytes"], rows[1]["label_bytes"], rows[1]["seeds"]) == ("310000", "980000", "[0, 1]")
    table = (tmp_path / "table.md").read_text()
    assert "| 1 | 1 | random_real | net | p | 2 | 48.0 \u00b1 1.0 | 52.0 | 90.0 | 310 kB | 980 kB | done |" in table
    page = (tmp_path / "report.html").read_text()
    assert page.count(">random_real</td>") == 2
    assert "Commit 0123456789ab with changes fedcba." in page


def typed(directory: Path, verb: str, *overrides: str) -> None:
    """What Hydra leaves of a command where a multirun begins."""
    directory.mkdir(exist_ok=True)
    config = {"hydra": {"overrides": {"task": list(overrides)}, "job": {"name": verb}}}
    OmegaConf.save(OmegaConf.create(config), directory / "multirun.yaml")


def begun(directory: Path, number: int, *overrides: str) -> Path:
    """What Hydra leaves of a point where it begins."""
    folder = directory / str(number)
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    return folder


def statuses(directory: Path) -> list[str]:
    return [point.status for point in read_directory(directory).points]


@pytest.mark.parametrize("verb", ["train", "distill", "relabel"])
def test_points_of_verbs_that_measure_no_students_are_done_when_they_ended(verb: str, tmp_path: Path) -> None:
    typed(tmp_path, verb, "committee.size=1,2")
    for number, size in enumerate((1, 2)):
        with outcome_kept(begun(tmp_path, number, f"committee.size={size}"), verb, [f"committee.size={size}"]):
            assert statuses(tmp_path)[number] == "not finished"
    assert statuses(tmp_path) == ["done", "done"]
    view = Watch().look(tmp_path)
    assert view.over
    assert view.mean is not None


def test_an_interrupted_point_is_not_done(tmp_path: Path) -> None:
    typed(tmp_path, "train", "seed=0")
    with pytest.raises(KeyboardInterrupt), outcome_kept(begun(tmp_path, 0, "seed=0"), "train", ["seed=0"]):
        raise KeyboardInterrupt
    assert statuses(tmp_path) == ["not finished"]


def test_results_of_an_earlier_command_are_not_those_of_the_next(tmp_path: Path) -> None:
    """In one hydra.sweep.dir; the second command's only point is killed, and the third only asks for the cost."""
    typed(tmp_path, "evaluate", "seed=0")
    with outcome_kept(begun(tmp_path, 0, "seed=0"), "evaluate", ["seed=0"]):
        (tmp_path / "0" / "metrics.json").write_text(json.dumps({"results": [RESULT], "code": {}}))
    assert statuses(tmp_path) == ["done"]
    # The cost of the same is asked; Hydra writes its files again.
    typed(tmp_path, "evaluate", "seed=0", "cost=true")
    begun(tmp_path, 0, "seed=0", "cost=true")
    assert statuses(tmp_path) == ["done"]
    typed(tmp_path, "evaluate", "seed=7", "cost=true")
    begun(tmp_path, 0, "seed=7", "cost=true")
    assert statuses(tmp_path) == ["missing"]
    typed(tmp_path, "distill", "seed=0")
    begun(tmp_path, 0, "seed=0")
    assert statuses(tmp_path) == ["missing"]
    with pytest.raises(KeyboardInterrupt), outcome_kept(begun(tmp_path, 0, "seed=0"), "distill", ["seed=0"]):
        raise KeyboardInterrupt
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == [".hydra", OUTCOME]
    assert "50.0" not in write_report(tmp_path).read_text()


def in_table(directory: Path) -> list[dict[str, str]]:
    write_report(directory)
    with (directory / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_grid_of_three_settings_has_a_column_for_each(tmp_path: Path) -> None:
    typed(tmp_path, "evaluate", "committee.size=1,2", "seed=0,1", "temperature='1','5'", "ipc='10'")
    grid = list(product("12", "01", "15"))
    for number, (size, seed, vote) in enumerate(grid):
        own = [f"committee.size={size}", f"seed={seed}", f"temperature='{vote}'", "ipc='10'"]
        with outcome_kept(begun(tmp_path, number, *own), "evaluate", own):
            (tmp_path / str(number) / "metrics.json").write_text(json.dumps({"results": [RESULT], "code": {}}))
    rows = in_table(tmp_path)
    assert [(row["committee.size"], row["seed"], row["temperature"]) for row in rows] == grid
    assert [row["point"] for row in rows] == [str(number) for number in range(8)]
    assert {row["top1"] for row in rows} == {"50.0"}
    assert "ipc" not in rows[0]
    assert "| 3 | committee.size=1 seed=1 temperature=5 | cvdd | net |" in (tmp_path / "table.md").read_text()


def test_a_setting_may_be_called_as_a_column_of_the_results(tmp_path: Path) -> None:
    typed(tmp_path, "evaluate", "protocol=tiny,paper")
    own = ["protocol=tiny"]
    with outcome_kept(begun(tmp_path, 0, *own), "evaluate", own):
        (tmp_path / "0" / "metrics.json").write_text(json.dumps({"results": [RESULT], "code": {}}))
    shown = [(row["protocol (typed)"], row["protocol"], row["status"]) for row in in_table(tmp_path)]
    assert shown == [("tiny", "p", "done"), ("paper", "", "missing")]


def test_a_multirun_of_one_point_has_its_name(tmp_path: Path) -> None:
    typed(tmp_path, "evaluate", "seed=1")
    begun(tmp_path, 0, "seed=1")
    (row,) = in_table(tmp_path)
    assert (row["point"], row["settings"], row["status"]) == ("0", "0", "not finished")


def test_nothing_shows_the_directories_of_the_machine(tmp_path: Path) -> None:
    """Two of the three places have the same last part, and are two points of the axis all the same."""
    places = ("/home/alice/a/raw", "/home/alice/b/raw", "/home/alice/other, with a comma")
    quoted = [places[0], places[1], f"'{places[2]}'"]
    typed(tmp_path, "evaluate", f"dataset.root={','.join(quoted)}")
    for number, place in enumerate(quoted):
        own = [f"dataset.root={place}"]
        error = (
            f"/home/alice/x: not there; '/home/alice/my data/y', or (/home/alice/z), at 3/4 of https://a.b/c {number}"
        )
        with pytest.raises(PointFailed), outcome_kept(begun(tmp_path, number, *own), "evaluate", own):
            raise PointFailed(error)
    rows = in_table(tmp_path)
    assert [row["dataset.root"] for row in rows] == [
        "<elsewhere>/raw",
        "<elsewhere>/raw (2)",
        "<elsewhere>/other, with a comma",
    ]
    said = "<elsewhere>/x: not there; '<elsewhere>/y', or (<elsewhere>/z), at 3/4 of https://a.b/c 1"
    assert rows[1]["error"] == said
    for file in ("results.csv", "table.md", "report.html"):
        assert "alice" not in (tmp_path / file).read_text()
