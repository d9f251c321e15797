"""The maths of adversarial prediction matching (specification of APM, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


def is_refresh(iteration: int, gap: int) -> bool:
    """Whether a new surrogate is trained in an iteration: in every ``gap + 1``-th, as released."""
    return iteration % (gap + 1) == 0


def snapshot_epochs(epochs: int, snapshots: int) -> tuple[int, ...]:
    """Epochs, counted from 0, after which a surrogate is copied: exactly ``snapshots`` of them, the last included.

    With 251 epochs and 5 snapshots 50, 100, 150, 200 and 250. The released loop copies more often than it was asked to
    where the epochs cannot be divided, and divides by zero where there are fewer epochs than snapshots.
    """
    step = (epochs - 1) // snapshots
    return (*(step * k for k in range(1, snapshots)), epochs - 1)


def logit_distance(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of two batches of logits [n, classes], over samples and classes."""
    return (logits - targets).abs().mean()


class Snapshots:
    """States of one network, as a batch of networks.

    Args:
        network: the architecture, in evaluation mode; its own state is not used.
        states: by name of the parameter or buffer, [snapshots, ...].
    """

    def __init__(self, network: nn.Module, states: Mapping[str, Tensor]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.states = dict(states)

    def __len__(self) -> int:
        return len(next(iter(self.states.values())))

    def logits(self, images: Tensor, at_once: bool) -> Iterator[Tensor]:
        """Yield the logits of all snapshots [snapshots, n, classes] at once, or of one after another [1, n, classes].

        One after another the graph of a snapshot is freed before the next is made.
        """
        if at_once:
            yield vmap(self._call, in_dims=(0, None))(self.states, images)
            return
        for index in range(len(self)):
            yield self._call({name: state[index] for name, state in self.states.items()}, images)[None]

    def _call(self, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.network, dict(state), (images,))
        return logits


@dataclass(frozen=True)
class ImageTerms:
    """What a chunk contributes to the images' loss.

    Attributes:
        discrepancy: scalar, sum over snapshots of the mean absolute difference of logits.
        ce: scalar, the teacher's cross-entropy.
    """

    discrepancy: Tensor
    ce: Tensor

    def __add__(self, other: ImageTerms) -> ImageTerms:
        return ImageTerms(self.discrepancy + other.discrepancy, self.ce + other.ce)

    def loss(self, discrepancy: float, ce: float) -> Tensor:
        """The loss that the images descend: the disagreement enters it with a minus, so it is climbed."""
        return ce * self.ce - discrepancy * self.discrepancy


def image_gradient(
    images: Tensor,
    targets: Tensor,
    teacher: nn.Module,
    snapshots: Snapshots,
    *,
    discrepancy: float,
    ce: float,
    batch: int | None = None,
    at_once: bool = False,
) -> tuple[Tensor, ImageTerms]:
    """Gradient of ``ce * CE(T(X), y) - discrepancy * sum_k mean |s_k(X) - T(X)|`` with respect to a chunk X.

    The loss is a mean over the batch, so the chunks' contributions add up to the whole batch's gradient and terms,
    whatever the chunks are. It flows through the teacher as well, in a single backward pass of it.

    Args:
        images: [n, channels, h, w], a chunk of the batch.
        targets: [n] classes.
        teacher: frozen, in evaluation mode.
        snapshots: of the surrogate.
        discrepancy: weight of the disagreement.
        ce: weight of the teacher's cross-entropy.
        batch: images of the whole batch; None if the chunk is all of it.
        at_once: show the images to all snapshots in one forward pass.

    Returns:
        the gradient [n, channels, h, w] and the chunk's terms.
    """
    batch = len(images) if batch is None else batch
    # The chunk is a leaf of its own: a gradient of the whole set for every chunk is what made the release large.
    leaf = images.detach().requires_grad_()
    taught = teacher(leaf)
    # Each snapshot's graph ends at these logits and is gone before the next; the teacher is walked back once.
    logits = taught.detach().requires_grad_()
    gradient, pull = torch.zeros_like(leaf), torch.zeros_like(logits)
    total = torch.zeros((), dtype=logits.dtype, device=logits.device)
    for seen in snapshots.logits(leaf, at_once):
        distance = (seen - logits).abs().mean(dim=2).sum() / batch
        of_images, of_logits = torch.autograd.grad(-discrepancy * distance, (leaf, logits))
        gradient += of_images
        pull += of_logits
        total += distance.detach()
    entropy = nn.functional.cross_entropy(logits, targets, reduction="sum") / batch
    pull += torch.autograd.grad(ce * entropy, logits)[0]
    gradient += torch.autograd.grad(taught, leaf, pull)[0]
    return gradient, ImageTerms(total, entropy.detach())


def chunked_gradient(
    images: Tensor,
    targets: Tensor,
    teacher: nn.Module,
    snapshots: Snapshots,
    *,
    discrepancy: float,
    ce: float,
    chunk: int | None = None,
    at_once: bool = False,
) -> tuple[Tensor, ImageTerms]:
    """The gradient of :func:`image_gradient` for a whole batch, with at most ``chunk`` images in memory at once."""
    size = chunk or len(images)
    parts, terms = [], []
    for some, classes in zip(images.split(size), targets.split(size), strict=True):
        gradient, contribution = image_gradient(
            some, classes, teacher, snapshots, discrepancy=discrepancy, ce=ce, batch=len(images), at_once=at_once
        )
        parts.append(gradient)
        terms.append(contribution)
    return torch.cat(parts), sum(terms[1:], terms[0])
