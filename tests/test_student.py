"""Students: losses, parts of batches, optimisers, and the average of the parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    MEAN,
    STD,
    fit,
    label_config,
    protocol_config,
    random_pixels,
    small_network,
    tiny_context,
    training_arguments,
)
from torch import nn
from torch.utils.data import DataLoader

import cvdd.training.fit
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import Passes
from cvdd.labels.batches import EpochSampler, LabelledBatch, SoftLabelDataset
from cvdd.labels.replay import replay
from cvdd.labels.sources import ComputedLabels, HardLabels
from cvdd.labels.teachers import Teachers
from cvdd.support.batch_parts import parts_of
from cvdd.training.losses import refined_cosine_loss, soft_label_loss
from cvdd.training.measure import Accuracy
from cvdd.training.schedules import optimizer_of
from cvdd.training.student import StudentModule

SIZE = 16
CLASSES = torch.arange(20) % 4


def trainable(seed: int = 0, **options: Any) -> nn.Module:
    return small_network(seed=seed, **options).train().requires_grad_(True)


def batches(labels: ComputedLabels | HardLabels) -> DataLoader:
    dataset = SoftLabelDataset(labels)
    return DataLoader(dataset, sampler=EpochSampler(len(dataset.bounds)), batch_size=None)


def test_epoch_sampler_counts_on() -> None:
    sampler = EpochSampler(3)
    assert list(sampler) == [0, 1, 2]
    sampler.set_epoch(2)
    assert list(sampler) == [6, 7, 8]
    assert len(sampler) == 3


def soft_labels(count: int = 20, batch_size: int = 8, epochs: int = 4) -> ComputedLabels:
    label = label_config(batch_size=batch_size, dtype="float32", epochs=epochs)
    teachers = Teachers([small_network(seed=9)], [1.0], label)
    return ComputedLabels(teachers, random_pixels(count, SIZE), label, 0, MEAN, STD)


def student(
    network: nn.Module, labels: ComputedLabels | HardLabels, passes: Passes | None = None, **changes: Any
) -> StudentModule:
    extra = {key: changes.pop(key) for key in ("measure", "measured_at") if key in changes}
    arguments = training_arguments(network, **extra)
    images = random_pixels(20, SIZE)
    return StudentModule(protocol_config(**changes), images, CLASSES, labels.batch_size, MEAN, STD, passes, **arguments)


@pytest.mark.slow
def test_a_compiled_student_learns_the_same() -> None:
    """In batches of 8, 8 and 4, of which the last is not compiled, with parts that move the running statistics."""
    labels, states = soft_labels(), []
    for compiled in (False, True):
        network = small_network(seed=3).train().requires_grad_()
        module = student(network, labels, Passes(compiled), epochs=3)
        with compiling(compiled):
            fit(module, batches(labels), 3)
        states.append(module.network.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)
    start = small_network(seed=3).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in states[1].items())


def test_a_student_in_half_precision_learns_nearly_the_same_with_full_parameters() -> None:
    labels, modules = soft_labels(), []
    for precision in ("fp32", "bf16"):
        network = small_network(seed=3).train().requires_grad_()
        module = student(network, labels, Passes(precision=precision), epochs=3, loss="mse")
        fit(module, batches(labels), 3)
        modules.append(module)
    full, half = (module.network.state_dict() for module in modules)
    assert all(value.dtype == full[name].dtype for name, value in half.items())
    assert any(not torch.equal(value, full[name]) for name, value in half.items())
    losses = [[row["train_loss"] for row in module.curve] for module in modules]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize(
    ("count", "batch", "accumulation", "parts"),
    [
        (16, 16, 2, [8, 8]),
        (4, 16, 2, [4]),
        (8, 16, 2, [8]),
        (12, 16, 2, [8, 4]),
        (10, 10, 2, [5, 5]),
        (7, 7, 2, [3, 4]),
        (9, 16, 2, [9]),
        (16, 16, 1, [16]),
        (16, 16, 4, [4, 4, 4, 4]),
        (1, 16, 2, [1]),
        (10, 1024, 2, [10]),
    ],
)
def test_parts_of_a_batch(count: int, batch: int, accumulation: int, parts: list[int]) -> None:
    """As published, ceil(n / (B / 2)) parts; a single image joins the part before it."""
    module = student(trainable(), soft_labels(20, batch), accumulation=accumulation)
    cut = parts_of(count, module.part)
    assert [part.stop - part.start for part in cut] == parts
    assert [index for part in cut for index in range(count)[part]] == list(range(count))


@pytest.mark.parametrize("count", [4, 12, 16])
def test_parts_by_size_add_up_to_the_batch(count: int) -> None:
    """Without BatchNorm, whose statistics are those of a part, a batch in parts has the loss of the whole."""
    labels = soft_labels(count, 16)
    item = SoftLabelDataset(labels)[0]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4))
    whole, parts, alike = (
        student(network, labels, accumulation=accumulation, part_weights=weights).training_step(item, 0).item()
        for accumulation, weights in ((1, "alike"), (2, "by_size"), (2, "alike"))
    )
    assert parts == pytest.approx(whole, rel=1e-5)
    assert (alike == pytest.approx(whole, rel=1e-5)) == (count == 16)


@pytest.mark.parametrize("batch", [0, 2])
def test_a_step_is_the_sum_of_separate_parts(batch: int) -> None:
    """Each half has BatchNorm statistics of its own; both the full and the partial batch divide by two."""
    labels = soft_labels()
    item = SoftLabelDataset(labels)[batch]
    module = student(trainable(), labels)
    loss = module.training_step(item, 0)
    samples = replay(labels.images, item.replay, MEAN, STD)
    reference = trainable()
    halves = [slice(0, 4), slice(4, 8)] if batch == 0 else [slice(0, 4)]
    expected = sum(soft_label_loss(reference(samples[part]), item.logits[part], 20) / 2 for part in halves)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    module.backward(loss)
    expected.backward()
    torch.testing.assert_close(module.network[0].weight.grad, reference[0].weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_weight_decay_is_for_weights_of_two_or_more_axes(optimizer: str) -> None:
    network = trainable()
    network.register_parameter("token", nn.Parameter(torch.zeros(1, 8)))
    made = student(network, soft_labels(), weight_decay=0.05, optimizer=optimizer).configure_optimizers()
    groups = made.param_groups
    assert type(made).__name__.lower() == optimizer
    assert optimizer == "sgd" or [group["betas"] for group in groups] == [(0.9, 0.999)] * 2
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, free = ([id(parameter) for parameter in group["params"]] for group in groups)
    named = {name: id(parameter) for name, parameter in network.named_parameters()}
    assert decayed == [named[name] for name in ("0.weight", "3.weight", "9.weight")]
    assert sorted([*decayed, *free]) == sorted(named.values())


def test_the_rate_changes_by_epoch() -> None:
    """LR(e) = lr/2 (1 + cos(pi e / (E eta))): stretched by 2 it ends at about half."""
    rates = []
    labels = soft_labels(epochs=10)
    module = student(trainable(), labels, epochs=10, eta=2, lr=0.004)

    def noted(batch: LabelledBatch, index: int) -> None:
        if index == 0:
            rates.append(optimizer_of(module).param_groups[0]["lr"])

    module.on_train_batch_start = noted
    fit(module, batches(labels), 10)
    assert rates[0] == pytest.approx(0.004)
    assert rates[-1] == pytest.approx(0.004 * 0.5 * (1 + math.cos(math.pi * 9 / 20)))
    assert len(rates) == 10


def test_a_student_is_trained_once_per_stored_batch() -> None:
    labels = soft_labels()
    module = student(trainable(), labels, epochs=2)
    trainer = fit(module, batches(labels), 2)
    assert trainer.global_step == 6
    assert len(module.curve) == 2


def test_images_are_not_in_a_students_checkpoint() -> None:
    assert not [name for name in student(trainable(), soft_labels()).state_dict() if not name.startswith("network.")]


# --- losses -----------------------------------------------------------------------------------------------------------


def test_squared_temperature_multiplies_the_divergence() -> None:
    labels = soft_labels()
    item = SoftLabelDataset(labels)[0]
    plain, scaled = (
        student(trainable(), labels, temperature=3, temperature_squared=squared).training_step(item, 0).item()
        for squared in (False, True)
    )
    assert scaled == pytest.approx(9 * plain, rel=1e-5)


def test_a_regression_step_adds_the_class_of_the_unmixed_image() -> None:
    """One part; the mean is over samples and classes, the classes are those of the images before CutMix."""
    labels = soft_labels()
    item = SoftLabelDataset(labels)[1]
    loss = student(trainable(), labels, loss="mse", hard_label_weight=0.15, accumulation=1).training_step(item, 0)
    logits = trainable()(replay(labels.images, item.replay, MEAN, STD)).detach()
    squares = sum(float((a - b) ** 2) for a, b in zip(logits.flatten(), item.logits.flatten(), strict=True))
    classes = CLASSES[item.replay.index].tolist()
    surprise = [-float(row.log_softmax(0)[label]) for row, label in zip(logits, classes, strict=True)]
    assert loss.item() == pytest.approx(squares / (8 * 4) + 0.15 * sum(surprise) / 8, rel=1e-5)


def test_a_step_by_angles_mixes_the_classes_of_mixed_images() -> None:
    labels = soft_labels()
    item = SoftLabelDataset(labels)[1]
    loss = student(trainable(), labels, loss="gift", hard_label_weight=0.1, accumulation=1).training_step(item, 0)
    logits = trainable()(replay(labels.images, item.replay, MEAN, STD)).detach()
    own, partner = CLASSES[item.replay.index], CLASSES[item.replay.index][item.replay.partner]
    share = item.replay.own_share(SIZE)
    assert (own != partner).any()
    assert (share < 1).any()
    expected = refined_cosine_loss(logits, item.logits.float(), own, partner, share, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_hard_labels_of_mixed_images_are_mixed(mix: str) -> None:
    """CutMix by the area that is pasted, Mixup by its weight."""
    label = label_config(teachers="none", store="none", mix=mix)
    labels, images = HardLabels(label, 20, SIZE, 5), random_pixels(20, SIZE)
    item = SoftLabelDataset(labels)[0]
    loss = student(trainable(), labels, loss="cross_entropy", accumulation=1).training_step(item, 0)
    plan = item.replay
    surprise = -trainable()(replay(images, plan, MEAN, STD)).log_softmax(1)
    expected = 0.0
    for sample in range(8):
        top, left, bottom, right = plan.mix_box[sample].tolist()
        partner = {"cutmix": (bottom - top) * (right - left) / 256, "mixup": 1 - float(plan.weight[sample]), "none": 0}
        own = int(CLASSES[plan.index[sample]])
        other = int(CLASSES[plan.index[plan.partner[sample]]])
        share = partner[mix]
        expected += ((1 - share) * surprise[sample, own] + share * surprise[sample, other]).item() / 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (mix == "none") == (plan.own_share(SIZE).min() == 1)


def test_parts_of_a_mixed_batch_keep_their_partners() -> None:
    """A partner may lie in the other part; without BatchNorm the parts sum to the whole."""
    label = label_config(teachers="none", store="none")
    labels = HardLabels(label, 20, SIZE, 5)
    item = SoftLabelDataset(labels)[0]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4))
    whole, halves = (
        student(network, labels, loss="cross_entropy", accumulation=parts).training_step(item, 0).item()
        for parts in (1, 2)
    )
    assert halves == pytest.approx(whole, rel=1e-5)


# --- optimisers -------------------------------------------------------------------------------------------------------


def test_decay_of_all_parameters() -> None:
    optimizer = student(trainable(), soft_labels(), weight_decay=0.05, decay="all").configure_optimizers()
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == len(list(small_network().parameters()))


def test_betas_of_the_protocol() -> None:
    optimizer = student(trainable(), soft_labels(), betas=(0.7, 0.95)).configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.95)] * 2


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw() -> None:
    """Matrices: 0.2 sqrt(longer side) times a matrix whose singular values are near 1; vectors: AdamW's step."""
    settings = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    module = student(trainable(), soft_labels(), optimizer="muon", momentum=0.9, **settings)
    plain = student(trainable(), soft_labels(), **settings)
    vector, kernel = module.network[1].bias, module.network[3].weight
    weights = kernel.detach().clone()
    draws = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=draws) for parameter in module.network.parameters()]
    for one in (module, plain):
        optimizer = one.configure_optimizers()
        for parameter, gradient in zip(one.network.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(vector, plain.network[1].bias)
    step = (weights * (1 - 0.1 * 0.5) - kernel.detach()).flatten(1) / (0.1 * 0.2 * max(kernel.flatten(1).shape) ** 0.5)
    values = torch.linalg.svdvals(step)
    assert len(values) == 12
    assert 0.7 < values.min() < values.max() < 1.3


def test_a_step_of_sgd_with_momentum() -> None:
    """Two steps with the gradients 1 and 1: w - lr g, then w - lr (m g + g); vectors do not decay."""
    module = student(trainable(), soft_labels(), optimizer="sgd", lr=0.1, momentum=0.875, weight_decay=0.5)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    vector, matrix = module.network[1].bias, module.network[-1].weight
    before, weights = vector.detach().clone(), matrix.detach().clone()
    for _ in range(2):
        for parameter in module.network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(vector.detach(), before - 0.1 * 1 - 0.1 * 1.875)
    first = weights - 0.1 * (1 + 0.5 * weights)
    torch.testing.assert_close(matrix.detach(), first - 0.1 * (0.875 * (1 + 0.5 * weights) + 1 + 0.5 * first))


# --- the average of the parameters ------------------------------------------------------------------------------------


def test_the_average_of_three_steps() -> None:
    """0.9 of the average and 0.1 of the parameters after every step, from the initial parameters on."""
    labels, seen = soft_labels(), []
    module = student(
        trainable(),
        labels,
        ema=0.9,
        measured_at=lambda epoch: True,
        measure=lambda network: (seen.append(network), Accuracy(1.0, 2.0, 3.0))[1],
    )
    weight = module.network[-1].weight
    history = [weight.detach().clone()]
    step = module.on_train_batch_end

    def noting(*arguments: Any) -> None:
        history.append(weight.detach().clone())
        step(*arguments)

    module.on_train_batch_end = noting
    fit(module, batches(labels), 1)
    assert len(history) == 4
    expected = 0.729 * history[0] + 0.081 * history[1] + 0.09 * history[2] + 0.1 * history[3]
    (measured,) = seen
    torch.testing.assert_close(measured[-1].weight, expected)
    assert not torch.equal(measured[-1].weight, weight)
    # Statistics are those of the network itself.
    assert torch.equal(measured[1].running_mean, module.network[1].running_mean)
    assert not torch.equal(measured[1].running_mean, small_network()[1].running_mean)


def test_without_an_average_the_network_itself_is_measured() -> None:
    module = student(trainable(), soft_labels())
    assert module.measured_network() is module.network


def test_a_student_with_an_average_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    context = tiny_context(tmp_path)

    def measured(network: nn.Module) -> Accuracy:
        return Accuracy(float(network[-1].weight.sum()), float(network[1].running_var.sum()), 0.0)

    def train(folder: Path, stop: int | None) -> list[dict[str, float]]:
        folder.mkdir(exist_ok=True)
        labels = soft_labels()
        options = {"epochs": 4, "ema": 0.8, "optimizer": "sgd", "warmup": 1, "schedule": "early_late"}
        module = student(trainable(), labels, measure=measured, measured_at=lambda epoch: True, **options)
        if stop is not None:
            begin = module.on_train_epoch_start

            def pull() -> None:
                if module.current_epoch == stop:
                    raise InterruptedError
                begin()

            module.on_train_epoch_start = pull
        context.fit(module, batches(labels), 4, folder / "training.ckpt.tmp")
        return module.curve

    whole = train(tmp_path / "whole", None)
    with pytest.raises(InterruptedError):
        train(tmp_path / "broken", 2)
    assert train(tmp_path / "broken", None) == whole
    assert len({row["top1"] for row in whole}) == 4
