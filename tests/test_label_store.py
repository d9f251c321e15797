"""The store of labels gives back the same bits, whole or pruned; batches of it reach a student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import MEAN, STD, label_config, random_pixels, small_network
from torch.utils.data import DataLoader

import cvdd.labels.store
from cvdd.labels.batches import EpochSampler, SoftLabelDataset
from cvdd.labels.pool import LabelPool
from cvdd.labels.replay import RECORD, replay
from cvdd.labels.sources import ComputedLabels
from cvdd.labels.store import LOGITS, PARAMETERS, LabelLayout, StoredLabels, write_labels
from cvdd.labels.teachers import Teachers
from cvdd.support.config_base import ConfigError

COUNT, SIZE, CLASSES, SEED = 20, 16, 4, 3


def computed(**changes: object) -> ComputedLabels:
    label = label_config(**changes)
    teachers = Teachers([small_network(seed=1), small_network(seed=2)], [0.25, 0.75], label)
    return ComputedLabels(teachers, random_pixels(COUNT, SIZE), label, SEED, MEAN, STD)


# --- the store --------------------------------------------------------------------------------------------------------


def layout(**changes: object) -> LabelLayout:
    return LabelLayout.of(label_config(**changes), COUNT, CLASSES)


def written(folder: Path, **changes: object) -> StoredLabels:
    labels, form = computed(**changes), layout(**changes)
    folder.mkdir(exist_ok=True)
    write_labels(folder, labels, form, lambda steps: None)
    return StoredLabels(folder, form, labels.label, SIZE, SEED)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parameters", ["stored", "seed"])
@pytest.mark.parametrize("more", [{}, {"shuffle": 2, "randaugment": True}, {"top": 1}])
def test_stored_labels_are_the_computed_ones_bit_for_bit(
    more: dict, parameters: str, dtype: str, tmp_path: Path
) -> None:
    stored, fresh = written(tmp_path, parameters=parameters, dtype=dtype, **more), computed(dtype=dtype, **more)
    for epoch in (2, 0, 1):
        plan, logits = stored.epoch(epoch)
        expected_plan, expected = fresh.epoch(epoch)
        assert logits.dtype == getattr(torch, dtype)
        assert torch.equal(logits, expected)
        assert plan.record().tobytes() == expected_plan.record().tobytes()
    assert (stored.batch_size, stored.count, stored.epochs) == (8, COUNT, 3)


def test_sizes_are_known_before_writing(tmp_path: Path) -> None:
    written(tmp_path)
    assert layout().logits_bytes == 3 * COUNT * CLASSES * 2 == (tmp_path / LOGITS).stat().st_size
    assert layout().parameters_bytes == 3 * COUNT * RECORD.itemsize == (tmp_path / PARAMETERS).stat().st_size
    assert RECORD.itemsize == 4 + 8 + 1 + 4 + 8 + 4
    assert layout(parameters="seed").parameters_bytes == 0
    both = layout(shuffle=2, randaugment=True)
    assert both.parameters_bytes == 3 * COUNT * (RECORD.itemsize + 2 + 2)


def test_seeded_parameters_take_no_file(tmp_path: Path) -> None:
    written(tmp_path, parameters="seed")
    # What ends in tmp is progress, and does not become part of the artefact.
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"] == [LOGITS]


@pytest.mark.parametrize("name", [LOGITS, PARAMETERS])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_store_of_another_size_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    stored = written(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"{name} has \d+ bytes instead of \d+"):
        StoredLabels(tmp_path, layout(), stored.label, SIZE, SEED)


class Interrupted(Exception):
    pass


def test_writing_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvdd.labels.store, "SECONDS_BETWEEN_SAVES", -1.0)
    written(tmp_path / "whole")
    broken, done = tmp_path / "broken", []
    broken.mkdir()

    def stop(steps: int) -> None:
        if len(done) == 2:
            raise Interrupted
        done.append(steps)

    with pytest.raises(Interrupted):
        write_labels(broken, computed(), layout(), stop)
    again = computed()
    scored: list[int] = []
    original = again.epoch
    again.epoch = lambda epoch: (scored.append(epoch), original(epoch))[1]
    write_labels(broken, again, layout(), lambda steps: None)
    # The second epoch was written but not noted when the first call stopped.
    assert scored == [1, 2]
    for name in (LOGITS, PARAMETERS):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- a pruned store ---------------------------------------------------------------------------------------------------


def test_numbers_of_a_pool() -> None:
    """20 images make batches of 8, 8 and 4; half of 9 batches is 4: one epoch and a batch of the next."""
    pool = LabelPool(count=20, batch_size=8, epochs=3, keep=0.5)
    assert (pool.batches, pool.stored, pool.labelled_epochs) == (3, 4, 2)
    assert [pool.kept(epoch) for epoch in range(2)] == [20, 8]
    assert (pool.samples, pool.shown) == (28, 24)
    assert [pool.samples_of(batch) for batch in range(4)] == [(0, 8), (8, 16), (16, 20), (20, 28)]


def test_a_whole_pool_is_the_store() -> None:
    pool = LabelPool(count=20, batch_size=8, epochs=3, keep=1.0)
    assert (pool.stored, pool.labelled_epochs, pool.samples, pool.shown) == (9, 3, 60, 20)


@pytest.mark.parametrize(("keep", "stored"), [(0.29, 29), (0.295, 29), (0.1, 10), (0.999, 99)])
def test_the_part_of_a_batch_is_not_stored(keep: float, stored: int) -> None:
    assert LabelPool(count=10, batch_size=10, epochs=100, keep=keep).stored == stored


def test_draws_from_a_pool_are_uniform_and_replace_the_short_batch() -> None:
    pool = LabelPool(count=20, batch_size=8, epochs=20, keep=0.5)
    drawn = torch.tensor([batch for epoch in range(1000) for batch in pool.draw(SEED, epoch)])
    assert len(drawn) == 3000
    counts = torch.bincount(drawn, minlength=30)
    assert len(counts) == 30
    assert not counts[2::3].any()
    # The second batch of an epoch stands for the short third one too: about 100 and 200 draws of 3000.
    assert bool((counts[0::3] - 100).abs().max() < 45)
    assert bool((counts[1::3] - 200).abs().max() < 60)
    assert pool.draw(SEED, 7) == pool.draw(SEED, 7) != pool.draw(SEED, 8)
    full = LabelPool(count=16, batch_size=8, epochs=20, keep=0.5)
    assert {batch for epoch in range(300) for batch in full.draw(SEED, epoch)} == set(range(20))


def test_a_batch_larger_than_the_set_is_the_set() -> None:
    pool = LabelPool.of(label_config(batch_size=64, keep=0.5, epochs=8), COUNT)
    assert (pool.batch_size, pool.batches, pool.stored, pool.shown) == (20, 1, 4, 20)
    assert set(pool.draw(SEED, 0)) <= {0, 1, 2, 3}


def test_half_a_pool_computes_and_stores_half(tmp_path: Path) -> None:
    """4 of 9 batches; only their samples pass through the teachers."""
    labels, form = computed(keep=0.5), layout(keep=0.5)
    scored: list[int] = []
    original = labels.teachers.score
    labels.teachers.score = lambda samples, size: (scored.append(len(samples)), original(samples, size))[1]
    write_labels(tmp_path, labels, form, lambda steps: None)
    assert sum(scored) == 28
    assert (tmp_path / LOGITS).stat().st_size == form.logits_bytes == 28 * CLASSES * 2
    assert (tmp_path / PARAMETERS).stat().st_size == form.parameters_bytes == 28 * RECORD.itemsize


@pytest.mark.parametrize("parameters", ["stored", "seed"])
def test_every_batch_of_an_epoch_is_a_stored_one(parameters: str, tmp_path: Path) -> None:
    """With its images, views, mixes and logits, whatever place it has in the epoch."""
    stored, whole = written(tmp_path, keep=0.5, parameters=parameters), computed()
    pool = stored.pool
    known = {}
    for batch in (0, 1, 3):
        epoch, within = divmod(batch, 3)
        plan, logits = whole.epoch(epoch)
        part = slice(8 * within, 8 * within + 8)
        known[batch] = (replay(whole.images, plan.batch(part.start, part.stop), MEAN, STD), logits[part])
    dataset = SoftLabelDataset(stored)
    assert [stop - start for start, stop in dataset.bounds] == [8, 8, 8]
    for epoch in range(3):
        for place, batch in enumerate(pool.draw(SEED, epoch)):
            item = dataset[3 * epoch + place]
            samples, logits = known[batch]
            assert torch.equal(item.logits, logits)
            assert torch.equal(replay(whole.images, item.replay, MEAN, STD), samples)


def test_writing_a_pool_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvdd.labels.store, "SECONDS_BETWEEN_SAVES", -1.0)
    written(tmp_path / "whole", keep=0.5)
    broken, done = tmp_path / "broken", []
    broken.mkdir()

    def stop(steps: int) -> None:
        if len(done) == 2:
            raise Interrupted
        done.append(steps)

    with pytest.raises(Interrupted):
        write_labels(broken, computed(keep=0.5), layout(keep=0.5), stop)
    write_labels(broken, computed(keep=0.5), layout(keep=0.5), lambda steps: None)
    for name in (LOGITS, PARAMETERS):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- the dataset ------------------------------------------------------------------------------------------------------


def test_a_plain_loader_brings_the_batches_of_an_epoch() -> None:
    labels = computed()
    dataset = SoftLabelDataset(labels)
    assert len(dataset) == 9
    sampler = EpochSampler(len(dataset.bounds))
    sampler.set_epoch(2)
    batches = list(DataLoader(dataset, sampler=sampler, batch_size=None))
    plan, logits = labels.epoch(2)
    assert [len(batch.logits) for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([batch.logits for batch in batches]), logits)
    assert torch.equal(torch.cat([batch.replay.index for batch in batches]), plan.index)
    shown = torch.cat([replay(labels.images, batch.replay, MEAN, STD) for batch in batches])
    assert torch.equal(shown, replay(labels.images, plan, MEAN, STD))
