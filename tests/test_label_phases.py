"""Few soft labels for many epochs: drawn in rounds, with epochs of the images' own classes between them (HALD)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import Compose
from helpers import label_config, random_pixels, tiny_context
from test_cost import total, works
from test_label_store import COUNT, SEED, SIZE, layout, written
from test_student import soft_labels, student, trainable

from cvdd.chain.compare import compare, distil
from cvdd.chain.preflight import check_before_work
from cvdd.chain.students import labels_of
from cvdd.chain.training import load_curve
from cvdd.chain.unit_files import load_images
from cvdd.cost.steps import ScoreStep, StudentStep
from cvdd.labels.batches import SoftLabelDataset
from cvdd.labels.phases import HardBetweenSoft
from cvdd.labels.pool import LabelPool
from cvdd.labels.replay import replay
from cvdd.labels.sources import HardLabels
from cvdd.labels.store import StoredLabels
from cvdd.schema import with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.training.losses import mixed_cross_entropy

# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [16, 20, 5])
def test_each_batch_comes_once_before_any_comes_again(count: int) -> None:
    """Of 16 images in batches of 8 all are full, of 20 the third has 4, and 5 are a single batch."""
    pool = LabelPool(count=count, batch_size=min(8, count), epochs=3, keep=1.0)
    for number in range(4):
        epochs = [pool.draw_in_rounds(SEED, number * 3 + within) for within in range(3)]
        assert Counter(batch for epoch in epochs for batch in epoch) == Counter(range(3 * pool.batches))
        for epoch in epochs:
            sizes = [stop - start for start, stop in map(pool.samples_of, epoch)]
            assert sizes == [stop - start for start, stop in map(pool.samples_of, range(pool.batches))]


def test_rounds_differ_and_mix_the_epochs() -> None:
    pool = LabelPool(count=80, batch_size=8, epochs=3, keep=1.0)
    first, second = ([pool.draw_in_rounds(SEED, 3 * number + e) for e in range(3)] for number in range(2))
    assert first != second
    assert first == [pool.draw_in_rounds(SEED, epoch) for epoch in range(3)]
    assert first != [pool.draw_in_rounds(SEED + 1, epoch) for epoch in range(3)]
    assert all(len({batch // pool.batches for batch in epoch}) > 1 for epoch in first)


@pytest.mark.parametrize("parameters", ["stored", "seed"])
def test_an_epoch_of_a_round_is_what_was_stored(parameters: str, tmp_path: Path) -> None:
    """Each batch with the views, mix partners and logits that it has in the epoch that it was labelled in."""
    recipe = {"parameters": parameters, "shuffle": 2, "randaugment": True}
    whole = written(tmp_path, **recipe)
    rounds = StoredLabels(tmp_path, layout(**recipe), label_config(**recipe), SIZE, SEED, in_rounds=True)
    pixels = random_pixels(COUNT, SIZE)
    mean, std = [0.5] * 3, [0.25] * 3
    for epoch in (0, 4, 11):
        plan, logits = rounds.epoch(epoch)
        assert len(plan) == len(logits) == rounds.count == COUNT
        shown = replay(pixels, plan, mean, std)
        for place, batch in enumerate(rounds.pool.draw_in_rounds(SEED, epoch)):
            own, start = divmod(batch, rounds.pool.batches)
            theirs, labels = whole.epoch(own)
            stop = min((start + 1) * 8, COUNT)
            here = slice(place * 8, place * 8 + stop - start * 8)
            assert torch.equal(logits[here], labels[start * 8 : stop])
            assert torch.equal(shown[here], replay(pixels, theirs.batch(start * 8, stop), mean, std))


# --- epochs of hard labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "hard", "expected"),
    [
        (6, 2, ["soft 0", "soft 1", "hard 0", "hard 1", "soft 2", "soft 3"]),
        (5, 2, ["soft 0", "hard 0", "hard 1", "soft 1", "soft 2"]),
        (3, 2, ["hard 0", "hard 1", "soft 0"]),
    ],
)
def test_hard_epochs_are_in_the_middle(epochs: int, hard: int, expected: list[str], tmp_path: Path) -> None:
    """As released: half of the soft epochs, rounded down, then the hard ones, then the rest."""
    soft = written(tmp_path, epochs=4)
    classes = HardLabels(label_config(epochs=4), COUNT, SIZE, SEED + 1)
    both = HardBetweenSoft(soft, classes, epochs, hard)
    assert (both.batch_size, both.count) == (8, COUNT)
    for epoch, name in enumerate(expected):
        kind, number = name.split()
        plan, logits = both.epoch(epoch)
        own, theirs = (soft if kind == "soft" else classes).epoch(int(number))
        assert torch.equal(logits, theirs)
        assert plan.record().tobytes() == own.record().tobytes()
        assert logits.shape[1] == (4 if kind == "soft" else 0)


@pytest.mark.parametrize(("share", "epochs", "hard"), [(0.5, 300, 150), (0.29, 100, 29), (0.5, 1, 0), (0.9, 5, 4)])
def test_a_share_is_of_whole_epochs(share: float, epochs: int, hard: int, compose: Compose) -> None:
    typed = f"protocol.hard_share={share}", f"protocol.epochs={epochs}", f"label.epochs={epochs - hard}"
    protocol = compose("evaluate", *typed).protocol
    assert (protocol.hard_epochs, protocol.soft_epochs) == (hard, epochs - hard)


def test_a_smoothed_label_gives_all_classes_their_share() -> None:
    """Of four classes 0.8 is spread: 0.4 for the own one and 0.2 for each other, before the mix."""
    logits, own, other = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 0, 2, 3, 2])
    share = torch.tensor([1.0, 0.5, 0.25, 0.9, 0.0, 0.7])
    mixed = share[:, None] * torch.eye(4)[own] + (1 - share)[:, None] * torch.eye(4)[other]
    target = 0.2 * mixed + 0.8 / 4
    expected = -(target * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
    assert mixed_cross_entropy(logits, own, other, share, 0.8).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_learns_classes_where_there_are_no_logits() -> None:
    """The loss of such a batch is that of loss=cross_entropy, smoothed, whatever the protocol's is."""
    item = SoftLabelDataset(HardLabels(label_config(batch_size=16), COUNT, SIZE, SEED))[0]
    network, images = trainable(), soft_labels(COUNT, 16)
    plain, smoothed, classes = (
        student(network, images, accumulation=1, **changes).training_step(item, 0).item()
        for changes in (
            {"hard_share": 0.5},
            {"hard_share": 0.5, "label_smoothing": 0.8},
            {"loss": "cross_entropy", "label_smoothing": 0.8},
        )
    )
    assert smoothed == pytest.approx(classes, rel=1e-6)
    assert plain != pytest.approx(smoothed, rel=1e-2)


# --- the chain --------------------------------------------------------------------------------------------------------

FEW_LABELS = (
    "label.epochs=2",
    "label.halves=false",
    "protocol.epochs=8",
    "protocol.hard_share=0.5",
    "protocol.repeat_labels=true",
    "protocol.label_smoothing=0.8",
)


def test_a_few_labels_teach_many_epochs(tmp_path: Path) -> None:
    """Labels are stored for their own epochs alone; students of the same labels differ by how they go through them."""
    context = tiny_context(tmp_path, *FEW_LABELS)
    distilled, results = compare(context)
    labels = distilled[0].labels.artifact
    assert labels is not None
    assert labels.manifest["identity"]["label"]["epochs"] == 2
    assert [row["epoch"] for row in load_curve(results[0].students[0])][-1] == 8
    plain, of_plain = compare(context.differing({"protocol.hard_share": 0.0, "protocol.label_smoothing": 0.0}, ""))
    assert plain[0].labels.artifact is not None
    assert plain[0].labels.artifact.path == labels.path
    assert of_plain[0].students[0].path != results[0].students[0].path


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("protocol.label_smoothing=0.1", "set protocol.label_smoothing=0.0, or a protocol.hard_share"),
        ("label=hard protocol=hard protocol.hard_share=0.5", "set protocol.hard_share=0.0"),
        ("label=hard protocol=hard protocol.repeat_labels=true", "set protocol.repeat_labels=false"),
        ("protocol.epochs=5 protocol.hard_share=0.1 label.epochs=5", "set protocol.hard_share to at least 0.2"),
        ("label.store=none protocol.repeat_labels=true", "set label.store=logits"),
        ("label.keep=0.5 protocol.repeat_labels=true", "label.keep=1"),
        ("protocol.epochs=10 protocol.hard_share=0.5", "set label.epochs=5"),
        (
            "protocol.epochs=10 protocol.hard_share=0.5 label.epochs=4",
            "without the 5 of protocol.hard_share needs labels of as many epochs, and label.epochs is 4; set "
            "label.epochs=5 or protocol.epochs=8",
        ),
    ],
)
def test_what_cannot_be_is_refused(typed: str, said: str, compose: Compose) -> None:
    with pytest.raises(ConfigError) as refused:
        compose("evaluate", *typed.split())
    assert said in str(refused.value)


SMOKE_OF_FEW = ("debug=smoke", "label.epochs=2", "protocol.epochs=4", "compare=dd_ranking")


@pytest.mark.parametrize("more", [(), ("debug=smoke",), ("compare=dd_ranking",), SMOKE_OF_FEW])
def test_the_published_recipe_goes_with_the_rest(more: tuple[str, ...], compose: Compose) -> None:
    config = compose("evaluate", "label=hald", "protocol=hald", *more)
    assert (config.label.epochs, config.label.batch_size, config.label.halves) == (
        2 if more == SMOKE_OF_FEW else 10,
        16,
        False,
    )
    if not more:
        assert (config.protocol.hard_epochs, config.protocol.soft_epochs) == (150, 150)


def test_a_pool_is_seen_whole_whatever_is_between(compose: Compose) -> None:
    """Its batches are drawn in every epoch of soft labels, however few these are."""
    config = compose("evaluate", "label.keep=0.5", "protocol.hard_share=0.5")
    assert config.label.epochs == config.protocol.epochs == 2 * config.protocol.soft_epochs


def test_rows_of_classes_learn_nothing_else(compose: Compose) -> None:
    """What DD-Ranking's scores call hard labels is the same beside any labels."""
    found = []
    for chosen in (("label=hald", "protocol=hald"), ("label=lpqld", "protocol=lpqld"), ("protocol=paper",)):
        config = compose("evaluate", *chosen, "compare=dd_ranking", "protocol.eta=1", "protocol.accumulation=1")
        row = with_overrides(config, {**config.compare["hard_labels"], "compare": {}})
        batches = {"batch_size", "crop_scale", "stack", "weights"}
        found.append((row.protocol, row.label.model_dump(exclude=batches)))
    assert found[0] == found[1] == found[2]


def test_each_seed_sees_other_hard_epochs(tmp_path: Path) -> None:
    """Soft labels are shared by all students; what is drawn beside them is not."""
    context = tiny_context(tmp_path, *FEW_LABELS)
    labels = distil(context, "").labels
    pixels = load_images(labels.images)[0]
    first, second, again = (labels_of(labels, context.config.protocol, pixels, seed) for seed in (0, 1, 0))
    for epoch in range(8):
        plans = [one.epoch(epoch)[0].record().tobytes() for one in (first, second, again)]
        assert plans[0] == plans[2]
        assert (plans[0] == plans[1]) == (epoch not in range(2, 6))


def test_whole_epochs_are_not_kept(tmp_path: Path) -> None:
    """Only who draws batches of any epoch needs them all."""
    for changes, kept in (({}, 1), ({"keep": 0.7}, 3)):
        (tmp_path / str(kept)).mkdir()
        stored = written(tmp_path / str(kept), parameters="seed", **changes)
        for epoch in range(3):
            stored.epoch(epoch)
        assert len(stored._drawn_again) <= kept


def test_epochs_of_hard_labels_are_not_scored(compose: Compose) -> None:
    """Half of 200 epochs; an epoch of a pool shows batches of 16 in the place of the last four images."""
    halved = ("compare=none", "protocol.hard_share=0.5", "label.epochs=100", "protocol.seeds=[0]")
    fresh = works(compose("evaluate", *halved, "label.store=none"))
    assert total(fresh, "students", ScoreStep) == 5 * 100 * 100
    assert total(fresh, "students", StudentStep) == 200 * 10
    pool = works(compose("evaluate", *halved, "label.epochs=200", "label.keep=0.5", "label.batch_size=16"))
    assert total(pool, "students", StudentStep) == pytest.approx(100 * 7 + 100 * 100 / 16)


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ((), True),
        (("protocol.temperature_squared=true",), False),
        (("protocol.optimizer=muon",), False),
        (("protocol.hard_share=0.0", "protocol.label_smoothing=0.0"), False),
        # Ten epochs of three batches, and a memory of one step.
        (("protocol.betas=[0.0,0.1]", "protocol.epochs=40"), False),
    ],
)
def test_students_that_hard_epochs_would_still_are_named(
    more: tuple[str, ...], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of 4 soft epochs of 3 batches are 6 steps, and AdamW remembers a thousand."""
    check_before_work(tiny_context(tmp_path, *FEW_LABELS, *more))
    said = [record.getMessage() for record in caplog.records if record.name == "cvdd.chain.preflight"]
    assert bool(said) == warned
    if warned:
        assert "remembers the gradients of 1000 steps" in said[0]
        assert "in the 6 steps after them" in said[0]
        assert said[0].endswith("Type protocol.temperature_squared=true")
