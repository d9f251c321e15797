"""Members: augmentation, loss, optimiser, schedule, and a stop at the first number that is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MEAN, STD, as_files, fit, random_pixels, small_network, tiny_context, training_arguments
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cvdd.training.member
from cvdd.augmentation.augment import normalise
from cvdd.chain.members import _finish, make_member
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import Passes
from cvdd.data import Data, TensorSource
from cvdd.schema import RecipeConfig
from cvdd.support.config_base import ConfigError
from cvdd.training.classifier import NonFiniteTraining, Positions, ShuffledBatches, smallest_batch
from cvdd.training.measure import Accuracy, Evaluator
from cvdd.training.member import Augmentation, MemberModule, apply_augmentation, augment, draw_augmentation

SIZE = 16


def trainable(seed: int = 0, **options: Any) -> nn.Module:
    return small_network(seed=seed, **options).train().requires_grad_(True)


# --- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batches"), [(10, [4, 4, 2]), (9, [4, 4]), (8, [4, 4]), (3, [3])])
def test_shuffled_batches_leave_out_a_single_image(count: int, batches: list[int]) -> None:
    sampler = ShuffledBatches(count, 4, seed=1)
    drawn = list(sampler)
    assert [len(batch) for batch in drawn] == batches
    assert len(sampler) == len(batches)
    shown = [int(index) for batch in drawn for index in batch]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize(("count", "batches"), [(9, [4, 4, 1]), (8, [4, 4]), (1, [1])])
def test_without_batchnorm_a_single_image_is_a_batch(count: int, batches: list[int]) -> None:
    assert (smallest_batch(trainable()), smallest_batch(nn.Linear(2, 2))) == (2, 1)
    sampler = ShuffledBatches(count, 4, seed=1, least=1)
    assert [len(batch) for batch in sampler] == batches
    assert len(sampler) == len(batches)


def test_no_batch_at_all_is_refused() -> None:
    """Lightning would train on nothing."""
    with pytest.raises(ConfigError, match=r"^there are 1 images to train on; at least 2 are needed"):
        ShuffledBatches(1, 4, seed=1)
    with pytest.raises(ConfigError, match=r"^x\.batch_size=1: BatchNorm layers need batches of at least 2 images"):
        ShuffledBatches(10, 1, seed=1, field="x.batch_size")
    assert len(ShuffledBatches(1, 1, seed=1, least=1)) == 1


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
    passes = Passes(changes.pop("compiled", False))
    arguments = training_arguments(network, **extra)
    return MemberModule(recipe(**changes), pixels, labels, MEAN, STD, SIZE, passes, **arguments)


def member_loader() -> DataLoader:
    return DataLoader(Positions(), sampler=ShuffledBatches(24, 8, seed=0), batch_size=None)


def test_padded_crops_are_windows_of_the_padded_image() -> None:
    """As torchvision's RandomCrop with padding, then a flip."""
    pixels = random_pixels(200, SIZE)
    made = augment(pixels, recipe(crop="pad", pad=3, flip=True), SIZE, torch.Generator().manual_seed(0))
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
    assert torch.equal(augment(pixels, recipe(crop="none", flip=False), SIZE, torch.Generator()), pixels.float())


def test_resized_crops_have_the_size_of_the_input() -> None:
    crops = recipe(crop="resized", flip=False)
    made = augment(random_pixels(5, 40), crops, SIZE, torch.Generator().manual_seed(0))
    assert made.shape == (5, 3, SIZE, SIZE)
    assert made.min() >= 0
    assert made.max() <= 255


def test_resized_crops_have_the_areas_of_the_recipe() -> None:
    crops = recipe(crop="resized", crop_scale=(0.5, 0.6))
    boxes = draw_augmentation(crops, 200, 64, 64, torch.Generator().manual_seed(0)).boxes.double()
    areas = boxes[:, 2] * boxes[:, 3] / 64**2
    assert 0.48 < areas.min() < areas.max() < 0.62


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_images_are_mirrored_where_it_was_drawn_whatever_the_crop(crop: str) -> None:
    """Crops of whole images, and shifts that leave them in the middle."""
    pixels, chosen = random_pixels(4, SIZE), recipe(crop=crop, **({"pad": 2} if crop == "pad" else {}))
    flips = torch.tensor([True, False, True, False])
    middle = torch.full((4, 2), 2 if crop == "pad" else 0)
    drawn = Augmentation(torch.tensor([[0, 0, SIZE, SIZE]]).expand(4, 4), flips, middle)
    shown = apply_augmentation(pixels, chosen, SIZE, drawn)
    expected = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels).float()
    torch.testing.assert_close(shown, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_of_a_member_has_the_recipes_smoothing(smoothing: float) -> None:
    indices = torch.arange(8)
    loss = member(crop="none", flip=False, label_smoothing=smoothing).training_step(indices, 0)
    logits = trainable()(normalise(random_pixels(24, SIZE)[:8], MEAN, STD))
    expected = nn.functional.cross_entropy(logits, indices % 4, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_looks_ahead_where_the_recipe_says_so(nesterov: bool) -> None:
    optimizer = member(optimizer="sgd", nesterov=nesterov).configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["nesterov"] is nesterov


def test_the_momentum_of_muon_always_looks_ahead() -> None:
    matrices, others = member(optimizer="muon").configure_optimizers()["optimizer"].param_groups
    assert matrices["nesterov"] is True
    assert others["use_fallback"] is True


@pytest.mark.slow
def test_a_compiled_member_learns_the_same() -> None:
    """Two batches of 8, whole or in parts, which are compiled, and one of 6, which is not."""
    for accumulation in (1, 2):
        states = []
        for compiled in (False, True):
            module = member(epochs=3, accumulation=accumulation, compiled=compiled, optimizer="sgd")
            loader: DataLoader = DataLoader(Positions(), sampler=ShuffledBatches(22, 8, seed=0), batch_size=None)
            with compiling(compiled):
                fit(module, loader, 3)
            states.append(module.network.state_dict())
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_member_learns() -> None:
    """Colours that tell the class are learnt in a few epochs, the curve says so."""
    labels = torch.arange(4).repeat(6)
    module = member(labels=labels, epochs=12, lr=0.05, crop="none")
    module._pixels = (labels * 60).to(torch.uint8).view(-1, 1, 1, 1).expand(24, 3, SIZE, SIZE).contiguous()
    fit(module, member_loader(), 12)
    assert module.curve[-1]["train_loss"] < 0.2 < module.curve[0]["train_loss"]
    assert [row["epoch"] for row in module.curve] == list(range(1, 13))


def test_a_member_in_half_precision_learns_with_full_parameters(tmp_path: Path) -> None:
    half = "engine.precision_members=bf16"
    plain, other = (tiny_context(tmp_path / name, *more) for name, more in (("a", []), ("b", [half])))
    made = [make_member(context, "resnet18") for context in (plain, other)]
    assert "precision" not in made[0].manifest["identity"]
    assert made[1].manifest["identity"]["precision"] == "bf16"
    weights = [load_file(artifact.path / "weights.safetensors") for artifact in made]
    for name, one in weights[0].items():
        assert weights[1][name].dtype == one.dtype
    first = next(name for name, one in weights[0].items() if one.ndim == 4)
    assert not torch.equal(weights[0][first], weights[1][first])
    assert float(torch.cosine_similarity(weights[1][first].flatten(), weights[0][first].flatten(), dim=0)) > 0.95


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_one_cycle_keeps_the_momentum_of_the_recipe(name: str) -> None:
    module = member(schedule="onecycle", optimizer=name, momentum=0.8, epochs=2)
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    seen = []
    module.on_train_batch_end = lambda *arguments: seen.append(  # type: ignore[method-assign]
        [group["momentum"] for group in module.optimizers(use_pl_optimizer=False).param_groups]  # type: ignore[union-attr]
    )
    fit(module, member_loader(), 2)
    assert seen == [[0.8] * (1 if name == "sgd" else 2)] * 6
    assert not any(torch.equal(value, before[key]) for key, value in module.network.state_dict().items())


def test_one_cycle_ends_with_the_last_step() -> None:
    """A member's rate rises from a 25th of the recipe's and falls to a ten-thousandth of that."""
    module, rates = member(schedule="onecycle", epochs=4), list[float]()
    module.on_before_optimizer_step = lambda optimizer: rates.append(  # type: ignore[method-assign]
        optimizer.param_groups[0]["lr"]
    )
    fit(module, member_loader(), 4)
    assert len(rates) == 4 * 3
    assert rates[0] == pytest.approx(0.01 / 25)
    assert rates[-1] == pytest.approx(0.01 / 25 / 1e4)


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


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW"), ("muon", "Muon")])
def test_optimisers_of_a_recipe(name: str, kind: str) -> None:
    own = {"momentum": 0.8} if name in ("sgd", "muon") else {}
    optimizer = member(optimizer=name, weight_decay=0.03, **own).configure_optimizers()["optimizer"]
    assert type(optimizer).__name__ == kind
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.03
        assert group.get("momentum") == own.get("momentum")


def test_every_batch_of_every_epoch_is_augmented_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, ...]] = []

    def noting(pixels: Tensor, chosen: RecipeConfig, size: int, drawn: Augmentation) -> Tensor:
        shown.append(tuple(drawn.boxes.flatten().tolist()))
        return apply_augmentation(pixels, chosen, size, drawn)

    monkeypatch.setattr(cvdd.training.member, "apply_augmentation", noting)
    fit(member(crop="resized"), member_loader(), 2)
    assert len(set(shown)) == len(shown) == 6


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


@pytest.mark.parametrize("crop", ["pad", "none"])
def test_a_member_sees_images_in_files_at_the_side_of_the_data(tmp_path: Path, crop: str) -> None:
    """These files have that side, so that the member is the one of the same images in memory."""
    settings = ("dataset.image_size=16", "dataset.digits.size_range=[8,16]", "dataset.digits.crop_range=[16,64]")
    overrides = (*settings, f"recipe.crop={crop}", "recipe.epochs=1", "trainer.workers=0")
    in_memory = tiny_context(tmp_path, *overrides, store=tmp_path / "memory")
    in_files = as_files(tmp_path, tiny_context(tmp_path, *overrides, store=tmp_path / "files"))
    one, other = (make_member(context, "resnet18") for context in (in_memory, in_files))
    assert one.manifest["files"] == other.manifest["files"]


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


def test_a_member_tells_what_it_knows_of_training_images_and_of_test_images(tmp_path: Path) -> None:
    context, network = tiny_context(tmp_path), small_network(classes=10)
    data = context.data()
    metrics = _finish(context, network, [], tmp_path)
    for part, source in (("train", data.train), ("test", data.test)):
        logits = network(normalise(source.stacked(), data.mean, data.std))
        right = (logits.argmax(dim=1) == source.labels).float().mean()
        assert metrics[f"{part}_top1"] == pytest.approx(100 * right.item())
        loss = nn.functional.cross_entropy(logits, source.labels)
        assert metrics[f"{part}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["train_loss"] != metrics["test_loss"]
