"""What a comparison says of its numbers, and what it does not say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from report_helpers import Maker, pair
from scipy.stats import ttest_ind

from cvdd.artifact import Store
from cvdd.report.headline import difference, headline
from cvdd.schema import RunConfig, with_overrides


def maker_of(config: RunConfig, root: Path) -> Maker:
    return Maker(config, Store(root / "store"))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([78.0, 79.0, 80.0], [70.0, 71.0, 72.0]),
        ([78.0, 79.0, 80.0], [76.0, 76.5, 77.0]),
        ([78.0, 79.5, 80.0], [76.0, 76.5, 78.0]),
        ([78.0, 79.0], [75.0, 76.0]),
        ([78.0, 79.0, 80.0, 79.0, 79.5], [71.0, 79.0]),
        ([70.0, 70.5], [78.0, 79.0, 80.0, 78.5]),
    ],
)
def test_a_difference_is_called_one_where_chance_is_unlikely(
    ours: list[float], theirs: list[float], compose: Compose, tmp_path: Path
) -> None:
    """Of few seeds, whose spread is hardly known, more is asked than two standard errors."""
    first, second = pair(maker_of(compose("evaluate"), tmp_path), ours, theirs)
    found, expected = difference(first, second), ttest_ind(ours, theirs, equal_var=False)
    assert found.freedom == pytest.approx(expected.df)
    assert found.verdict == ("level" if expected.pvalue > 0.05 else "ahead" if found.value > 0 else "behind")


@pytest.mark.parametrize(("theirs", "verdict"), [([71.0, 71.0], "level"), ([70.0, 70.0], "ahead")])
def test_seeds_without_any_spread(theirs: list[float], verdict: str, compose: Compose, tmp_path: Path) -> None:
    assert difference(*pair(maker_of(compose("evaluate"), tmp_path), [71.0, 71.0], theirs)).verdict == verdict


@pytest.mark.parametrize(("images", "said"), [("once", True), ("per_seed", False)])
def test_whether_the_choice_of_images_is_in_the_errors(
    images: str, said: bool, compose: Compose, tmp_path: Path
) -> None:
    results = pair(maker_of(compose("evaluate", f"protocol.images={images}"), tmp_path), [71.0, 73.0], [60.0, 61.0])
    assert ("All seeds saw the same images" in headline(results)) is said
    alone = [replace(result, students=result.students[:1], seeds=(0,)) for result in results]
    assert "All seeds saw the same images" not in headline(alone)


def test_another_number_of_images_is_said(compose: Compose, tmp_path: Path) -> None:
    maker = maker_of(compose("evaluate"), tmp_path)
    main, more = maker.distilled("cvdd", "patches", 100), maker.distilled("real50", "real", 0, ipc=7)
    sentence = headline([maker.result(main, [12.1]), maker.result(more, [17.9])])
    assert sentence.startswith(
        "cvdd (6 images) 12.1 against 17.9 for random real images (21 images) with the same labels"
    )


def test_labels_of_other_networks_are_not_the_same(compose: Compose, tmp_path: Path) -> None:
    maker = maker_of(compose("evaluate"), tmp_path)
    ours, theirs = pair(maker, [70.0, 71.0], [60.0, 61.0])

    def labelled_by(result: Any, member: str) -> Any:
        return replace(result, labels=replace(result.labels, parents=[result.images, maker.member(member)]))

    assert "the same labels" in headline([labelled_by(ours, "resnet18"), labelled_by(theirs, "resnet18")])
    sentence = headline([labelled_by(ours, "resnet18"), labelled_by(theirs, "resnet50")])
    assert "the same label recipe but other teachers" in sentence


def test_images_of_several_are_held_against_whole_ones(compose: Compose, tmp_path: Path) -> None:
    """The labels are the same, though parts are shown one by one; of two baselines the whole images count."""
    maker = maker_of(compose("evaluate"), tmp_path)
    main = maker.result(maker.distilled("cim", "real", 100, factor=2), [71.0, 71.5])
    four = maker.result(maker.distilled("four", "real", 0, factor=2), [50.0, 50.5])
    whole = maker.result(maker.distilled("whole", "real", 0), [60.0, 60.5])
    sentence = headline([main, four, whole])
    assert "against 60.2" in sentence
    assert "for random real images with the same labels" in sentence
    assert "for random real images, four in each with the same labels" in headline([main, four])


def test_whole_images_with_other_labels_come_after_parts_with_the_same(compose: Compose, tmp_path: Path) -> None:
    maker = maker_of(compose("evaluate"), tmp_path)
    main = maker.result(maker.distilled("cim", "real", 100, factor=2), [71.0, 71.5])
    four = maker.result(maker.distilled("four", "real", 0, factor=2), [60.0, 60.5])
    whole = maker.result(maker.distilled("whole", "real", 0), [20.0, 20.5])
    assert whole.labels is not None
    other = replace(whole, labels=replace(whole.labels, identity={"label": {"epochs": 9}}))
    assert "four in each with the same labels" in headline([main, other, four])


def test_whole_images_that_are_shown_in_parts_have_other_labels(compose: Compose, tmp_path: Path) -> None:
    maker = maker_of(compose("evaluate"), tmp_path)
    main, baseline = maker.distilled("one", "patches", 100), maker.distilled("other", "real", 0)
    parts = replace(baseline, labels=replace(baseline.labels, identity={"label": {"epochs": 4, "factor": 2}}))
    assert "another label recipe" in headline([maker.result(main, [60.0, 61.0]), maker.result(parts, [50.0, 51.0])])


def test_random_real_images_beside_any_method_are_whole(compose: Compose) -> None:
    config = compose("evaluate", "method=cim", "compare=random_real")
    assert (config.method.factor, config.label.factor) == (2, 2)
    row = with_overrides(config, config.compare["random_real"])
    assert (row.method.factor, row.label.factor, row.method.recovers) == (1, 1, False)
