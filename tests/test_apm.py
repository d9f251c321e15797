"""Adversarial prediction matching: maths, module and configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_network
from pydantic import ValidationError
from torch import Tensor, nn

from cvdd.artifact import Store
from cvdd.chain.context import Context
from cvdd.methods.apm import (
    Snapshots,
    chunked_gradient,
    image_gradient,
    is_refresh,
    logit_distance,
    snapshot_epochs,
)
from cvdd.schema import MethodConfig
from cvdd.schema.apm import ApmConfig, SgdConfig, SurrogateConfig
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.adversarial import AdversarialModule, ImageSgd, NonFiniteImages, Pace, teacher_logits
from cvdd.training.surrogate import fit_surrogate, require_batches, train_by_sgd

BACKBONE = {"name": "convnet3", "target": "cvdd.backbones.convnet.convnet"}


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_network(seed: int, classes: int = 4) -> nn.Module:
    """In double precision, without kinks, so that finite differences are exact enough."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(20, classes))
    return network.double().eval().requires_grad_(False)


def stacked(networks: list[nn.Module]) -> dict[str, Tensor]:
    states = [network.state_dict() for network in networks]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def plain(images: Tensor, random: torch.Generator) -> Tensor:
    return images


STUDENTS = [smooth_network(seed) for seed in (1, 2, 3)]
TEACHER = smooth_network(0)
X = torch.randn(7, 3, 4, 4, dtype=torch.float64, generator=source())
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def snapshots() -> Snapshots:
    return Snapshots(copy.deepcopy(TEACHER), stacked(STUDENTS))


def loss_by_hand(images: Tensor, discrepancy: float, ce: float) -> float:
    """The formula of the specification, image by image and class by class."""
    total = 0.0
    for image, label in zip(images, Y.tolist(), strict=True):
        taught = TEACHER(image[None])[0]
        for student in STUDENTS:
            seen = student(image[None])[0]
            total -= discrepancy * sum(abs(float(a) - float(b)) for a, b in zip(seen, taught, strict=True)) / 28
        total -= ce * float(taught.softmax(dim=0)[label].log()) / 7
    return total


# --- maths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("discrepancy", "ce"), [(1.0, 0.1), (0.0, 1.0), (-0.5, 0.0)])
def test_the_images_gradient_is_that_of_finite_differences(discrepancy: float, ce: float) -> None:
    gradient, terms = image_gradient(X, Y, TEACHER, snapshots(), discrepancy=discrepancy, ce=ce)
    assert float(terms.loss(discrepancy, ce)) == pytest.approx(loss_by_hand(X, discrepancy, ce), abs=1e-12)
    for place in [(0, 0, 0, 0), (1, 2, 3, 3), (4, 1, 2, 1), (6, 0, 1, 2)]:
        step = torch.zeros_like(X)
        step[place] = 1e-6
        slope = (loss_by_hand(X + step, discrepancy, ce) - loss_by_hand(X - step, discrepancy, ce)) / 2e-6
        assert float(gradient[place]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
@pytest.mark.parametrize("at_once", [False, True])
def test_any_chunk_gives_the_same_gradient(chunk: int, at_once: bool) -> None:
    """Six of seven leaves a chunk of a single image, on which the release fails."""
    whole, terms = chunked_gradient(X, Y, TEACHER, snapshots(), discrepancy=1.0, ce=0.1)
    parts, summed = chunked_gradient(X, Y, TEACHER, snapshots(), discrepancy=1.0, ce=0.1, chunk=chunk, at_once=at_once)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(summed.discrepancy, terms.discrepancy, rtol=0, atol=1e-14)
    torch.testing.assert_close(summed.ce, terms.ce, rtol=0, atol=1e-14)


def test_the_step_climbs_the_disagreement() -> None:
    gradient, before = image_gradient(X, Y, TEACHER, snapshots(), discrepancy=1.0, ce=0.0)
    _, after = image_gradient(X - 0.1 * gradient, Y, TEACHER, snapshots(), discrepancy=1.0, ce=0.0)
    assert float(after.discrepancy) > float(before.discrepancy)


def test_students_that_agree_with_the_teacher_leave_the_images_alone() -> None:
    same = Snapshots(copy.deepcopy(TEACHER), stacked([TEACHER, TEACHER]))
    gradient, terms = image_gradient(X, Y, TEACHER, same, discrepancy=1.0, ce=0.0)
    assert float(terms.discrepancy) == 0
    assert float(gradient.abs().max()) == 0


def test_neither_weights_nor_images_keep_a_graph() -> None:
    logits = teacher_logits(TEACHER, X.clone().requires_grad_(), 3)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, TEACHER(X), rtol=0, atol=1e-14)
    gradient, _ = image_gradient(X, Y, TEACHER, snapshots(), discrepancy=1.0, ce=0.1)
    assert not gradient.requires_grad
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_schedules_are_those_of_the_release() -> None:
    assert [it for it in range(10) if is_refresh(it, 2)] == [0, 3, 6, 9]
    assert sum(is_refresh(it, 2) for it in range(2501)) == 834
    assert [it for it in range(4) if is_refresh(it, 0)] == [0, 1, 2, 3]
    assert snapshot_epochs(251, 5) == (50, 100, 150, 200, 250)
    # Where the release takes six snapshots, or divides by zero.
    assert snapshot_epochs(13, 5) == (2, 4, 6, 8, 12)
    assert snapshot_epochs(1, 1) == (0,)
    surrogate = SurrogateConfig(epochs=251, lr=0.02)
    assert [surrogate.lr_at(epoch) for epoch in (0, 125, 126, 250)] == pytest.approx([0.02, 0.02, 0.002, 0.002])
    teacher = SgdConfig(epochs=100, lr=0.05, milestone=50)
    assert [teacher.lr_at(epoch) for epoch in (49, 50)] == pytest.approx([0.05, 0.005])


def test_logits_are_held_apart_by_their_mean_absolute_difference() -> None:
    assert float(logit_distance(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.zeros(2, 2))) == pytest.approx(1.5)


# --- students that live for a moment ----------------------------------------------------------------------------------


def test_training_steps_are_those_of_sgd_by_hand() -> None:
    """One weight from w = 1, loss (2 w - 1)^2 with gradient 4 (2 w - 1), and 0.5 w of decay."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    config = SgdConfig(epochs=3, batch_size=4, lr=0.1, momentum=0.5, weight_decay=0.5, milestone=2, factor=0.1)
    train_by_sgd(network, torch.tensor([[2.0]]), torch.tensor([[1.0]]), nn.functional.mse_loss, config, plain, source())
    first = 4 * (2 * 1.0 - 1) + 0.5 * 1.0
    w = 1.0 - 0.1 * first
    velocity = 0.5 * first + 4 * (2 * w - 1) + 0.5 * w
    w -= 0.1 * velocity
    velocity = 0.5 * velocity + 4 * (2 * w - 1) + 0.5 * w
    assert network.weight.item() == pytest.approx(w - 0.01 * velocity, abs=1e-6)


def test_the_loss_of_a_training_is_the_mean_over_its_last_epoch() -> None:
    """A rate so small that nothing moves; batches of two, two and one."""
    network, images, targets = nn.Linear(1, 1), torch.arange(5.0)[:, None], torch.zeros(5, 1)
    config = SgdConfig(epochs=2, batch_size=2, lr=1e-30)
    order = torch.Generator().manual_seed(4)
    torch.randperm(5, generator=order)
    batches = torch.randperm(5, generator=order).split(2)
    found = train_by_sgd(network, images, targets, nn.functional.mse_loss, config, plain, source(4))
    losses = [network(images[batch]).square().mean().item() for batch in batches]
    assert float(found) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_snapshots_are_copies_of_the_students_way() -> None:
    images, logits = torch.randn(6, 3, 8, 8, generator=source()), torch.randn(6, 4, generator=source(1))
    config = SurrogateConfig(epochs=7, lr=0.05, batch_size=4, snapshots=3)
    network = small_network(seed=5)
    states, loss = fit_surrogate(network, images, logits, config, plain, source(2))
    shorter = small_network(seed=5)
    upto = SgdConfig(epochs=3, lr=0.05, batch_size=4, milestone=2, factor=1.0)
    train_by_sgd(shorter, images, logits, logit_distance, upto, plain, source(2))
    for name, value in network.state_dict().items():
        assert len(states[name]) == 3
        assert torch.equal(states[name][0], shorter.state_dict()[name]), name
        assert torch.equal(states[name][2], value), name
    weights = states["0.weight"]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert float(loss) > 0


def test_batches_of_one_are_refused_only_where_they_are_too_few() -> None:
    with pytest.raises(ConfigError, match=r"surrogate\.batch_size=4 leaves a last batch of one of 9 images.*Choose 5"):
        require_batches(small_network(), 9, 4, "method.apm.surrogate.batch_size")
    # Four would leave one of thirteen as well.
    with pytest.raises(ConfigError, match=r"Choose 5,"):
        require_batches(small_network(), 13, 3, "method.apm.surrogate.batch_size")
    with pytest.raises(ConfigError, match=r"batch_size=1 leaves .* Choose 2,"):
        require_batches(small_network(), 8, 1, "method.apm.surrogate.batch_size")
    with pytest.raises(ConfigError, match="Choose more images"):
        require_batches(small_network(), 1, 4, "method.apm.surrogate.batch_size")
    require_batches(small_network(), 8, 4, "method.apm.surrogate.batch_size")
    require_batches(smooth_network(0), 9, 4, "method.apm.surrogate.batch_size")


# --- the images' optimiser and module ---------------------------------------------------------------------------------


def moved(drift: bool) -> list[list[float]]:
    images = nn.Parameter(torch.zeros(2, 1))
    optimizer = ImageSgd(images, 1.0, 0.5, drift)
    places = []
    for index in (0, 1, 0):
        optimizer.move(torch.tensor([index]), torch.tensor([[1.0]]))
        places.append(images.flatten().tolist())
    return places


def test_momentum_moves_images_without_a_gradient_as_released_or_not() -> None:
    assert moved(drift=True) == [[-1.0, 0.0], [-1.5, -1.0], [-2.75, -1.5]]
    assert moved(drift=False) == [[-1.0, 0.0], [-1.0, -1.0], [-2.5, -1.0]]


def apm_config(**changes: Any) -> ApmConfig:
    fields = {
        "teachers": {"backbone": BACKBONE, "count": 2, "epochs": 1, "lr": 0.1},
        "surrogate": {"epochs": 4, "lr": 0.05, "snapshots": 2, "batch_size": 4},
        "student": {"epochs": 2, "lr": 0.1},
        "lr_images": 1.0,
    }
    return ApmConfig.model_validate(fields | changes)


def module_of(pace: Pace, augment: Any = plain, **changes: Any) -> AdversarialModule:
    images = torch.randn(8, 3, 8, 8, generator=source())
    return AdversarialModule(
        images,
        torch.arange(8) % 4,
        [small_network(seed=1), small_network(seed=2)],
        lambda seed: small_network(seed=seed % 1000),
        augment,
        apm_config(**changes),
        pace,
        3,
        lambda row, current: None,
    )


def fit(module: AdversarialModule, tmp_path: Path) -> AdversarialModule:
    context = Context(None, Store(tmp_path), torch.device("cpu"))  # type: ignore[arg-type]
    context.fit(module, None, module.epochs, tmp_path / "images.ckpt.tmp")
    return module


def test_only_surrogates_see_augmented_images(tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(images: Tensor, random: torch.Generator) -> Tensor:
        calls.append(len(images))
        return images

    module = fit(module_of(Pace(5, 5, 5), counting, batch_size=6), tmp_path)
    # Refreshes in iterations 0 and 3, four epochs each, six images in batches of four.
    assert calls == [4, 2] * 8
    assert [row.iteration for row in module.rows] == [5]


@pytest.mark.parametrize(("gap", "students"), [(0, 5), (1, 3), (3, 2)])
def test_students_come_as_often_as_the_gap_allows(gap: int, students: int, tmp_path: Path) -> None:
    seeds: list[int] = []

    def noting(seed: int) -> nn.Module:
        seeds.append(seed)
        return small_network(seed=seed % 1000)

    module = module_of(Pace(5, 5, 5), surrogate={"epochs": 2, "lr": 0.05, "snapshots": 1, "gap": gap})
    module._new_student = noting
    fit(module, tmp_path)
    assert len(set(seeds)) == len(seeds) == students


def test_dropout_of_surrogates_depends_on_the_iteration_alone() -> None:
    """Not on what was drawn before, as where teachers were trained in the same process, nor on an interruption."""
    states = []
    for before in (0, 1):
        torch.manual_seed(before)
        module = module_of(Pace(1, 1, 1))
        module._new_student = lambda seed: small_network(seed=seed % 1000, dropout=0.5)
        untouched = torch.get_rng_state()
        module._refresh(0, torch.arange(8))
        assert torch.equal(torch.get_rng_state(), untouched)
        states.append(module._fit)
    assert states[0] == states[1]


def test_learning_rate_of_the_images_falls_in_the_middle() -> None:
    module = module_of(Pace(2501, 1, 1))
    assert [module.lr_at(iteration) for iteration in (0, 1249, 1250, 2500)] == pytest.approx([1.0, 1.0, 0.3, 0.3])


def test_batches_are_drawn_anew_in_every_iteration() -> None:
    module = module_of(Pace(5, 5, 5), batch_size=3)
    drawn = [module.batch(iteration).tolist() for iteration in range(20)]
    assert all(len(set(batch)) == 3 for batch in drawn)
    assert len({tuple(sorted(batch)) for batch in drawn}) > 5
    assert module.batch(4).tolist() == drawn[4]


class Steep(nn.Module):
    """Finite logits whose gradient is not: the square root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network(seed=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + (images.flatten(1)[:, :4] * 0).sqrt()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = module_of(Pace(2, 1, 2))
    module._teachers = (Steep(),)
    message = (
        r"images are not finite after iteration 1, though .*last checkpoint are kept\. Lower method\.apm\.lr_images"
    )
    with pytest.raises(NonFiniteImages, match=message):
        fit(module, tmp_path)


def test_students_that_diverge_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteImages, match=r"student of iteration 1 is .* Lower method\.apm\.surrogate\.lr"):
        fit(module_of(Pace(6, 1, 6), surrogate={"epochs": 9, "lr": 1e30}), tmp_path)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4, "chunk": 5}, "method.apm.chunk=5 is larger than method.apm.batch_size=4"),
        ({"parts": 2, "first_part": 2}, "method.apm.first_part=2: choose 0 to 1"),
        ({"augmentations": ["crop", "crop"]}, "repeats a family"),
        ({"discrepancy": 0.0, "ce": 0.0}, "leave nothing to optimise"),
        ({"momentum": 0.0, "momentum_drift": False}, "method.apm.momentum_drift=false is of"),
        ({"whitening": False, "whitening_eps": 0.2}, "method.apm.whitening_eps is of method.apm.whitening"),
        ({"surrogate": {"epochs": 5, "lr": 0.1}}, "method.apm.surrogate.epochs=5; choose 1 to 4 snapshots"),
        (
            {"student": {"epochs": 5, "lr": 0.1, "milestone": 5}},
            "method.apm.student.milestone=5.*choose 1 to 4, or null",
        ),
        (
            {"teachers": {"backbone": BACKBONE, "count": 2, "epochs": 1, "lr": 0.1, "paths": ["a"]}},
            "method.apm.teachers.count=2; set it to 1",
        ),
    ],
)
def test_contradictions_are_answered_with_what_to_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        apm_config(**changes)


def test_a_setting_of_no_whitening_is_told_by_its_default() -> None:
    class Other(ApmConfig):
        whitening_eps: float = 0.2

    settings = apm_config().model_dump(exclude={"whitening_eps"}) | {"whitening": False}
    assert Other.model_validate(settings).whitening_eps == 0.2
    with pytest.raises(ValidationError, match="method.apm.whitening_eps is of"):
        Other.model_validate({**settings, "whitening_eps": 0.1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, "method.lr is of the recover loop.*leave it at 0.25"),
        ({"init": "all"}, "method.init=all"),
        ({"init": "herding"}, "method.init=herding: prediction matching starts from real, patches or noise"),
    ],
)
def test_settings_of_the_recover_loop_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"name": "a", "seed": 0, "init": "real", "iterations": 0, "jitter": 0, "classes_per_unit": 1}
    with pytest.raises(ValidationError, match=message):
        MethodConfig.model_validate({**fields, "apm": apm_config().model_dump(), **changes})
