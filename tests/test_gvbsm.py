"""Data densification and the balanced mean of teachers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvdd.methods.gvbsm import balanced_mean, densification


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(*shape: int, seed: int = 0) -> Tensor:
    """Images that have most of what they show in common, as those of a class do."""
    return 0.5 * noise(*shape, seed=seed) + noise(*shape[2:], seed=seed + 1)


def by_hand(images: Tensor, divisor: float) -> float:
    """Of one class whose images [n, 3, 32, 32] need no pooling; eigenvalues from the general solver."""
    flat = images.flatten(1)
    eigenvalues = torch.linalg.eigvals(flat @ flat.T / divisor).real
    flatter = torch.exp(eigenvalues / 4 - torch.logsumexp(eigenvalues / 4, 0))
    sharper = eigenvalues - torch.logsumexp(eigenvalues, 0)
    return float((flatter * (flatter.log() - sharper)).sum())


def test_classes_of_two_units() -> None:
    """Two and three images of a class in one unit, one and four in the other."""
    images = alike(2, 5, 3, 32, 32)
    targets = torch.tensor([[7, 2, 7, 2, 2], [5, 7, 5, 5, 5]])
    first, second = densification(images, targets, "dimension").tolist()
    dimension = 3 * 32 * 32
    expected = by_hand(images[0, [0, 2]], dimension) + by_hand(images[0, [1, 3, 4]], dimension)
    assert first == pytest.approx(expected, rel=1e-9)
    assert second == pytest.approx(by_hand(images[1, [0, 2, 3, 4]], dimension), rel=1e-9)
    assert min(first, second) > 0.1


def test_two_images_by_hand() -> None:
    """Unit vectors at an angle whose cosine is 0.6 have the eigenvalues 1.6 and 0.4."""
    images = torch.zeros(1, 2, 3, 32, 32, dtype=torch.float64)
    images[0, 0, 0, 0, 0] = 5.0
    images[0, 1, 0, 0, 0], images[0, 1, 2, 7, 9] = 1.2, 1.6
    # logistic(1.2 / 4) = 0.574443, logistic(1.2) = 0.768525
    expected = 0.574443 * torch.tensor(0.574443 / 0.768525).log() + 0.425557 * torch.tensor(0.425557 / 0.231475).log()
    found = densification(images, torch.zeros(1, 2, dtype=torch.long), "cosine")
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_as_released_it_is_nearly_nothing() -> None:
    """The specification measured 6e-3 for ten images of noise, and 0 for images that are alike."""
    targets = torch.zeros(1, 10, dtype=torch.long)
    assert densification(noise(1, 10, 3, 32, 32).float(), targets, "none").item() < 0.1
    related = alike(1, 10, 3, 32, 32).float().requires_grad_()
    found = densification(related, targets, "none")
    found.sum().backward()
    assert found.item() == 0.0
    assert not related.grad.any()
    assert densification(related, targets, "dimension").item() > 1


@pytest.mark.parametrize("scale", ["none", "dimension", "cosine"])
def test_one_image_of_a_class_has_none(scale: str) -> None:
    images = noise(2, 3, 3, 32, 32).requires_grad_()
    found = densification(images, torch.tensor([[0, 1, 2], [2, 0, 1]]), scale)
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", ["dimension", "cosine"])
def test_gradient(scale: str) -> None:
    """Against finite differences; the target distribution is held fixed, as in the method."""
    images = 3 * alike(1, 4, 3, 2, 2)
    targets = torch.tensor([[0, 0, 0, 1]])
    leaf = images.clone().requires_grad_()
    densification(leaf, targets, scale).sum().backward()

    flat = images.repeat_interleave(16, 3).repeat_interleave(16, 4)[0, :3].flatten(1)

    def eigenvalues(features: Tensor) -> Tensor:
        size = 3072**0.5 if scale == "dimension" else features.norm(dim=1, keepdim=True)
        scaled = features / size
        return torch.linalg.eigvals(scaled @ scaled.T).real.sort().values

    fixed = torch.softmax(eigenvalues(flat) / 4, dim=0)

    def value(pixels: Tensor) -> Tensor:
        features = pixels.repeat_interleave(16, 3).repeat_interleave(16, 4)[0, :3].flatten(1)
        return (fixed * (fixed.log() - torch.log_softmax(eigenvalues(features), dim=0))).sum()

    for index in [(0, 0, 0, 0, 0), (0, 1, 2, 1, 0), (0, 2, 1, 0, 1)]:
        step = torch.zeros_like(images)
        step[index] = 1e-5
        slope = (value(images + step) - value(images - step)) / 2e-5
        assert leaf.grad[index].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)
        assert abs(slope) > 1e-6
    assert not leaf.grad[0, 3].any()


@pytest.mark.parametrize("scale", ["none", "dimension", "cosine"])
def test_equal_eigenvalues_have_a_finite_gradient(scale: str) -> None:
    images = torch.zeros(1, 4, 3, 32, 32)
    images[0, :, 0, 0, 0] = 2.0
    images.requires_grad_()
    densification(images, torch.zeros(1, 4, dtype=torch.long), scale).sum().backward()
    assert bool(images.grad.isfinite().all())
    orthogonal = torch.eye(3 * 32 * 32)[:4].view(1, 4, 3, 32, 32).requires_grad_()
    densification(orthogonal, torch.zeros(1, 4, dtype=torch.long), scale).sum().backward()
    assert bool(orthogonal.grad.isfinite().all())


def test_turned_features_are_the_same() -> None:
    images = alike(1, 4, 3, 32, 32)
    turned = images.flatten(2).roll(100, dims=2).flip(2).view_as(images)
    targets = torch.zeros(1, 4, dtype=torch.long)
    torch.testing.assert_close(
        densification(turned, targets, "dimension"), densification(images, targets, "dimension"), rtol=1e-9, atol=0
    )


def test_larger_images_are_pooled() -> None:
    images = alike(1, 3, 3, 64, 64)
    pooled = images.unflatten(4, (32, 2)).unflatten(3, (32, 2)).mean(dim=(4, 6))
    targets = torch.zeros(1, 3, dtype=torch.long)
    torch.testing.assert_close(
        densification(images, targets, "dimension"), densification(pooled, targets, "dimension"), rtol=1e-9, atol=0
    )


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.density_scale=sum: choose none, dimension or cosine"):
        densification(noise(1, 2, 3, 4, 4), torch.zeros(1, 2, dtype=torch.long), "sum")


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_balanced_mean_by_hand() -> None:
    """Norms 5 and 10, so both are given 7.5."""
    logits = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 6.0], [8.0, 0.0]]])
    assert balanced_mean(logits, None).tolist() == [[2.25, 2.25], [3.0, 3.0]]


def test_each_block_has_norms_of_its_own() -> None:
    logits = noise(3, 7, 4)
    expected = torch.cat([balanced_mean(part, None) for part in (logits[:, :3], logits[:, 3:6], logits[:, 6:])])
    torch.testing.assert_close(balanced_mean(logits, 3), expected)
    assert (balanced_mean(logits, None) - expected).abs().max() > 1e-3


def test_a_louder_teacher_changes_only_the_common_factor() -> None:
    logits = noise(3, 6, 4)
    before = balanced_mean(logits, None)
    louder = logits.clone()
    louder[1] *= 9
    after = balanced_mean(louder, None)
    ratio = after / before
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    norms = logits.flatten(1).norm(dim=1)
    assert ratio[0, 0].item() == pytest.approx(((norms.sum() + 8 * norms[1]) / norms.sum()).item())


def test_a_silent_teacher_is_no_problem() -> None:
    logits = noise(2, 3, 4)
    logits[1] = 0
    assert bool(balanced_mean(logits, None).isfinite().all())
