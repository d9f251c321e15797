"""The maths of trajectory matching: a network as a function of one vector, the student's steps, and their gradient.

The student starts at an expert's parameters and takes plain steps on the synthetic images; the squared distance to
where the expert was some epochs later, divided by the expert's own way, is differentiated with respect to the images,
the step size and the labels (specification of MTT, section 2.5).

Two ways give the same gradient. The first differentiates a graph of all steps at once. The second holds the graph of a
part of the steps at a time: it walks without any graph, keeps the parameters between parts, and carries the
loss's derivative with respect to them backwards. With parts of one step this is TESLA's constant memory, but with the
dependence of later parameters on the images, which TESLA's published program leaves out (section 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from cvdd.augmentation.dsa import SiameseAugmentation, augment, draw_augmentation
from cvdd.computing.graphs import draws_by_itself
from cvdd.support.config_base import ConfigError


class FlatNetwork:
    """A network as a function of one parameter vector.

    Args:
        network: without buffers and dropout, so that it is exactly its parameters. It is not trained.

    Raises:
        ConfigError: it has buffers (running statistics) or dropout.
    """

    def __init__(self, network: nn.Module) -> None:
        buffers = [name for name, _ in network.named_buffers()]
        if buffers:
            raise ConfigError(
                f"method.mtt.experts.backbone has buffers ({buffers[0]}), which a trajectory of parameters does not "
                "hold; use a network without running statistics, e.g. a ConvNet with "
                "method.mtt.experts.backbone.arguments.norm=instance"
            )
        if draws_by_itself(network):
            raise ConfigError(
                "method.mtt.experts.backbone has dropout or stochastic depth, under which a step cannot be repeated"
            )
        self.network = network
        parameters = dict(network.named_parameters())
        self._names = list(parameters)
        self._shapes = [parameter.shape for parameter in parameters.values()]
        self._sizes = [parameter.numel() for parameter in parameters.values()]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(self._sizes)

    def vector(self) -> Tensor:
        """Return a copy of the network's own parameters, [size].

        A copy even where all is on one device: a view would go on changing while the network is trained.
        """
        return torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()]).clone()

    def __call__(self, vector: Tensor, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, size, size] with the parameters ``vector`` [size]."""
        parts = [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]
        logits: Tensor = functional_call(self.network, dict(zip(self._names, parts, strict=True)), (images,))
        return logits


@dataclass(frozen=True)
class Step:
    """What one step of the student sees.

    Attributes:
        indices: [b] synthetic images of the batch.
        offsets: [samples, b, 2] where each canvas is cropped (row, column), or None for images that are seen whole.
        augmentation: of the batch.
    """

    indices: Tensor
    offsets: Tensor | None
    augmentation: SiameseAugmentation | None


def draw_batches(count: int, batch_size: int | None, steps: int, source: torch.Generator) -> list[Tensor]:
    """Draw the batches of the student's steps: random permutations cut into chunks, a new one when they are used up.

    As released the chunks are taken from the end, so that a short one comes first.
    """
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += reversed(torch.randperm(count, generator=source).split(batch_size or count))
    return batches[:steps]


def draw_step(
    indices: Tensor, families: Sequence[str], size: int, canvas: int, samples: int, source: torch.Generator
) -> Step:
    """Draw how a batch is seen.

    Args:
        indices: [b] of the batch.
        families: of DSA.
        size: side of what networks see, in pixels.
        canvas: side of an image in ``size``.
        samples: crops of each canvas.
        source: of randomness.
    """
    offsets = None
    if canvas > 1:
        offsets = torch.randint(0, canvas * size, (samples, len(indices), 2), generator=source)
    return Step(indices, offsets, draw_augmentation(families, samples * len(indices), size, source))


def seen(images: Tensor, targets: Tensor, step: Step, size: int) -> tuple[Tensor, Tensor]:
    """Return what the network sees of the set in one step, [b * samples, 3, size, size], and its targets.

    Args:
        images: [n, 3, side, side], all synthetic images or canvases.
        targets: [n, classes] probabilities.
        step: the batch, its crops and its augmentation.
        size: side of what networks see; canvases are toroidal.
    """
    indices = step.indices.to(images.device)
    batch, wanted = images[indices], targets[indices]
    if step.offsets is not None:
        samples = len(step.offsets)
        batch = torch.cat([_cropped(batch, offsets.to(images.device), size) for offsets in step.offsets])
        wanted = wanted.repeat(samples, 1)
    return augment(batch, step.augmentation), wanted


def _cropped(canvases: Tensor, offsets: Tensor, size: int) -> Tensor:
    side = canvases.shape[-1]
    place = torch.arange(size, device=canvases.device)[None]
    rows, columns = (place + offsets[:, :1]) % side, (place + offsets[:, 1:]) % side
    sample = torch.arange(len(canvases), device=canvases.device)[:, None, None]
    return canvases.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [n, classes] against probabilities [n, classes]; differentiable in both."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def class_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The same against class indices [n]."""
    return cross_entropy(logits, torch.nn.functional.one_hot(labels, logits.shape[1]).float())


@dataclass(frozen=True)
class Synthetic:
    """What is learned.

    Attributes:
        images: [n, 3, side, side], as networks see them.
        targets: [n, classes] probabilities.
        step_size: scalar.
    """

    images: Tensor
    targets: Tensor
    step_size: Tensor

    def leaves(self) -> Synthetic:
        """Return the same values, to be differentiated with respect to."""
        return Synthetic(*(tensor.detach().requires_grad_() for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, targets and step size."""
        return self.images, self.targets, self.step_size


@dataclass(frozen=True)
class Task:
    """What the student has to do in one iteration.

    Attributes:
        network: of expert and student.
        start: [p] the expert's parameters where the student begins.
        target: [p] the expert's parameters some epochs later.
        steps: what the student sees.
        size: side of what the network sees.
    """

    network: FlatNetwork
    start: Tensor
    target: Tensor
    steps: Sequence[Step]
    size: int

    def loss(self, end: Tensor) -> Tensor:
        """Squared distance of ``end`` [p] to the target, divided by that of the start to the target."""
        return (end - self.target).square().sum() / (self.start - self.target).square().sum()


@dataclass(frozen=True)
class Matched:
    """The matched loss of one iteration and its gradient.

    Attributes:
        loss: scalar; 1 for a student that ends where it starts.
        gradient: with respect to images, targets and step size, each of its shape.
    """

    loss: Tensor
    gradient: Synthetic

    def is_finite(self) -> bool:
        """Whether the loss and every entry of the gradient are finite."""
        return all(bool(part.isfinite().all()) for part in (self.loss, *self.gradient.tensors()))


def unroll(task: Task, synthetic: Synthetic, start: Tensor, steps: Sequence[Step]) -> Tensor:
    """Take steps of the student and return its parameters [p]; differentiable in all tensors.

    Args:
        task: the network and the side of what it sees.
        synthetic: the set.
        start: [p] parameters before.
        steps: what each step sees.
    """
    vector = start
    for step in steps:
        batch, wanted = seen(synthetic.images, synthetic.targets, step, task.size)

        def loss(parameters: Tensor, batch: Tensor = batch, wanted: Tensor = wanted) -> Tensor:
            return cross_entropy(task.network(parameters, batch), wanted)

        vector = vector - synthetic.step_size * grad(loss)(vector)
    return vector


def match(task: Task, synthetic: Synthetic, gradient: str, steps_in_graph: int | None = None) -> Matched:
    """Return the matched loss and its gradient, computed as ``method.mtt.gradient`` says.

    Args:
        task: what the student has to do.
        synthetic: the set.
        gradient: ``unrolled``, ``tesla`` or ``tesla_detached``.
        steps_in_graph: for ``unrolled``, steps whose graph is held at once; None for all.
    """
    if gradient != "unrolled":
        return match_in_parts(task, synthetic, 1, detached=gradient == "tesla_detached")
    if steps_in_graph is None or steps_in_graph >= len(task.steps):
        return match_unrolled(task, synthetic)
    return match_in_parts(task, synthetic, steps_in_graph)


def match_unrolled(task: Task, synthetic: Synthetic) -> Matched:
    """Differentiate the matched loss through one graph of all steps; memory grows with their number."""
    leaves = synthetic.leaves()
    loss = task.loss(unroll(task, leaves, task.start, task.steps))
    return Matched(loss.detach(), Synthetic(*torch.autograd.grad(loss, leaves.tensors())))


def match_in_parts(task: Task, synthetic: Synthetic, part: int, *, detached: bool = False) -> Matched:
    """Differentiate the matched loss with the graph of ``part`` steps at a time; every step runs twice.

    Besides that graph, memory holds one parameter vector for every part. torch.utils.checkpoint is not used, because
    it works by hooks on saved tensors, which torch.func refuses.

    Args:
        task: what the student has to do.
        synthetic: the set.
        part: steps whose graph is held at once.
        detached: leave out that later parameters depend on the images through earlier steps, as TESLA's program does.
    """
    leaves = synthetic.leaves()
    parts = [task.steps[first : first + part] for first in range(0, len(task.steps), part)]
    points = [task.start]
    with torch.no_grad():
        for steps in parts:
            points.append(unroll(task, leaves, points[-1], steps))
    end = points.pop().requires_grad_()
    loss = task.loss(end)
    (carried,) = torch.autograd.grad(loss, end)
    sums = [torch.zeros_like(leaf) for leaf in leaves.tensors()]
    for steps, point in zip(reversed(parts), reversed(points), strict=True):
        begin = point.detach().requires_grad_()
        reached = unroll(task, leaves, begin, steps)
        *gradients, through = torch.autograd.grad(reached, [*leaves.tensors(), begin], grad_outputs=carried)
        sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
        carried = carried if detached else through
    return Matched(loss.detach(), Synthetic(*sums))


def first_bad_step(task: Task, synthetic: Synthetic) -> int | None:
    """Return the first of the student's steps, counted from 1, whose parameters are not finite; None if all are."""
    vector = task.start
    with torch.no_grad():
        for number, step in enumerate(task.steps, 1):
            vector = unroll(task, synthetic, vector, [step])
            if not bool(vector.isfinite().all()):
                return number
    return None
