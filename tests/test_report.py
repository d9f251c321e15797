"""The page of a run, its headline and the terminal's table, from small made-up artefacts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose, compose_raw
from PIL import Image
from report_helpers import CLASSES, HOSTILE, Maker, Page, pair
from rich.console import Console

from cvdd.artifact import Artifact, Store
from cvdd.chain.compare import FULL_DATA_ROW
from cvdd.chain.context import Context
from cvdd.chain.unit_files import write_unit
from cvdd.composition.validation import check
from cvdd.data import Data, TensorSource
from cvdd.report.gallery import data_uri, make_gallery, read_images
from cvdd.report.headline import headline, other_students, reference
from cvdd.report.page import portable_yaml
from cvdd.report.tables import print_results
from cvdd.report.terms import member_terms
from cvdd.report.votes import vote_table, who_judges
from cvdd.support import console
from cvdd.support.readable import readable_seconds, significant
from cvdd.synthesis.units import Unit

OVERRIDES = (
    "committee.size=2",
    "method.iterations=100",
    "method.r_bn=0.01",
    "ipc=1",
    "ipc.images_per_class=2",
    "label.batch_size=6",
)


@pytest.fixture
def maker(compose: Compose, tmp_path: Path) -> Maker:
    return Maker(compose("evaluate", *OVERRIDES), Store(tmp_path / "store"))


# --- the headline -----------------------------------------------------------------------------------------------------


def test_headline_when_ahead(maker: Maker) -> None:
    sentence = headline(pair(maker, [78.0, 79.0, 80.0], [70.0, 71.0, 72.0]))
    assert sentence.startswith(
        "cvdd 79.0 \u00b1 0.6 against 71.0 \u00b1 0.6 for random real images with the same labels"
    )
    assert "n = 3" in sentence
    assert "cvdd is ahead by 8.0 \u00b1 0.8." in sentence


def test_headline_when_behind(maker: Maker) -> None:
    sentence = headline(pair(maker, [60.0, 61.0, 62.0], [70.0, 71.0, 72.0]))
    assert "cvdd is behind by 10.0 \u00b1 0.8." in sentence
    assert "ahead" not in sentence


@pytest.mark.parametrize("theirs", [[70.0, 72.0, 74.0], [72.0, 74.0, 76.0]])
def test_headline_when_level(maker: Maker, theirs: Sequence[float]) -> None:
    sentence = headline(pair(maker, [71.0, 73.0, 75.0], theirs))
    assert "may be chance (Welch's test, 95 %)" in sentence
    assert "ahead" not in sentence
    assert "behind" not in sentence


def test_headline_of_one_seed_claims_nothing(maker: Maker) -> None:
    sentence = headline(pair(maker, [90.0], [50.0]))
    assert "One seed has no spread" in sentence
    assert "ahead" not in sentence


def test_headline_without_another_row(maker: Maker) -> None:
    assert "no other row" in headline(pair(maker, [90.0], [50.0])[:1])


def test_real_images_are_the_baseline_wherever_they_stand(maker: Maker) -> None:
    main, patches = maker.distilled("cvdd", "patches", 100), maker.distilled("patches", "patches", 0)
    real = maker.distilled("any_name", "real", 0)
    results = [maker.result(made, [70.0, 71.0, 72.0]) for made in (main, patches, real)]
    assert "random real images" in headline(results)
    assert "patches of real images, not optimised" in headline(results[:2])


def test_headline_tells_other_labels(maker: Maker) -> None:
    ours, theirs = pair(maker, [70.0, 71.0, 72.0], [60.0, 61.0, 62.0])
    assert theirs.labels is not None
    theirs.labels.identity["weights"] = [0.5, 0.5]
    assert "other weights of its teachers" in headline([ours, theirs])
    theirs.labels.identity["label"] = {"epochs": 5}
    assert "another label recipe" in headline([ours, theirs])


def test_several_students_and_real_data_have_sentences(maker: Maker) -> None:
    main, real = maker.distilled("cvdd", "patches", 100), maker.distilled("random_real", "real", 0)
    results = [
        maker.result(main, [70.0, 71.0, 72.0], "one"),
        maker.result(main, [70.0, 71.0, 72.0], "two"),
        maker.result(real, [60.0, 61.0, 62.0], "one"),
        maker.result(real, [80.0, 81.0, 82.0], "two"),
        maker.result(None, [95.0, 96.0, 97.0], "one"),
    ]
    assert other_students(results) == "Over 2 students, cvdd is ahead for 1, behind for 1."
    assert other_students(results[::2]) is None
    assert reference(results) == "Trained on all real data, one reaches 96.0 \u00b1 0.6; n = 3."
    assert reference(results[:-1]) is None


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    directory = tmp_path_factory.mktemp("page")
    maker = Maker(check(compose_raw(directory, "evaluate", *OVERRIDES)), Store(directory / "store"))
    main, real = maker.distilled("cvdd", "patches", 100), maker.distilled("random_real", "real", 0)
    results = [
        maker.result(main, [70.1, 71.2, 72.3], "one"),
        maker.result(main, [60.1, 61.2, 62.3], "two$"),
        maker.result(real, [65.1, 66.2, 67.3], "one"),
        maker.result(real, [55.1, 56.2, 57.3], "two$"),
        maker.result(None, [95.1, 95.2, 95.3], "one"),
        maker.result(None, [94.1, 94.2, 94.3], "two$"),
    ]
    return maker.page([main, real], results)


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    assert [value for value in page.loaded() if not value.startswith(("data:image/", "#"))] == []
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for sign in ("http:", "https:", "//", "@import"):
        assert sign not in page.source.replace("</", "")
    assert "url(" not in page.source.replace("url(#", "")


def test_all_rows_and_values_are_there(page: Page) -> None:
    for shown in (
        "71.2 \u00b1 0.6",
        "61.2 \u00b1 0.6",
        "66.2 \u00b1 0.6",
        "56.2 \u00b1 0.6",
        "95.2 \u00b1 0.1",
        "94.2 \u00b1 0.1",
    ):
        assert shown in page.text
    for shown in ("cvdd", "random_real", FULL_DATA_ROW, "72.2", "99.0", "0.500", "1.2 kB", "two$"):
        assert shown in page.text
    assert "cvdd is ahead by 5.0" in page.text
    assert "Best epoch, chosen on the measured images" in page.text
    assert "python evaluate.py seed=0" in page.text
    assert "abcdef012345" in page.text


def test_names_of_classes_are_text(page: Page) -> None:
    assert "<script" not in page.source
    assert HOSTILE in page.text
    assert f"{HOSTILE}, slot 0" in [attributes.get("alt") for tag, attributes in page.tags if tag == "img"]


def test_images_stand_beside_their_start(page: Page) -> None:
    images = page.images()
    assert len(images) == 2 * len(CLASSES) * 2
    assert all(uri.startswith("data:image/png;base64,") for uri in images)
    first = Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1])))
    assert first.size == (8, 8)
    assert first.getpixel((0, 0)) == (0, 0, 0)


def test_identifiers_are_unique_and_all_references_have_one(page: Page) -> None:
    identifiers = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for value in page.loaded() if value.startswith("#")} <= set(identifiers)


def test_plots_take_their_colours_from_the_page(page: Page) -> None:
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "var(--series-0)" in page.source
    assert "#0100" not in page.source
    assert "#0200" not in page.source


def test_the_members_that_dominate_can_be_seen(page: Page) -> None:
    assert "Members' terms" in page.text
    rows = [" ".join(line.split()) for line in page.text.splitlines()]
    # BatchNorm terms 0.01 * 150 against 0.01 * 50, cross-entropies equal, votes equal.
    assert any(row.startswith("resnet50 2 0.0100 1.50 50 % 75 %") for row in rows), rows


def test_every_stage_has_a_cost(page: Page) -> None:
    costs = page.text[page.text.index("Time is that of making") - 1500 :]
    for stage in ("members", "patches", "images", "labels", "students"):
        assert stage in costs


def test_the_configuration_has_no_directory_of_this_machine(
    maker: Maker, page: Page, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert str(tmp_path_factory.getbasetemp()) not in page.source
    data = maker.config.dataset.model_copy(update={"root": str(maker.config.paths.data / "raw")})
    text = portable_yaml(maker.config.model_copy(update={"dataset": data}))
    assert "<paths.data>/raw" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("values", [[50.0], [50.0, 52.0]])
def test_without_optimisation_without_stored_labels_without_rows(
    compose: Compose, tmp_path: Path, values: Sequence[float]
) -> None:
    overrides = ["method=random_real", "label.store=none", "compare=none", "label.batch_size=6"]
    maker = Maker(compose("evaluate", *overrides), Store(tmp_path / "store"))
    main = maker.distilled("random_real", "real", 0, stored=False)
    page = maker.page([main], [maker.result(main, values)])
    assert "not stored" in page.text
    assert "Members' terms" not in page.text
    assert "no other row" in page.text
    assert len(page.images()) == len(CLASSES) * 2
    assert (" \u00b1 1.0" in page.text) == (len(values) == 2)


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["method=random_real", "label.store=none"], "not stored"),
        (["method=random_real", "label=hard", "protocol=hard_tiny"], "hard"),
        (["method=apm_tiny", "label=hard", "protocol=method"], "with images"),
        (["method=mtt_tiny", "label=hard", "protocol=method"], "hard"),
        (
            ["method=mtt_tiny", "method.mtt.labels=learned", "method.mtt.lr_labels=1", "label=hard", "protocol=method"],
            "with images",
        ),
    ],
)
def test_why_a_row_has_no_bytes_of_labels(
    compose: Compose, tmp_path: Path, overrides: Sequence[str], shown: str
) -> None:
    maker = Maker(compose("evaluate", *overrides, "compare=none"), Store(tmp_path / "store"))
    main = maker.distilled("main", "real", 0, stored=False)
    assert f"<td>{shown}</td>" in maker.page([main], [maker.result(main, [50.0])]).source


def test_many_large_classes_fit_a_page(compose: Compose, tmp_path: Path) -> None:
    overrides = ["committee.size=2", "method.iterations=100", "label.batch_size=6"]
    classes = [f"class {index}" for index in range(1000)]
    maker = Maker(compose("evaluate", *overrides), Store(tmp_path / "store"), classes, 8)
    main = maker.distilled("cvdd", "patches", 100, ipc=11)
    page = maker.page([main], [maker.result(main, [1.0, 2.0])])
    assert "20 of 1000 classes, evenly spread; 10 of 11 slots" in page.text
    assert len(page.images()) == 2 * 20 * 10
    assert len(page.source) < 2_000_000


def test_images_are_found_wherever_their_unit_is(maker: Maker) -> None:
    images = maker.images("blocks", "noise", 100, ipc=3, per_unit=2)
    found = read_images(images, [0, 2], 2)
    assert found.shape == (2, 2, 3, 8, 8)
    assert found[:, :, 0, 0, 0].tolist() == [[0, 1], [20, 21]]


def test_noise_has_no_start_to_show(maker: Maker) -> None:
    gallery = make_gallery(maker.distilled("cvdd", "noise", 100))
    assert gallery.start_title is None
    assert all(row.start == () for row in gallery.rows)


def test_real_images_are_shown_as_the_start(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(3).repeat(4)
    source = TensorSource(torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8), labels)
    data = Data(source, source, CLASSES, (0.5,) * 3, (0.5,) * 3, 8, "made up", {})
    monkeypatch.setattr(Context, "data", lambda self: data)
    gallery = make_gallery(maker.distilled("cvdd", "real", 100))
    assert gallery.start_title == "real images they started from"
    assert len({uri for row in gallery.rows for uri in row.start}) == len(CLASSES) * 2


def test_large_images_are_reduced() -> None:
    image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    uri = data_uri(image)
    assert uri.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (96, 96)


# --- its parts --------------------------------------------------------------------------------------------------------


def test_terms_are_means_over_the_units_in_which_a_member_votes(maker: Maker) -> None:
    def unit(weights: Mapping[str, float], ce: float, bn: float) -> dict[str, Any]:
        names = list(weights)
        row = {"iteration": 25, "ce": dict.fromkeys(names, ce), "bn": dict.fromkeys(names, bn)}
        return {"weights": dict(weights), "rows": [row]}

    history = {"a": unit({"resnet18": 0.25, "resnet50": 0.75}, 1.0, 100.0), "b": unit({"resnet18": 1.0}, 3.0, 300.0)}
    terms = member_terms(history, maker.config)
    assert list(terms) == ["resnet18", "resnet50"]
    assert terms["resnet18"].curves == {"ce": (2.0,), "bn": (pytest.approx(2.0),)}
    assert terms["resnet18"].late == {"ce": 2.0, "bn": pytest.approx(2.0)}
    assert terms["resnet18"].units == 2
    assert terms["resnet50"].share == pytest.approx(0.75)
    assert terms["resnet50"].vote == pytest.approx(0.75)


def test_votes_are_arranged_by_slot() -> None:
    votes = [
        {"unit": "slot0000_block0000", "a": 0.25, "b": 0.75},
        {"unit": "slot0000_block0001", "a": 0.25, "b": 0.75},
        {"unit": "slot0001_block0000", "b": 1.0},
    ]
    table = vote_table(votes, ["a", "b"])
    assert table is not None
    assert table.rows == {"a": (0.25, None), "b": (0.75, 1.0)}
    assert vote_table([{"unit": "slot0000_block0000"}], ["a"]) is None
    long = vote_table([{"unit": f"slot{slot:04d}_block0000", "a": 1.0} for slot in range(60)], ["a"])
    assert long is not None
    assert (len(long.slots), long.total, long.numbered) == (50, 60, False)


def test_the_terminal_table_fits_80_columns(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "new_console", lambda: Console(file=stream, width=80))
    results = [result.summary() for result in pair(maker, [70.0, 71.0, 72.0], [60.0, 61.0, 62.0])]
    results.append(results[0] | {"student": "tiny_shufflenetv2", "protocol": "another"})
    print_results(results)
    text = stream.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\u2026" not in text
    for shown in ("random_real", "tiny_shufflenetv2", "another", "71.0 +- 0.6", "72.0", "1.2 kB"):
        assert shown in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.001, "< 0.01 s"),
        (0.25, "0.25 s"),
        (3.14, "3.1 s"),
        (59.6, "60 s"),
        (600, "10 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations_are_readable(seconds: float | None, shown: str) -> None:
    assert readable_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(2, "2.00"), (66.04, "66.0"), (215.4, "215"), (0.8254, "0.825"), (0, "0.00"), (12345.0, "1.23e+04")],
)
def test_numbers_of_one_column_have_as_many_digits(number: float, shown: str) -> None:
    assert significant(number) == shown


def test_images_of_a_unit_that_has_several_of_a_class(tmp_path: Path) -> None:
    """EDC and G-VBSM optimise all images of a class together; image i of a class is shown as that of slot i."""
    (tmp_path / "units").mkdir()
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 2, 2)
    write_unit(tmp_path / "units", Unit(0, 0, 0, 2, 3), pixels, [], {})
    artifact = Artifact(tmp_path, {})
    targets = Unit(0, 0, 0, 2, 3).targets
    for slots in (1, 2, 3):
        shown = read_images(artifact, [1, 0], slots)
        for row, label in zip(shown, (1, 0), strict=True):
            assert torch.equal(row[:, 0, 0, 0], pixels[targets == label][:slots, 0, 0, 0])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("temperature.vote=2.5",), "2 of 5 members vote on a slot, T = 2.5"),
        (("committee.voter=equal",), "2 of 5 members vote on a slot, with equal weights"),
        (("committee.size=1",), "one member judges a slot alone"),
        (("method=sre2l_pp",), "resnet18 judges every slot alone"),
        (("method=fadrm_plus",), "4 of 5 members judge a slot, one an iteration, in turn"),
        (("method=gvbsm",), "all members judge a slot, one an iteration, in turn"),
        (
            ("method=sampled_residual", "temperature=5"),
            "all members vote on a slot, one an iteration, drawn by its weight, T = 5",
        ),
        (("method=random_real",), None),
        (("method=apm_tiny", "label=hard", "protocol=method", "students=convnet3_instance"), None),
    ],
)
def test_a_page_says_who_judges(overrides: tuple[str, ...], said: str | None, compose: Compose) -> None:
    assert who_judges(compose("evaluate", *overrides)) == said
