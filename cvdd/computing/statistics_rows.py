"""Statistics of all layers in one row of channels, so that a compiler compares them in a few operations.

A network of a hundred layers has its moments reduced, compared and differentiated a hundred times otherwise, in kernels
that take longer to start than to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cvdd.statistics.layer_statistics import Moments


@torch.library.custom_op("cvdd::written", mutates_args=())
def written(values: Tensor) -> Tensor:
    """Return a copy.

    A compiler does not see inside, so that it writes the values down, instead of computing them again for each pixel
    of the maps that they are for.
    """
    return values.clone()


@written.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


class _WrittenGradient(torch.autograd.Function):
    """The same values, whose gradient is written down."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        copied: Tensor = written(gradient)
        return copied


class _Repeated(torch.autograd.Function):
    """Take places of the last axis, some of them several times."""

    @staticmethod
    def forward(values: Tensor, source: Tensor, users: Tensor) -> Tensor:
        return values[..., source]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Each place adds up its users, in the same order every time.
        (users,) = ctx.saved_tensors
        return pad(gradient, (0, 1))[..., users].sum(dim=-1), None, None


class StatisticsRows(nn.Module):
    """Running statistics of all layers in one row, and how the maps that are measured make up the layers' inputs.

    A module, because a compiler takes the sizes of a module's tensors as given, and compiles for any size where those
    of other objects differ between members.

    Args:
        layers: of each, its running mean and variance [channels].
        centres: of each map that is measured, by name, the values [channels] around which it is.
        composed: of each layer, the names of the maps that its input consists of, in the order of its channels.
    """

    centres: Tensor
    targets: Tensor
    first: Tensor
    membership: Tensor
    source: Tensor | None
    users: Tensor | None

    def __init__(
        self, layers: Sequence[Moments], centres: Mapping[str, Tensor], composed: Sequence[Sequence[str]]
    ) -> None:
        super().__init__()
        row = torch.cat(list(centres.values()))
        self.register_buffer("centres", row)
        means, variances = (torch.cat([layer[kind] for layer in layers]) for kind in (0, 1))
        self.register_buffer("targets", torch.stack([means, variances])[:, None])
        lengths = torch.tensor([len(layer.mean) for layer in layers], device=row.device)
        number = torch.arange(len(layers), device=row.device)
        # [layers]: 1 for the first, 0 for the others; [channels, layers]: 1 where a channel belongs to a layer.
        self.register_buffer("first", (number == 0).to(means.dtype))
        self.register_buffer("membership", (number.repeat_interleave(lengths)[:, None] == number).to(means.dtype))
        places = dict(zip(centres, torch.arange(len(row)).split([len(one) for one in centres.values()]), strict=True))
        source = torch.cat([places[name] for names in composed for name in names])
        alike = len(source) == len(row) and bool((source == torch.arange(len(row))).all())
        self.register_buffer("source", None if alike else source.to(row.device))
        self.register_buffer("users", None if alike else _users(source, len(row)).to(row.device))

    def distance(
        self, means: Sequence[Tensor], squares: Sequence[Tensor], groups: int, first_multiplier: float
    ) -> Tensor:
        """Weighted sum over layers of the norms of both differences (:func:`cvdd.statistics.bn.statistics_distance`).

        Args:
            means: of each measured map, in the order of the centres, the mean deviation from them [images, channels].
            squares: likewise, the mean squared deviation.
            groups: number of equal groups of consecutive images.
            first_multiplier: weight of the first layer.

        Returns:
            [groups].
        """
        of_images = torch.cat([*means, *squares], dim=1)
        of_groups: Tensor = _WrittenGradient.apply(of_images.unflatten(0, (groups, -1)).mean(dim=1))
        offset, square = of_groups.chunk(2, dim=1)
        moments = torch.stack([offset + self.centres, square - offset.square()])
        if self.source is not None:
            moments = _Repeated.apply(moments, self.source, self.users)
        squares_apart = (self.targets - moments).square() @ self.membership
        # The gradient of a root at 0 is not finite.
        norms = squares_apart.clamp(min=torch.finfo(squares_apart.dtype).tiny).sqrt().sum(dim=0)
        return norms @ (1 + (first_multiplier - 1) * self.first)


def _users(source: Tensor, count: int) -> Tensor:
    """Of each of ``count`` places, the indices of those that take it [count, most]; the rest points past the end."""
    order, taken = source.argsort(stable=True), source.bincount(minlength=count)
    number = torch.arange(len(source)) - (taken.cumsum(0) - taken).repeat_interleave(taken)
    users = torch.full((count, int(taken.max())), len(source))
    users[source[order], number] = order
    return users
