"""Changes of colour and sharpness, held against torchvision's image by image."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional as vision

from cvdd.augmentation.colours import SIGMAS, Colours, apply_colours, blur_matrices, draw_colours

CHANGES = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue)


def images(count: int = 6, side: int = 12) -> torch.Tensor:
    """Noise, but for a black, a white and a grey image, whose hue is none."""
    noise = 255 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    noise[0], noise[1], noise[2] = 0.0, 255.0, 100.0
    return noise


def unchanged(count: int) -> Colours:
    amounts = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1)
    return Colours(amounts, torch.arange(4).repeat(count, 1), torch.zeros(count, dtype=torch.bool), torch.zeros(count))


def draws(count: int, seed: int = 0) -> Colours:
    source = torch.Generator().manual_seed(seed)
    return draw_colours(count, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, source)


def test_nothing_drawn_changes_nothing() -> None:
    given = images()
    torch.testing.assert_close(apply_colours(given, unchanged(6)), given)
    none = draw_colours(6, (0.4, 0.4, 0.4, 0.1), 0.0, 0.0, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_colours(given, none), given)


@pytest.mark.parametrize("kind", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_change_is_torchvisions(kind: int) -> None:
    given, drawn = images(), unchanged(6)
    amounts = torch.linspace(-0.5, 0.5, 6) if kind == 3 else torch.linspace(0.2, 1.8, 6)
    drawn.amounts[:, kind] = amounts
    for found, image, amount in zip(apply_colours(given, drawn), given, amounts.tolist(), strict=True):
        torch.testing.assert_close(found, 255 * CHANGES[kind](image / 255, amount), atol=2e-3, rtol=0)


def test_changes_come_in_the_drawn_order() -> None:
    given = images(count=24)
    drawn = draws(24)._replace(grey=torch.zeros(24, dtype=torch.bool), sigmas=torch.zeros(24))
    assert len(drawn.orders.unique(dim=0)) > 10
    for row, found in enumerate(apply_colours(given, drawn)):
        expected = given[row] / 255
        if bool((drawn.amounts[row] != unchanged(1).amounts[0]).any()):
            for kind in drawn.orders[row].tolist():
                expected = CHANGES[kind](expected, float(drawn.amounts[row, kind]))
        torch.testing.assert_close(found, 255 * expected, atol=5e-3, rtol=0)


def test_grey_is_torchvisions() -> None:
    given, drawn = images(), unchanged(6)
    found = apply_colours(given, drawn._replace(grey=torch.tensor([False] * 3 + [True] * 3)))
    torch.testing.assert_close(found[:3], given[:3])
    torch.testing.assert_close(found[3:], vision.rgb_to_grayscale(given[3:], 3))


def test_a_blur_is_a_gaussian_and_counts_nothing_outside() -> None:
    given, drawn = images(side=41), unchanged(6)
    sigmas = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.0])
    found = apply_colours(given, drawn._replace(sigmas=sigmas))
    torch.testing.assert_close(found[5], given[5])
    inside = (slice(None), slice(12, 29), slice(12, 29))
    for row, sigma in enumerate(sigmas[:5].tolist()):
        expected = vision.gaussian_blur(given[row], [25, 25], [sigma, sigma])
        torch.testing.assert_close(found[row][inside], expected[inside], atol=1e-2, rtol=0)
    # A plain image stays as it is up to its edges.
    torch.testing.assert_close(found[2], given[2], atol=1e-3, rtol=0)
    torch.testing.assert_close(blur_matrices(sigmas[:5], 7).sum(dim=2), torch.ones(5, 7))


def test_draws_have_the_asked_ranges_and_shares() -> None:
    drawn = draws(20000)
    changed = (drawn.amounts != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    assert changed.float().mean() == pytest.approx(0.8, abs=0.01)
    assert drawn.grey.float().mean() == pytest.approx(0.2, abs=0.01)
    assert (drawn.sigmas > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    low, high = drawn.amounts[changed].amin(dim=0), drawn.amounts[changed].amax(dim=0)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=1e-3, rtol=0)
    blurred = drawn.sigmas[drawn.sigmas > 0]
    assert (blurred.min().item(), blurred.max().item()) == pytest.approx(SIGMAS, abs=1e-3)
    assert drawn.orders.sort(dim=1).values.eq(torch.arange(4)).all()
    # Every change is as often the first.
    assert (drawn.orders[:, 0].bincount() / 20000).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    # One of them alone is told from the others.
    assert not torch.equal(drawn.grey, changed)
    assert abs(torch.corrcoef(torch.stack([drawn.grey.float(), changed.float()]))[0, 1]) < 0.03
