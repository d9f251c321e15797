"""Labels: who scores what, and how logits are averaged."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import MEAN, STD, label_config, random_pixels, small_network
from torch import Tensor, nn

from cvdd.computing.passes import Passes
from cvdd.labels.replay import batch_bounds, draw_epoch, replay
from cvdd.labels.sources import (
    ComputedLabels,
    HardLabels,
    NonFiniteLabels,
    check_batches,
    epochs_together,
    samples_at_most,
)
from cvdd.labels.teachers import Teachers
from cvdd.schema import LabelConfig
from cvdd.support.config_base import ConfigError

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


@pytest.mark.slow
def test_compiled_teachers_say_the_same() -> None:
    """Stacks of the usual size are compiled, smaller ones are not."""
    samples, networks = noise(24), [small_network(seed=1), small_network(seed=2)]
    plain, compiled = (Teachers(networks, [0.5, 0.5], label_config(), Passes(how)) for how in (False, True))
    compiled.compiled_samples = 16
    for part in (samples[:16], samples[16:]):
        torch.testing.assert_close(compiled.score(part, 8), plain.score(part, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bn_mode", ["batch", "running"])
def test_teachers_in_half_precision_say_nearly_the_same(bn_mode: str) -> None:
    samples, networks = noise(24), [small_network(seed=1), small_network(seed=2)]
    label = label_config(bn_mode=bn_mode)
    full, half = (Teachers(networks, [0.5, 0.5], label, Passes(precision=how)) for how in ("fp32", "bf16"))
    expected, said = full.score(samples, 8), half.score(samples, 8)
    assert said.dtype == torch.float32
    assert not torch.equal(said, expected)
    torch.testing.assert_close(said, expected, rtol=0.05, atol=0.05)


def test_balanced_teachers_have_the_same_norm_in_every_batch() -> None:
    """Written out for each batch: both are scaled to the mean of their norms, then averaged."""
    one, two, samples = small_network(seed=1), small_network(seed=2, width=5), noise(16)
    label = label_config(bn_mode="running", weights="balanced")
    balanced = Teachers([one, two], [0.5, 0.5], label).score(samples, 8)
    expected = []
    for batch in samples.split(8):
        logits = [one(batch), two(batch)]
        norms = [each.square().sum().sqrt() for each in logits]
        scale = (norms[0] + norms[1]) / 2
        expected.append((logits[0] * scale / norms[0] + logits[1] * scale / norms[1]) / 2)
    torch.testing.assert_close(balanced, torch.cat(expected))
    plain = Teachers([one, two], [0.5, 0.5], label_config(bn_mode="running")).score(samples, 8)
    assert (balanced - plain).abs().max() > 1e-3


def test_a_teacher_without_batchnorm_labels_in_batch_mode() -> None:
    """There is nothing to replace; that it may is the committee's word (bn_scale=0)."""
    network, samples = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES)), noise(8)
    torch.testing.assert_close(Teachers([network], [1.0], label_config()).score(samples, 8), network(samples))


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


@pytest.mark.parametrize(
    ("stack", "count", "together"),
    [(32, 20, 16), (32, 100, 2), (5, 20, 2), (1, 20, 1), (32, 50_000, 1), (4, 5, 4)],  # batches of 8
)
def test_how_many_epochs_share_their_passes(stack: int, count: int, together: int) -> None:
    assert epochs_together(label_config(stack=stack), count) == together


def test_epochs_share_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of 20 = 8 + 8 + 4: all whole batches at once, and all that are left; in any order the same bits."""
    shown: list[tuple[int, int]] = []
    score = Teachers.score

    def noted(self: Teachers, samples: Tensor, batch_size: int) -> Tensor:
        shown.append((len(samples), batch_size))
        return score(self, samples, batch_size)

    monkeypatch.setattr(Teachers, "score", noted)
    labels, backwards = computed(), computed()
    forwards = [labels.epoch(epoch) for epoch in range(3)]
    assert shown == [(48, 8), (12, 4)]
    for epoch in (2, 0, 1):
        plan, logits = backwards.epoch(epoch)
        assert torch.equal(plan.index, forwards[epoch][0].index)
        assert torch.equal(logits, forwards[epoch][1])
    assert len({tuple(plan.index.tolist()) for plan, _ in forwards}) == 3


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({"epochs": 7, "stack": 4}, 32),  # two epochs of 8 + 8 (+ 4), and one left
        ({"epochs": 1, "stack": 4}, 16),
        ({"epochs": 7, "stack": 1}, 8),
        ({"epochs": 7, "stack": 3, "batch_size": 32}, 60),  # a batch is never more than the set
        ({"epochs": 7, "stack": 4, "keep": 0.1}, 16),  # 2 of 21 batches
    ],
)
def test_the_same_passes_are_compiled_wherever_one_begins(
    changes: dict[str, object], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on, or another rank, may begin at the last epochs, whose passes are short."""
    compiled: list[int] = []

    def compiler(passes: Passes, network: nn.Module) -> object:
        def forward(samples: Tensor, *others: int) -> Tensor:
            compiled.append(len(samples))
            return network(samples, *others)

        return forward

    monkeypatch.setattr(Passes, "compiled", compiler)
    first, again = computed(**changes), computed(**changes)
    epochs = range(first.pool.labelled_epochs)
    for labels, order in ((first, epochs), (again, reversed(epochs))):
        for epoch in order:
            labels.epoch(epoch)
        assert set(compiled) == {samples}
        compiled.clear()


def test_dropout_of_teachers_depends_on_the_seed_and_the_epoch_alone() -> None:
    """Whoever draws before, and without a trace for whoever draws after."""

    def drawn(seed: int, *epochs: int) -> Tensor:
        label = label_config(dropout=True, epochs=7, stack=2, dtype="float32")
        teachers = Teachers([small_network(seed=1, dropout=0.5)], [1.0], label)
        labels = ComputedLabels(teachers, random_pixels(COUNT, SIZE), label, seed, MEAN, STD)
        before = torch.random.get_rng_state()
        logits = [labels.epoch(epoch)[1] for epoch in epochs][-1]
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(7)
        return logits

    assert torch.equal(drawn(3, 5), drawn(3, 0, 6, 5))
    assert not torch.equal(drawn(3, 5), drawn(4, 5))
    exact = computed(epochs=7, stack=2, dtype="float32").epoch(5)[1]
    assert (drawn(3, 5) - exact).abs().max() > 0.1


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
    proposed = [int(size) for size in str(error.value).split("label.batch_size from ")[1].split(", or")[0].split(", ")]
    assert len(proposed) > 3
    for size in proposed:
        check_batches(22, label_config(batch_size=size))


def hard_label(**changes: object) -> LabelConfig:
    return label_config(teachers="none", store="none", **changes)


@pytest.mark.parametrize(("measures_prior", "way"), [(True, "raise prior.images"), (False, "raise ipc.images")])
def test_of_two_images_no_batch_has_statistics(measures_prior: bool, way: str) -> None:
    with pytest.raises(ConfigError, match=rf"2 of 2 images.*too few for batch statistics: {way}_per_class") as caught:
        check_batches(2, label_config(batch_size=8), measures_prior)
    # The measurement's statistics are always those of batches.
    assert ("label.bn_mode=running" in str(caught.value)) != measures_prior


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e5, r"reach 1e\+05, .*float16: set label\.dtype=float32"), (math.nan, r"not finite: .*recipe\.lr")],
)
def test_logits_that_cannot_be_stored_are_refused(value: float, message: str) -> None:
    network = small_network(seed=9)
    with torch.no_grad():
        list(network.parameters())[-1].fill_(value)
    label = label_config(batch_size=8)
    labels = ComputedLabels(Teachers([network], [1.0], label), random_pixels(16), label, 0, MEAN, STD)
    with pytest.raises(NonFiniteLabels, match=message):
        labels.epoch(0)
    stored = label_config(batch_size=8, dtype="float32")
    again = ComputedLabels(Teachers([network], [1.0], stored), random_pixels(16), stored, 0, MEAN, STD)
    if math.isfinite(value):
        assert again.epoch(0)[1].isfinite().all()


@pytest.mark.parametrize(
    ("count", "batch", "stack", "samples"), [(20, 8, 4, 32), (20, 1024, 4, 80), (100, 10, 4, 40), (10, 10, 1, 10)]
)
def test_a_pass_has_no_more_samples_than_there_are(count: int, batch: int, stack: int, samples: int) -> None:
    """A batch that is larger than the set is the set; epochs that share passes are all there is to label at once."""
    assert samples_at_most(label_config(batch_size=batch, stack=stack, epochs=50), count, stack) == samples


def test_hard_labels_are_views_without_logits() -> None:
    label = hard_label()
    hard = HardLabels(label, COUNT, SIZE, SEED)
    plan, logits = hard.epoch(2)
    assert logits.shape == (COUNT, 0)
    assert plan.record().tobytes() == draw_epoch(label_config(), COUNT, SIZE, SEED, 2).record().tobytes()
    assert (hard.batch_size, hard.count, hard.epochs) == (8, COUNT, 3)


def test_hard_labels_need_no_statistics() -> None:
    check_batches(17, hard_label(batch_size=16))


def test_a_pool_without_a_batch_is_refused() -> None:
    """3 epochs of 3 batches: a tenth of them is none, an eighth is one."""
    with pytest.raises(ConfigError, match=r"label\.keep=0\.1 keeps none of 9 label batches; set at least 0\.11"):
        check_batches(COUNT, label_config(keep=0.1))
    check_batches(COUNT, label_config(keep=0.125))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": "none"}, r"label\.teachers=none .* label\.store=none"),
        ({"teachers": "none", "store": "none", "dropout": True}, r"label\.dropout=true .* label\.teachers=none"),
        ({"teachers": []}, r"label\.teachers is empty"),
        ({"keep": 0.5, "store": "none"}, r"label\.keep=0\.5 .* label\.store=logits"),
        ({"keep": 0}, "greater than 0"),
        ({"batch_size": 2}, r"label\.halves=true leaves halves of one"),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_config(**changes)


def test_batches_of_two_are_labelled_with_running_statistics() -> None:
    """Nothing is normalised over halves, so that these may have one sample."""
    network, samples = small_network(), noise(6)
    label = label_config(batch_size=2, bn_mode="running", halves=True)
    torch.testing.assert_close(Teachers([network], [1.0], label).score(samples, 2), network(samples))
