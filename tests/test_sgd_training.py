"""Training by SGD with DSA, step by step, and what trajectory matching tells it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import fit, training_arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.training.classifier import Positions, ShuffledBatches
from cvdd.training.sgd_training import SgdModule, SgdRecipe

RATE, MOMENTUM, DECAY = 0.01, 0.5, 0.3


class Noting:
    """An augmentation that adds one, and notes where its draws come from."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, images: Tensor, source: torch.Generator) -> Tensor:
        self.seeds.append(source.initial_seed())
        return images + 1


def trained(images: Tensor, augment: Noting, epochs: int, batch: int = 1, **changes: Any) -> float:
    """Train one weight from 1 to predict 1 from each image and return it; the network sees twice the image."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    sgd = SgdRecipe(epochs, RATE, MOMENTUM, DECAY, drop=False)
    targets, loss = torch.ones(len(images), 1), nn.functional.mse_loss
    shared = training_arguments(network)
    module = SgdModule(sgd, images, targets, lambda shown: 2 * shown, loss, augment, **changes, **shared)
    sampler = ShuffledBatches(len(images), batch, seed=0, least=1)
    fit(module, DataLoader(Positions(), sampler=sampler, batch_size=None), epochs)
    return network.weight.item()


@pytest.mark.parametrize("forgets_at", [None, 1])
def test_steps_are_those_of_sgd_by_hand(forgets_at: int | None) -> None:
    """An image of 1 is shown as 2 and augmented to 3: the loss (3 w - 1)^2 has the slope 6 (3 w - 1)."""
    w = 1.0
    first = 6 * (3 * w - 1) + DECAY * w
    w -= RATE * first
    second = 6 * (3 * w - 1) + DECAY * w + (MOMENTUM * first if forgets_at is None else 0.0)
    w -= RATE * second
    assert trained(torch.ones(1, 1), Noting(), 2, forgets_at=forgets_at) == pytest.approx(w, abs=1e-6)


def test_every_step_has_draws_of_its_own() -> None:
    augment = Noting()
    trained(torch.ones(6, 1), augment, 2, batch=2)
    assert len(augment.seeds) == len(set(augment.seeds)) == 6
