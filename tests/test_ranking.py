"""DD-Ranking's scores, against its own board and by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Compose
from helpers import TINY, configure, tiny_context

from cvdd.artifact import Artifact
from cvdd.chain.compare import Result
from cvdd.chain.labels import Labels, _ignored
from cvdd.commands.runtime import Invocation, run
from cvdd.report.headline import Difference
from cvdd.report.ranking import _PLAIN, Ranking, rank, score
from cvdd.report.tables import print_ranking
from cvdd.schema import with_overrides

# Hard label recovery, improvement over random, and the score that follows (specification of the field, section 4.1).
BOARD = {
    "DC, IPC 1": (52.66, 12.40, 0.191),
    "MTT, IPC 1": (42.21, 27.62, 0.239),
    "SRe2L, IPC 10": (67.82, -5.77, 0.138),
    "DATM, IPC 50": (18.89, 23.89, 0.280),
}


@pytest.mark.parametrize(("hlr", "ior", "expected"), BOARD.values(), ids=BOARD)
def test_scores_of_the_board(hlr: float, ior: float, expected: float) -> None:
    found = score(Difference(ior, None), Difference(-hlr, None))
    assert found.value == pytest.approx(expected, abs=5e-4)
    assert found.error is None


def test_the_ends_and_the_error() -> None:
    """All real images' accuracy with nothing to begin with is 1, the reverse 0."""
    assert score(Difference(100, 0), Difference(100, 0)).value == pytest.approx(1)
    assert score(Difference(-100, 0), Difference(-100, 0)).value == pytest.approx(0)
    first, second = Difference(10, 3), Difference(-20, 4)
    found = score(first, second)
    # By finite differences of each, independent.
    moved = [
        score(Difference(10 + 1e-4, None), second).value - found.value,
        score(first, Difference(-20 + 1e-4, None)).value - found.value,
    ]
    assert found.error == pytest.approx(math.hypot(3 * moved[0] / 1e-4, 4 * moved[1] / 1e-4), rel=1e-3)


class Made:
    """Results of a comparison with made-up accuracies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result(self, row: str, values: list[float], *overrides: str, images: str | None = None) -> Result:
        students = tuple(
            Artifact(self.folder / f"{row}{seed}", {"metrics": dict.fromkeys(METRICS, value), "cost": COST})
            for seed, value in enumerate(values)
        )
        seeds = tuple(range(len(values)))
        if row == "full_data":
            return Result(row, "small", "recipe", seeds, students, None, None)
        context = tiny_context(self.folder, *overrides)
        config = context.config
        method = config.method
        identity = {"method": {"init": method.init, "iterations": method.iterations, "factor": method.factor}}
        count = 10 * config.ipc.images_per_class
        manifest = {"kind": "images", "digest": images or row, "identity": identity, "files": {}, "cost": COST}
        of_row = Artifact(self.folder / row, {**manifest, "parents": [], "metrics": {"images": count}})
        teacher = Artifact(self.folder / "teacher", {"kind": "members", "digest": ",".join(config.committee.members)})
        said = {"label": config.label.model_dump(mode="json", exclude=_ignored(config.label)), "seed": config.seed}
        labels = Labels(said, [of_row, teacher], None, context, of_row, [], {})
        return Result(row, "small", context.config.protocol.name, seeds, students, of_row, labels)


METRICS = ("top1", "best_top1", "top5", "loss")
COST = {"wall_seconds": 1.0, "process_seconds": 2.0, "peak_memory_bytes": 10**9}
REAL = ("method=random_real", "method.iterations=0")
HARD = ("label=hard", "protocol=hard_tiny", "protocol.epochs=3", "protocol.eval_every=1")
PLAIN = ("label.crop_scale=[1.0,1.0]", "label.flip=false", "label.mix=none")


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    make = Made(tmp_path)
    return [
        make.result("cvdd", [50, 52]),
        make.result("someone", [49, 50], *REAL),
        make.result("classes", [21, 19], *HARD, images="cvdd"),
        make.result("other classes", [90, 90], *HARD),
        make.result("bare", [40, 42], *PLAIN, images="cvdd"),
        make.result("bare someone", [41, 41], *REAL, *PLAIN),
        make.result("full_data", [90, 92]),
    ]


def test_rows_are_known_by_what_they_are(results: list[Result]) -> None:
    (found,) = rank(results)
    assert isinstance(found, Ranking)
    assert (found.row, found.student) == ("cvdd", "small")
    assert found.hlr is not None
    assert (found.hlr.value, found.ior.value) == (71, 1.5)
    assert found.hlr.error == pytest.approx(math.hypot(1, 1))
    assert found.lrs == score(found.ior, Difference(-71, found.hlr.error))
    assert found.ars is not None
    assert found.ars.value == score(found.ior, Difference(0, None)).value


FOUR = ("method.init=real", "method.factor=2", "label.factor=2")


def test_images_of_several_are_scored_beside_whole_ones(tmp_path: Path) -> None:
    """Four in each are no baseline where whole ones are there, with augmentation and without."""
    make = Made(tmp_path)
    found = rank(
        [
            make.result("four kept", [30, 30], *REAL, *FOUR),
            make.result("cim", [51, 51], *FOUR),
            make.result("whole", [49, 49], *REAL),
            make.result("bare", [41, 41], *FOUR, *PLAIN, images="cim"),
            make.result("bare four", [20, 20], *REAL, *FOUR, *PLAIN),
            make.result("bare whole", [40, 40], *REAL, *PLAIN),
        ]
    )
    (one,) = found
    assert (one.row, one.ior.value) == ("cim", 2)
    assert one.ars is not None
    assert one.ars.value == score(one.ior, Difference(1, None)).value


def test_its_rows_of_random_real_images_are_whole(compose: Compose) -> None:
    config = compose("evaluate", "method=cim", "compare=dd_ranking")
    for name in ("random_real", "random_real_no_augmentation"):
        row = with_overrides(config, config.compare[name])
        assert (row.method.factor, row.label.factor) == (1, 1)


@pytest.mark.parametrize(
    ("missing", "kept"),
    [("full_data", "ars"), ("classes", "ars"), ("bare", "lrs"), ("bare someone", "lrs"), ("someone", None)],
)
def test_a_score_needs_its_rows(missing: str, kept: str | None, results: list[Result]) -> None:
    found = rank([result for result in results if result.row != missing])
    assert [one.row for one in found] == (["cvdd"] if kept else [])
    for one in found:
        assert [name for name in ("lrs", "ars") if getattr(one, name) is not None] == [kept]


def test_another_evaluation_is_no_baseline(results: list[Result], tmp_path: Path) -> None:
    others = [result for result in results if result.row != "someone"]
    for changed in (
        "protocol.temperature=4",
        "label.crop_scale=[0.2,1.0]",
        "ipc.images_per_class=3",
        "seed=5",
        "~committee.members.shufflenetv2",
        "dataset.test_per_class=9",
    ):
        assert rank([*others, Made(tmp_path).result("someone", [49, 50], *REAL, changed)]) == []
    same = Made(tmp_path).result("someone", [49, 50], *REAL, "protocol.eval_batch=7", "label.store=none")
    assert len(rank([*others, same])) == 1


def test_students_are_held_against_themselves(tmp_path: Path, results: list[Result]) -> None:
    """Another student's rows, which come first and are worse or better, change no score of the one."""
    make = Made(tmp_path / "other")
    others = [
        make.result("cvdd", [70, 72]),
        make.result("someone", [30, 31], *REAL),
        make.result("classes", [11, 12], *HARD, images="cvdd"),
        make.result("bare", [60, 66], *PLAIN, images="cvdd"),
        make.result("bare someone", [20, 25], *REAL, *PLAIN),
        make.result("full_data", [95, 99]),
    ]
    large = [replace(result, student="large") for result in others]
    assert [one for one in rank([*large, *results]) if one.student == "small"] == rank(results)
    assert [one for one in rank([*results, *large]) if one.student == "large"] == rank(large)
    assert rank(large) != rank(results)


def test_one_seed_has_no_error(tmp_path: Path, results: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    others = [result for result in results if result.row != "full_data"]
    (found,) = rank([*others, Made(tmp_path).result("full_data", [91])])
    assert found.lrs is not None
    assert found.lrs.error is None
    print_ranking([found.summary()])
    shown = capsys.readouterr().out
    assert "71.0 " in shown
    assert f"{found.lrs.value:.3f} " in shown


def test_a_command_has_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = (*TINY, "compare=dd_ranking", "protocol.full_data=true", "protocol.seeds=[0,1]")
    run(configure(tmp_path, *typed), Invocation(typed))
    summary = json.loads((tmp_path / "output" / "metrics.json").read_text())
    top1 = {result["row"]: result["top1"] for result in summary["results"]}
    (found,) = summary["ranking"]
    assert found["hlr"]["value"] == pytest.approx(top1["full_data"] - top1["hard_labels"])
    assert found["ior"]["value"] == pytest.approx(top1["cvdd"] - top1["random_real"])
    bare = top1["no_augmentation"] - top1["random_real_no_augmentation"]
    assert found["ars"]["value"] == pytest.approx(
        score(Difference(found["ior"]["value"], 0), Difference(bare, 0)).value
    )
    assert "DD-Ranking" in capsys.readouterr().out
    page = (tmp_path / "output" / "report.html").read_text()
    assert f"{found['lrs']['value']:.3f} \u00b1 {found['lrs']['error']:.3f}" in page


def test_what_a_method_made_with_its_images_is_no_class(tmp_path: Path, results: list[Result]) -> None:
    others = [result for result in results if result.row != "classes"]
    own = ("method=apm_tiny", "label=hard", "protocol=method", "method.iterations=4", "method.log_every=1")
    (found,) = rank([*others, Made(tmp_path).result("classes", [21, 19], *own, images="cvdd")])
    assert found.lrs is None


PAIRS = [
    ("cvdd", "tiny", "tiny"),
    ("cvdd", "committee", "paper"),
    ("edc", "edc", "edc"),
    ("gvbsm", "gvbsm", "gvbsm"),
    ("lpld", "lpld", "lpld"),
    ("rded", "rded_stitched", "rd3"),
    ("fadrm_plus", "fadrm_plus", "paper"),
    ("sre2l", "sre2l", "sre2l"),
    ("best", "best", "best"),
    ("random_real", "resnet18", "long"),
]
MORE = ("label.top=3", "label.dropout=true", "label.mix_alpha=0.8", "protocol.temperature=4")


@pytest.mark.parametrize(("method", "label", "protocol"), PAIRS)
def test_rows_go_with_every_method(method: str, label: str, protocol: str, compose: Compose) -> None:
    more = MORE if (label, protocol) == ("tiny", "tiny") else ()
    config = compose(
        "evaluate", f"method={method}", f"label={label}", f"protocol={protocol}", "compare=dd_ranking", *more
    )
    assert list(config.compare) == ["random_real", "hard_labels", "no_augmentation", "random_real_no_augmentation"]
    for row in ("no_augmentation", "random_real_no_augmentation"):
        shown = with_overrides(config, {**config.compare[row], "compare": {}}).label.model_dump(mode="json")
        assert {name: shown[name] for name in _PLAIN} == _PLAIN
    assert with_overrides(config, {**config.compare["hard_labels"], "compare": {}}).label.hard
