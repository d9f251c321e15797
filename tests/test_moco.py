"""A step of a training without labels, held against the release's, and the networks that it makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import MEAN, STD, random_pixels, small_network
from torch import Tensor, nn

from cvdd.augmentation.augment import draw_views, normalise
from cvdd.augmentation.colours import draw_colours
from cvdd.schema.moco import MocoConfig
from cvdd.support.seeds import generator
from cvdd.training.measure import Accuracy
from cvdd.training.moco import MocoModule, apply_view, draw_view, follow, only_probed, with_projection
from cvdd.training.muon import matrices_and_others

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 12,
    "groups": 2,
    "lr": 0.05,
    "dimension": 5,
    "queue": 30,
    "key_momentum": 0.9,
}


def module_of(count: int = 24, dropout: float = 0.0, **changes: Any) -> MocoModule:
    config = MocoConfig(**{**SETTINGS, **changes})
    network = small_network(classes=config.dimension, dropout=dropout).train().requires_grad_(True)
    with_projection(network, 3)
    return MocoModule(
        config,
        True,
        random_pixels(count),
        MEAN,
        STD,
        16,
        network=network,
        name="it",
        seed=7,
        measure=lambda network: Accuracy(0.0, 0.0, 0.0),
        measured_at=lambda epoch: False,
        on_epoch=lambda epoch, row: None,
    )


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def plain_step(module: MocoModule, indices: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and keys as the release writes them, a group after the other, of the module's own draws."""
    config, network, behind = module.config, copy.deepcopy(module.network), copy.deepcopy(module.key_network)
    assert module._pixels is not None
    pixels = module._pixels[indices]
    source = generator(7, "views", 0, 0)
    seen, held = (draw_view(config, True, len(pixels), 16, 16, source) for _ in range(2))
    order = torch.randperm(len(pixels), generator=source)
    for mine, theirs in zip(behind.parameters(), network.parameters(), strict=True):
        mine.data = mine.data * config.key_momentum + theirs.data * (1 - config.key_momentum)
    keys = torch.zeros(len(pixels), config.dimension)
    with torch.no_grad():
        for group in order.chunk(config.groups):
            shown = normalise(apply_view(pixels, 16, held)[group], MEAN, STD)
            keys[group] = unit(behind(shown))
    losses = []
    for group in torch.arange(len(pixels)).chunk(config.groups):
        found = unit(network(normalise(apply_view(pixels, 16, seen)[group], MEAN, STD)))
        logits = torch.cat([(found * keys[group]).sum(1)[:, None], found @ module.queue], dim=1) / config.temperature
        losses.append(-logits.log_softmax(dim=1)[:, 0])
    loss = torch.cat(losses).mean()
    return loss, list(torch.autograd.grad(loss, list(network.parameters()))), keys


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_step_is_the_releases(groups: int) -> None:
    module, indices = module_of(groups=groups), torch.arange(12) * 2
    # Both are normalised by their own groups' statistics.
    assert all(part.training for part in (*module.network.modules(), *module.key_network.modules()))
    for parameter in module.network.parameters():
        # Away from the second network, as later in a training.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    waiting = module.queue.clone()
    expected, gradients, keys = plain_step(module, indices)
    loss = module.training_step(indices, 0)
    torch.testing.assert_close(loss, expected)
    module.backward(loss)
    for parameter, gradient in zip(module.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(module.queue[:, :12], keys.T)
    assert torch.equal(module.queue[:, 12:], waiting[:, 12:])
    assert int(module.place) == 12
    assert all(parameter.grad is None for parameter in module.key_network.parameters())


def test_keys_are_normalised_in_other_groups_than_views() -> None:
    """With statistics of one group, the order in which keys are computed would be seen in none of them."""
    module, indices = module_of(groups=2), torch.arange(12)
    seen: list[Tensor] = []
    module.key_network.register_forward_pre_hook(lambda network, given: seen.append(given[0].clone()))
    module.training_step(indices, 0)
    assert [len(shown) for shown in seen] == [6, 6]
    held = torch.cat(seen)
    module._pixels = module._pixels[torch.arange(24)] if module._pixels is not None else None
    source = generator(7, "views", 0, 0)
    draw_view(module.config, True, 12, 16, 16, source)
    drawn = draw_view(module.config, True, 12, 16, 16, source)
    order = torch.randperm(12, generator=source)
    assert not torch.equal(order.sort().values[:6], order[:6].sort().values)
    assert module._pixels is not None
    torch.testing.assert_close(held, normalise(apply_view(module._pixels[indices], 16, drawn), MEAN, STD)[order])


def test_dropout_draws_for_a_group_alike_whoever_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks that share a batch must: what a process drew before does not count."""
    module = module_of(dropout=0.5)
    seen: list[Tensor] = []
    module.key_network.register_forward_hook(lambda network, given, found: seen.append(found.clone()))
    start = copy.deepcopy(module.state_dict())
    module.training_step(torch.arange(12), 0)
    module.load_state_dict(start)
    # Drawn before, and the groups the other way round.
    torch.rand(3)
    monkeypatch.setattr(module, "own_parts", lambda count: [1, 0])
    module.training_step(torch.arange(12), 0)
    first, second, again_second, again_first = seen
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)


def test_another_epoch_has_other_views(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(epoch: int, batch: int) -> float:
        module = module_of()
        monkeypatch.setattr(MocoModule, "current_epoch", epoch)
        return module.training_step(torch.arange(12), batch).item()

    assert len({loss(epoch, batch) for epoch in range(2) for batch in range(2)}) == 4
    assert loss(1, 1) == loss(1, 1)


def test_running_statistics_move_as_far_as_by_one_batch() -> None:
    """By groups of equal statistics: as by a batch of them, but for the rounds in which they come."""
    module = module_of(groups=3)
    layer = module.network[1]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.momentum == pytest.approx(0.1 / 3)
    assert module.key_network[1].momentum == 0.1
    kept = (1 - layer.momentum) ** 3
    assert kept == pytest.approx(0.9, abs=0.005)


def test_views_are_drawn_as_they_are_set() -> None:
    config = MocoConfig(**{**SETTINGS, "crop_scale": (0.3, 0.5), "changes": (0.1, 0.2, 0.3, 0.05), "grey": 0.3})
    config = config.model_copy(update={"changed": 0.6, "blurred": 0.9})
    drawn = draw_view(config, True, 400, 16, 16, torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(0)
    views = draw_views(400, 16, 16, (0.3, 0.5), True, 0, source)
    colours = draw_colours(400, (0.1, 0.2, 0.3, 0.05), 0.6, 0.3, 0.9, source)
    assert torch.equal(drawn.boxes, views.boxes)
    assert torch.equal(drawn.flips, views.flips)
    assert 0.4 < drawn.flips.float().mean() < 0.6
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(drawn.colours, colours, strict=True))
    assert not draw_view(config, False, 400, 16, 16, source).flips.any()
    some = drawn.of(torch.tensor([5, 3]))
    assert torch.equal(some.boxes, drawn.boxes[[5, 3]])
    assert torch.equal(some.colours.sigmas, drawn.colours.sigmas[[5, 3]])


def test_sgd_with_a_cosine() -> None:
    module = module_of(epochs=4, momentum=0.7, weight_decay=0.02)
    configured: Any = module.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.7, 0.02, False)
    assert len(group["params"]) == len(list(module.network.parameters()))
    schedule = configured["lr_scheduler"]
    assert schedule["interval"] == "epoch"
    assert [schedule["scheduler"].lr_lambdas[0](epoch) for epoch in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])


def test_the_queue_goes_round() -> None:
    module = module_of()
    keys = unit(torch.randn(12, 5, generator=torch.Generator().manual_seed(2)))
    for _ in range(3):
        module._enqueue(keys)
    # 36 keys in 30 places: the last twelve begin at place 24 and go on at the beginning.
    torch.testing.assert_close(module.queue[:, 24:], keys[:6].T)
    torch.testing.assert_close(module.queue[:, :6], keys[6:].T)
    assert int(module.place) == 6


def test_the_second_network_follows_the_first() -> None:
    ahead, behind = small_network(seed=1), small_network(seed=2)
    before = [parameter.clone() for parameter in behind.parameters()]
    follow(behind, ahead, 0.75)
    for old, new, target in zip(before, behind.parameters(), ahead.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * target)


def test_a_projection_is_two_layers_in_the_place_of_the_last() -> None:
    network, again = small_network(classes=5), small_network(classes=5)
    name = with_projection(network, 3)
    hidden, rectifier, last = network.get_submodule(name).children()
    assert isinstance(hidden, nn.Linear)
    assert isinstance(rectifier, nn.ReLU)
    assert isinstance(last, nn.Linear)
    assert (hidden.in_features, hidden.out_features, last.in_features, last.out_features) == (12, 12, 12, 5)
    with_projection(again, 3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_a_probe_trains_the_last_layer_alone() -> None:
    network = small_network(dropout=0.5).train()
    head = only_probed(network)
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == [
        "9.weight",
        "9.bias",
    ]
    assert head is network[9]
    assert not any(module.training for module in network.modules())
    assert [len(group) for group in matrices_and_others(network)] == [1, 1]
