"""Soft labels: who scores what, and a store that gives back the same bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import MEAN, STD, label_config, random_pixels, small_network
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cvdd.labels
from cvdd.classifier import EpochSampler
from cvdd.config_base import ConfigError
from cvdd.labels import (
    LOGITS,
    PARAMETERS,
    ComputedLabels,
    LabelLayout,
    SoftLabelDataset,
    StoredLabels,
    Teachers,
    check_batches,
    write_labels,
)
from cvdd.replay import RECORD, batch_bounds, draw_epoch, replay

COUNT, SIZE, CLASSES, SEED = 20, 16, 4, 3


def noise(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def in_train_mode(network: nn.Module, samples: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(network).train()(samples)


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_16_is_two_forward_passes_of_8_in_train_mode() -> None:
    network, samples = small_network(), noise(16)
    expected = torch.cat([in_train_mode(network, half) for half in samples.split(8)])
    scored = Teachers([network], [1.0], label_config(batch_size=16)).score(samples, 16)
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [5, 7, 9])
def test_odd_batches_have_a_smaller_first_half(size: int) -> None:
    network, samples = small_network(), noise(3 * size)
    first = size // 2
    expected = [
        in_train_mode(network, part) for batch in samples.split(size) for part in (batch[:first], batch[first:])
    ]
    scored = Teachers([network], [1.0], label_config(batch_size=size)).score(samples, size)
    torch.testing.assert_close(scored, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_whole_batches_and_running_statistics() -> None:
    network, samples = small_network(), noise(16)
    whole = Teachers([network], [1.0], label_config(halves=False)).score(samples, 8)
    expected = torch.cat([in_train_mode(network, batch) for batch in samples.split(8)])
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    running = Teachers([network], [1.0], label_config(bn_mode="running")).score(samples, 8)
    torch.testing.assert_close(running, small_network()(samples))


def test_several_teachers_average_their_logits() -> None:
    one, two, samples = small_network(seed=1), small_network(seed=2, width=5), noise(8)
    each = [Teachers([network], [1.0], label_config()).score(samples, 8) for network in (one, two)]
    both = Teachers([one, two], [0.3, 0.7], label_config()).score(samples, 8)
    torch.testing.assert_close(both, 0.3 * each[0] + 0.7 * each[1])


# --- computed labels --------------------------------------------------------------------------------------------------


def computed(**changes: object) -> ComputedLabels:
    label = label_config(**changes)
    teachers = Teachers([small_network(seed=1), small_network(seed=2)], [0.25, 0.75], label)
    return ComputedLabels(teachers, random_pixels(COUNT, SIZE), label, SEED, MEAN, STD)


def by_hand(labels: ComputedLabels, epoch: int) -> Tensor:
    """Batch by batch, half by half, with networks in train mode."""
    plan = draw_epoch(labels.label, COUNT, SIZE, SEED, epoch)
    logits = []
    for start, stop in batch_bounds(COUNT, labels.batch_size):
        samples = replay(labels.images, plan.batch(start, stop), MEAN, STD)
        middle = (stop - start) // 2
        for part in (samples[:middle], samples[middle:]):
            each = [in_train_mode(small_network(seed=seed), part) for seed in (1, 2)]
            logits.append(0.25 * each[0] + 0.75 * each[1])
    return torch.cat(logits)


@pytest.mark.parametrize("batch_size", [8, 7, 20, 32])
def test_labels_of_an_epoch_with_a_partial_last_batch(batch_size: int) -> None:
    """20 = 8 + 8 + 4 = 7 + 7 + 6; a batch larger than the set is the set."""
    labels = computed(batch_size=batch_size, dtype="float32")
    torch.testing.assert_close(labels.epoch(1)[1], by_hand(labels, 1), rtol=1e-4, atol=1e-4)


def test_stacked_batches_are_separate_batches() -> None:
    one, many = computed(stack=1, dtype="float32").epoch(0)[1], computed(stack=32, dtype="float32").epoch(0)[1]
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_label_belongs_to_the_mixed_image(mix: str) -> None:
    """Changing only the partner of a sample changes the sample's own label."""
    labels = computed(mix=mix, dtype="float32", bn_mode="running")
    plan, before = labels.epoch(0)
    area = (plan.mix_box[:, 2] - plan.mix_box[:, 0]) * (plan.mix_box[:, 3] - plan.mix_box[:, 1])
    mixed = (plan.partner != torch.arange(COUNT)) & ((area > 30) | (plan.weight < 0.9))
    sample = int(mixed.nonzero()[0])
    partner = int(plan.index[plan.partner[sample]])
    changed = computed(mix=mix, dtype="float32", bn_mode="running")
    changed.images[partner] = 255 - changed.images[partner]
    assert int(plan.index[sample]) != partner
    assert (changed.epoch(0)[1][sample] - before[sample]).abs().max() > 1e-3


def test_the_last_epoch_is_kept() -> None:
    labels = computed()
    first = labels.epoch(0)[1]
    assert labels.epoch(0)[1] is first
    assert not torch.equal(labels.epoch(1)[1], first)
    assert torch.equal(labels.epoch(0)[1], first)


@pytest.mark.parametrize(
    ("count", "changes", "refused"),
    [
        (20, {"batch_size": 6}, True),  # 2 left: halves of one image
        (19, {"batch_size": 16}, True),  # 3 left: 1 + 2
        (20, {"batch_size": 16}, False),  # 4 left: 2 + 2
        (17, {"batch_size": 16, "halves": False}, True),
        (18, {"batch_size": 16, "halves": False}, False),
        (17, {"batch_size": 16, "bn_mode": "running"}, False),
        (3, {"batch_size": 8}, True),
    ],
)
def test_batches_too_small_for_statistics(count: int, changes: dict, refused: bool) -> None:
    label = label_config(**changes)
    if refused:
        with pytest.raises(ConfigError, match=rf"label\.batch_size={label.batch_size} leaves a last batch of "):
            check_batches(count, label)
    else:
        check_batches(count, label)


def test_the_proposed_batch_sizes_work() -> None:
    with pytest.raises(ConfigError) as error:
        check_batches(22, label_config(batch_size=10))
    proposed = [int(size) for size in str(error.value).split("Choose one of ")[1].split(", or")[0].split(", ")]
    assert len(proposed) > 3
    for size in proposed:
        check_batches(22, label_config(batch_size=size))


# --- the store --------------------------------------------------------------------------------------------------------


def layout(parameters: bool = True, dtype: str = "float16") -> LabelLayout:
    return LabelLayout(3, COUNT, CLASSES, dtype, parameters)


def written(folder: Path, parameters: bool = True, **changes: object) -> StoredLabels:
    labels = computed(**changes)
    form = layout(parameters, labels.label.dtype)
    folder.mkdir(exist_ok=True)
    write_labels(folder, labels, form, lambda steps: None)
    return StoredLabels(folder, form, labels.label, SIZE, SEED)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parameters", [True, False])
def test_stored_labels_are_the_computed_ones_bit_for_bit(parameters: bool, dtype: str, tmp_path: Path) -> None:
    stored, fresh = written(tmp_path, parameters, dtype=dtype), computed(dtype=dtype)
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
    assert layout(parameters=False).parameters_bytes == 0


def test_seeded_parameters_take_no_file(tmp_path: Path) -> None:
    written(tmp_path, parameters=False)
    assert [path.name for path in tmp_path.iterdir()] == [LOGITS]


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
    monkeypatch.setattr(cvdd.labels, "SECONDS_BETWEEN_SAVES", -1.0)
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
