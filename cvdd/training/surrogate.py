"""Students that live for a moment inside another optimisation: trained by SGD, without Lightning around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvdd.backbones import has_batchnorm
from cvdd.methods.apm import logit_distance, snapshot_epochs
from cvdd.schema.apm import SgdConfig, SurrogateConfig
from cvdd.support.config_base import ConfigError

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""From images [n, c, h, w] and a source of randomness to augmented images of the same shape."""

Loss = Callable[[Tensor, Tensor], Tensor]


def train_by_sgd(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Loss,
    config: SgdConfig,
    augment: Augment,
    source: torch.Generator,
    after_epoch: Callable[[int], None] | None = None,
) -> Tensor:
    """Train a network in place.

    Args:
        network: on the device of the images.
        images: [n, c, h, w].
        targets: [n, ...], whatever the loss takes.
        loss: of the network's logits and the targets.
        config: batches, learning rate and its drop.
        augment: of the images; the targets stay those of the image as it is.
        source: of the order and of the augmentation.
        after_epoch: called with the number of each epoch, counted from 0.

    Returns:
        the mean loss of the last epoch, a scalar.
    """
    network.train().requires_grad_(True)
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    losses: list[Tensor] = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr_at(epoch)
        losses = []
        order = torch.randperm(len(images), generator=source).to(images.device)
        for batch in order.split(config.batch_size):
            value = loss(network(augment(images[batch], source)), targets[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        if after_epoch is not None:
            after_epoch(epoch)
    return torch.stack(losses).mean()


def fit_surrogate(
    network: nn.Module,
    images: Tensor,
    logits: Tensor,
    config: SurrogateConfig,
    augment: Augment,
    source: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train a fresh student to predict a teacher's logits (specification of APM, section 3, B2).

    Args:
        network: from its initialisation; trained in place.
        images: [n, c, h, w] synthetic images.
        logits: [n, classes] of the teacher for the images without augmentation.
        config: training and snapshots.
        augment: of the student's images.
        source: of the order and of the augmentation.

    Returns:
        its states, by name [snapshots, ...], and the mean loss of the last epoch, a scalar.
    """
    epochs = snapshot_epochs(config.epochs, config.snapshots)
    taken: list[dict[str, Tensor]] = []

    def copy_state(epoch: int) -> None:
        if epoch in epochs:
            # A state dictionary shares memory with the network, which is trained on.
            taken.append({name: value.clone() for name, value in network.state_dict().items()})

    loss = train_by_sgd(network, images.detach(), logits, logit_distance, config, augment, source, copy_state)
    return {name: torch.stack([state[name] for state in taken]) for name in taken[0]}, loss


def require_batches(network: nn.Module, images: int, batch_size: int, field: str) -> None:
    """Refuse batches of one image for a network with BatchNorm, which cannot normalise them.

    Raises:
        ConfigError: the last batch has one image.
    """
    if has_batchnorm(network) and (batch_size == 1 or images % batch_size == 1):
        larger = next((size for size in range(batch_size + 1, images + 1) if images % size != 1), None)
        instead = "more images" if larger is None else str(larger)
        raise ConfigError(
            f"{field}={batch_size} leaves a last batch of one of {images} images, too few for BatchNorm layers. Choose "
            f"{instead}, or a network without them (method.apm.teachers.backbone.arguments.norm=instance)"
        )
