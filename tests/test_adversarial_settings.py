"""Settings of prediction matching reach what they set."""

from __future__ import annotations

import pytest
import torch
from test_apm import module_of
from torch import Tensor

from cvdd.methods.apm import ImageTerms
from cvdd.synthesis.adversarial import ImageSgd, Pace


def test_images_move_as_their_own_settings_say() -> None:
    module = module_of(Pace(9, 1, 1), factor=0.7, momentum=0.25, momentum_drift=False)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, ImageSgd)
    assert (optimizer.param_groups[0]["momentum"], optimizer.drift) == (0.25, False)
    assert module.lr_at(8) == pytest.approx(0.7)


def test_disagreement_and_classes_count_as_the_method_says() -> None:
    """The gradient is the weighted sum of those of each term alone.

    Weights that add up to 1 would hide one that is always 1.
    """
    chosen = torch.arange(8)

    def gradient(discrepancy: float, ce: float) -> Tensor:
        module = module_of(Pace(1, 1, 1), discrepancy=discrepancy, ce=ce)
        module._refresh(0, chosen)
        return module.gradient(chosen)[0]

    disagreement, classes = gradient(1.0, 0.0), gradient(0.0, 1.0)
    torch.testing.assert_close(gradient(0.7, 0.4), 0.7 * disagreement + 0.4 * classes, rtol=1e-4, atol=1e-7)
    assert disagreement.abs().max() > 1e-4
    assert classes.abs().max() > 1e-4


def test_a_row_tells_the_last_of_its_iterations() -> None:
    module = module_of(Pace(4, 2, 4), discrepancy=2.0, ce=0.5)
    module._report(
        2, [ImageTerms(torch.tensor(1.0), torch.tensor(3.0)), ImageTerms(torch.tensor(4.0), torch.tensor(6.0))], 0.7
    )
    (row,) = module.rows
    assert (row.iteration, row.loss, row.discrepancy, row.ce, row.lr) == (4, 0.5 * 6 - 2 * 4, 4.0, 6.0, 0.7)
