"""Members and students: augmentation, loss, optimiser, schedule, and a stop at the first number that is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import MEAN, STD, label_config, protocol_config, random_pixels, small_network
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.augment import normalise
from cvdd.classifier import (
    EpochSampler,
    MemberModule,
    NonFiniteTraining,
    ShuffledBatches,
    StudentModule,
    soft_label_loss,
)
from cvdd.data import Data, TensorSource
from cvdd.labels import ComputedLabels, SoftLabelDataset, Teachers
from cvdd.measure import Accuracy, Evaluator
from cvdd.replay import replay
from cvdd.schema import RecipeConfig

SIZE = 16


def shared(network: nn.Module, **changes: Any) -> dict[str, Any]:
    return {
        "network": network,
        "name": "net",
        "seed": 0,
        "measure": lambda network: Accuracy(0.0, 0.0, 0.0),
        "measured_at": lambda epoch: False,
        "on_epoch": lambda epoch, row: None,
        **changes,
    }


def trainable(seed: int = 0, **options: Any) -> nn.Module:
    return small_network(seed=seed, **options).train().requires_grad_(True)


def fit(module: pl.LightningModule, loader: DataLoader, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


# --- samplers ---------------------------------------------------------------------------------------------------------


def test_epoch_sampler_counts_on() -> None:
    sampler = EpochSampler(3)
    assert list(sampler) == [0, 1, 2]
    sampler.set_epoch(2)
    assert list(sampler) == [6, 7, 8]
    assert len(sampler) == 3


@pytest.mark.parametrize(("count", "batches"), [(10, [4, 4, 2]), (9, [4, 4]), (8, [4, 4]), (3, [3]), (1, [])])
def test_shuffled_batches_leave_out_a_single_image(count: int, batches: list[int]) -> None:
    sampler = ShuffledBatches(count, 4, seed=1)
    drawn = list(sampler)
    assert [len(batch) for batch in drawn] == batches
    assert len(sampler) == len(batches)
    shown = [int(index) for batch in drawn for index in batch]
    assert len(set(shown)) == len(shown)


def test_the_order_depends_on_seed_and_epoch() -> None:
    sampler = ShuffledBatches(50, 50, seed=1)
    first = next(iter(sampler))
    sampler.set_epoch(1)
    assert not torch.equal(next(iter(sampler)), first)
    sampler.set_epoch(0)
    assert torch.equal(next(iter(sampler)), first)
    assert not torch.equal(next(iter(ShuffledBatches(50, 50, seed=2))), first)


# --- members ----------------------------------------------------------------------------------------------------------


def recipe(**changes: Any) -> RecipeConfig:
    fields = {"name": "test", "epochs": 3, "batch_size": 8, "optimizer": "adamw", "lr": 0.01, "schedule": "cosine"}
    return RecipeConfig.model_validate({**fields, **changes})


def member(network: nn.Module | None = None, labels: Tensor | None = None, **changes: Any) -> MemberModule:
    extra = {key: changes.pop(key) for key in ("measure", "measured_at", "seed") if key in changes}
    pixels = random_pixels(24, SIZE)
    labels = torch.arange(4).repeat(6) if labels is None else labels
    network = trainable() if network is None else network
    return MemberModule(recipe(**changes), pixels, labels, MEAN, STD, SIZE, **shared(network, **extra))


class _Batches(torch.utils.data.Dataset):
    def __getitem__(self, index: Tensor) -> Tensor:
        return index


def member_loader() -> DataLoader:
    return DataLoader(_Batches(), sampler=ShuffledBatches(24, 8, seed=0), batch_size=None)


def test_padded_crops_are_windows_of_the_padded_image() -> None:
    """As torchvision's RandomCrop with padding, then a flip."""
    pixels = random_pixels(200, SIZE)
    made = member(crop="pad", pad=3, flip=True).augment(pixels, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(pixels.float(), (3, 3, 3, 3))
    found = set()
    for image, wide in zip(made, padded, strict=True):
        windows = [
            (top, left, flip)
            for top in range(7)
            for left in range(7)
            for flip in (False, True)
            if torch.equal(image, wide[:, top : top + SIZE, left : left + SIZE].flip(-1 if flip else ()))
        ]
        assert len(windows) == 1
        found.add(windows[0])
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(7))
    assert {flip for _, _, flip in found} == {False, True}


def test_no_augmentation_changes_nothing() -> None:
    pixels = random_pixels(5, SIZE)
    assert torch.equal(member(crop="none", flip=False).augment(pixels, torch.Generator()), pixels.float())


def test_resized_crops_have_the_size_of_the_input() -> None:
    made = member(crop="resized", flip=False).augment(random_pixels(5, 40), torch.Generator().manual_seed(0))
    assert made.shape == (5, 3, SIZE, SIZE)
    assert made.min() >= 0
    assert made.max() <= 255


def test_a_member_learns() -> None:
    """Colours that tell the class are learnt in a few epochs, the curve says so."""
    labels = torch.arange(4).repeat(6)
    module = member(labels=labels, epochs=12, lr=0.05, crop="none")
    module._pixels = (labels * 60).to(torch.uint8).view(-1, 1, 1, 1).expand(24, 3, SIZE, SIZE).contiguous()
    fit(module, member_loader(), 12)
    assert module.curve[-1]["train_loss"] < 0.2 < module.curve[0]["train_loss"]
    assert [row["epoch"] for row in module.curve] == list(range(1, 13))


@pytest.mark.parametrize(
    ("schedule", "period", "expected"),
    [
        ("cosine", None, [1.0, 0.75, 0.25]),
        ("cosine", 2, [1.0, 0.5, 0.0]),
        ("constant", None, [1.0, 1.0, 1.0]),
    ],
)
def test_rates_of_a_members_epochs(schedule: str, period: int | None, expected: list[float]) -> None:
    module = member(schedule=schedule, cosine_period=period, epochs=3)
    options = module.configure_optimizers()
    seen = []
    for _ in range(3):
        seen.append(options["optimizer"].param_groups[0]["lr"] / 0.01)
        options["optimizer"].step()
        options["lr_scheduler"]["scheduler"].step()
    assert seen == pytest.approx(expected, abs=1e-9)
    assert options["lr_scheduler"]["interval"] == "epoch"


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_optimisers_of_a_recipe(name: str, kind: str) -> None:
    optimizer = member(optimizer=name, weight_decay=0.03, momentum=0.8).configure_optimizers()["optimizer"]
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["weight_decay"] == 0.03
    assert optimizer.param_groups[0].get("momentum", 0.8) == 0.8


def test_a_network_with_dropout_is_trained_the_same_again() -> None:
    """Its draws come from the global generator, which is seeded for every epoch."""

    def train(noise: int) -> Tensor:
        torch.manual_seed(noise)
        module = member(network=trainable(dropout=0.5), seed=3)
        fit(module, member_loader(), 2)
        return module.network[-1].weight.detach()

    assert torch.equal(train(1), train(2))


def test_a_loss_that_is_not_finite_stops_a_member() -> None:
    network = trainable()
    nn.init.constant_(network[-1].bias, math.nan)
    with pytest.raises(NonFiniteTraining, match=r"train loss of net is nan in epoch 1.*recipe\.lr or protocol\.lr"):
        fit(member(network), member_loader(), 1)


def test_a_measured_loss_that_is_not_finite_stops_too() -> None:
    module = member(measure=lambda network: Accuracy(10.0, 50.0, math.nan), measured_at=lambda epoch: epoch == 1)
    with pytest.raises(NonFiniteTraining, match="the loss of net is nan in epoch 2"):
        fit(module, member_loader(), 3)
    assert len(module.curve) == 1


# --- students ---------------------------------------------------------------------------------------------------------


def soft_labels(count: int = 20, batch_size: int = 8) -> ComputedLabels:
    label = label_config(batch_size=batch_size, dtype="float32")
    teachers = Teachers([small_network(seed=9)], [1.0], label)
    return ComputedLabels(teachers, random_pixels(count, SIZE), label, 0, MEAN, STD)


def student(network: nn.Module, labels: ComputedLabels, **changes: Any) -> StudentModule:
    protocol = protocol_config(**changes)
    return StudentModule(protocol, labels.images, labels.batch_size, MEAN, STD, **shared(network))


def test_loss_is_kl_without_the_squared_temperature() -> None:
    """Written out; and about the variance of the logits' difference over 2 T^2, far below the usual T^2-scaled loss."""
    source = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(6, 5, generator=source).double() * 2 for _ in range(2))
    expected = 0.0
    for own, other in zip(mine, theirs, strict=True):
        p, q = (torch.softmax(logits / 20, dim=0) for logits in (other, own))
        expected += float((p * (p.log() - q.log())).sum()) / 6
    loss = soft_label_loss(mine, theirs, 20).item()
    assert loss == pytest.approx(expected, rel=1e-9)
    gap = (mine - theirs).var(dim=1, correction=0).mean().item() / (2 * 20**2)
    assert loss == pytest.approx(gap, rel=0.1)
    assert soft_label_loss(mine, mine + 3, 20).item() == pytest.approx(0, abs=1e-12)


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
    ],
)
def test_parts_of_a_batch(count: int, batch: int, accumulation: int, parts: list[int]) -> None:
    """As published, ceil(n / (B / 2)) parts; a single image joins the part before it."""
    labels = soft_labels(20, batch)
    module = student(trainable(), labels, accumulation=accumulation)
    assert [len(part) for part in module._parts(torch.zeros(count, 3))] == parts


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
    loss.backward()
    expected.backward()
    torch.testing.assert_close(module.network[0].weight.grad, reference[0].weight.grad, rtol=1e-4, atol=1e-7)


def test_weight_decay_is_for_weights_of_two_or_more_axes() -> None:
    module = student(trainable(), soft_labels(), weight_decay=0.05)
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.network.parameters()))
    assert decayed["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    ("eta", "last"), [(1, 0.5 * (1 + math.cos(math.pi * 9 / 10))), (2, 0.5 * (1 + math.cos(math.pi * 9 / 20)))]
)
def test_rate_of_a_students_epochs(eta: float, last: float) -> None:
    """LR(e) = lr/2 (1 + cos(pi e / (E eta))): stretched by 2 it ends at about half."""
    labels, rates = soft_labels(), []
    module = student(trainable(), labels, epochs=10, eta=eta, lr=0.004)
    options = module.configure_optimizers()
    for _ in range(10):
        rates.append(options["optimizer"].param_groups[0]["lr"])
        options["optimizer"].step()
        options["lr_scheduler"]["scheduler"].step()
    assert rates[0] == pytest.approx(0.004)
    assert rates[-1] == pytest.approx(0.004 * last)
    assert (rates[-1] > 0.0018) == (eta == 2)
    assert options["lr_scheduler"]["interval"] == "epoch"


def test_a_student_is_trained_once_per_stored_batch() -> None:
    labels = soft_labels()
    module, dataset = student(trainable(), labels, epochs=2), SoftLabelDataset(labels)
    trainer = fit(module, DataLoader(dataset, sampler=EpochSampler(3), batch_size=None), 2)
    assert trainer.global_step == 6
    assert len(module.curve) == 2


def test_images_are_not_in_a_students_checkpoint() -> None:
    assert not [name for name in student(trainable(), soft_labels()).state_dict() if not name.startswith("network.")]


# --- measuring --------------------------------------------------------------------------------------------------------


def test_accuracy_is_counted_over_all_images() -> None:
    """In evaluation mode, over batches of unequal length; the mode is restored."""
    pixels, labels = random_pixels(23, SIZE), torch.arange(23) % 10
    source = TensorSource(pixels, labels)
    data = Data(source, source, tuple(map(str, range(10))), MEAN, STD, SIZE, "test", {})
    network = small_network(classes=10).train()
    accuracy = Evaluator(data, 5, torch.device("cpu"), test_resize=None)(network)
    assert network.training
    logits = network.eval()(normalise(pixels, MEAN, STD))
    ranks = logits.argsort(dim=1, descending=True)
    assert accuracy.top1 == pytest.approx(100 * (ranks[:, 0] == labels).float().mean().item())
    assert accuracy.top5 == pytest.approx(100 * (ranks[:, :5] == labels[:, None]).any(dim=1).float().mean().item())
    assert accuracy.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
