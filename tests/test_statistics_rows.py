"""All layers' statistics as one row, against layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvdd.computing.statistics_rows import StatisticsRows, _Repeated, _users, written
from cvdd.statistics.layer_statistics import Moments

# Layers' inputs are made up of maps a (2 channels), b (3) and c (1); most take some of them again.
COMPOSED = [("a",), ("b", "a"), ("c", "b", "a"), ("c",)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("first", [10.0, 1.0, 0.0])
@pytest.mark.parametrize("composed", [COMPOSED, [("a",), ("b",), ("c",)]], ids=["repeated", "plain"])
def test_the_distance_is_that_of_all_layers(composed: list[tuple[str, ...]], first: float) -> None:
    """Two groups of three images, and the gradient too."""
    maps = {name: random(6, count, 4, 5, seed=count) for name, count in (("a", 2), ("b", 3), ("c", 1))}
    centres = {name: random(values.shape[1], seed=9) for name, values in maps.items()}
    counts = [sum(len(centres[name]) for name in names) for names in composed]
    layers = [Moments(random(count, seed=20 + count), random(count, seed=30 + count).exp()) for count in counts]
    rows = StatisticsRows(layers, centres, composed)

    def in_a_row(*given: Tensor) -> Tensor:
        apart = [one - centre[:, None, None] for one, centre in zip(given, centres.values(), strict=True)]
        means, squares = ([part.mean(dim=(2, 3)) for part in parts] for parts in (apart, [one**2 for one in apart]))
        return rows.distance(means, squares, 2, first)

    def one_by_one(*given: Tensor) -> Tensor:
        named, total = dict(zip(maps, given, strict=True)), torch.zeros(2, dtype=torch.float64)
        for number, (names, target) in enumerate(zip(composed, layers, strict=True)):
            whole = torch.cat([named[name] for name in names], dim=1).unflatten(0, (2, 3))
            mean, variance = whole.mean(dim=(1, 3, 4)), whole.var(dim=(1, 3, 4), unbiased=False)
            apart = (target.mean - mean).norm(dim=1) + (target.variance - variance).norm(dim=1)
            total = total + (first if number == 0 else 1.0) * apart
        return total

    found, slopes = [], []
    for distance in (in_a_row, one_by_one):
        leaves = [values.clone().requires_grad_() for values in maps.values()]
        found.append(distance(*leaves))
        slopes.append(torch.autograd.grad((found[-1] * random(2, seed=5)).sum(), leaves))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)


def test_places_that_are_taken_several_times() -> None:
    source = torch.tensor([2, 0, 2, 1, 2])
    users = _users(source, 4)
    assert users.tolist() == [[1, 5, 5], [3, 5, 5], [0, 2, 4], [5, 5, 5]]
    values = random(2, 4).requires_grad_()
    assert torch.equal(_Repeated.apply(values, source, users), values[:, source])
    assert torch.autograd.gradcheck(lambda values: _Repeated.apply(values, source, users), (values,))


def test_what_is_written_down_is_what_it_was() -> None:
    values = random(3, 4)
    assert torch.equal(written(values), values)
    torch.library.opcheck(written, (values,))
