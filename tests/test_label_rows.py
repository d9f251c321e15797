"""Logits of which the largest are kept: by hand, and as they come back from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Compose
from helpers import tiny_context

from cvdd.chain.compare import distil
from cvdd.chain.preflight import check_before_work
from cvdd.chain.unit_files import load_images
from cvdd.labels.rows import Rest, check_top, read_rows, row_type, shortened, write_rows
from cvdd.labels.sources import ComputedLabels
from cvdd.support.config_base import ConfigError

LOGITS = torch.tensor([[4.0, -1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])


def test_the_others_become_their_mean() -> None:
    assert torch.equal(shortened(LOGITS, 2), torch.tensor([[4.0, 0.0, 2.0, 0.0, 0.0], [0.0] * 5]))
    assert shortened(LOGITS, None) is LOGITS


def test_or_nothing_is_left_of_them() -> None:
    short = shortened(LOGITS.half(), 2, "nothing")
    none = -float("inf")
    assert torch.equal(short[0], torch.tensor([4.0, none, 2.0, none, none]).half())
    assert short[1].isfinite().sum() == 2
    rows = np.frombuffer(write_rows(short, 2, "nothing"), row_type("float16", 5, 2, "nothing"))
    assert rows.itemsize == 2 * (1 + 2)
    assert torch.equal(read_rows(rows, 5), short)
    assert read_rows(rows, 5).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("classes", "top"), [(5, 1), (5, 3), (300, 20), (70_000, 2)])
def test_what_is_written_comes_back(classes: int, top: int, dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(7, classes, generator=torch.Generator().manual_seed(0))).to(dtype)
    # A tie between what is kept and what is not.
    logits[0, :] = logits[0, 0]
    short = shortened(logits, top)
    rows = np.frombuffer(write_rows(short, top), row_type(str(dtype).removeprefix("torch."), classes, top))
    assert torch.equal(read_rows(rows, classes), short)
    assert short.dtype == dtype
    kept = logits.topk(top, dim=1)
    assert torch.equal(short.gather(1, kept.indices), kept.values)
    total = short.double().sum(dim=1)
    torch.testing.assert_close(total, logits.double().sum(dim=1), rtol=2e-3, atol=classes * 2e-3)


def test_bytes_of_a_label() -> None:
    assert row_type("float16", 1000, None).itemsize == 2000
    # Twenty places and logits of two bytes each, and the mean.
    assert row_type("float16", 1000, 20).itemsize == 20 * 4 + 2
    assert row_type("float16", 200, 20).itemsize == 20 * 3 + 2
    assert row_type("float32", 70_000, 20).itemsize == 20 * 8 + 4


@pytest.mark.parametrize(("top", "classes"), [(9, 10), (10, 10), (1, 2)])
def test_numbers_that_leave_nothing_out_are_refused(top: int, classes: int) -> None:
    check_top(classes - 2, classes)
    check_top(None, classes)
    with pytest.raises(ConfigError, match=rf"label\.top={top}: of {classes} logits at most {classes - 2} are kept"):
        check_top(top, classes)


def test_all_but_one_may_be_kept_where_nothing_stands_for_the_others() -> None:
    check_top(9, 10, "nothing")
    with pytest.raises(ConfigError, match=r"at most 9 are kept .* label\.top=null label\.rest=mean for all"):
        check_top(10, 10, "nothing")


def test_a_command_refuses_them_before_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^label\.top=9: of 10 logits"):
        check_before_work(tiny_context(tmp_path, "label.top=9"))


def test_hard_labels_have_none(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"label\.top=3 is of teachers"):
        compose("evaluate", "label=hard", "protocol=hard_tiny", "label.top=3")


@pytest.mark.parametrize(("rest", "bytes_of_rest"), [("mean", 4), ("nothing", 0)])
def test_stored_and_computed_labels_are_shortened_alike(rest: Rest, bytes_of_rest: int, tmp_path: Path) -> None:
    short = ("label.top=3", f"label.rest={rest}")
    made = [
        distil(tiny_context(tmp_path, f"label.store={store}", *kept, "label.dtype=float32"), "")
        for store, kept in (("logits", short), ("none", short), ("none", ()))
    ]
    pixels = load_images(made[0].images)[0]
    stored, computed, whole = (one.labels.open(pixels) for one in made)
    assert isinstance(computed, ComputedLabels)
    for epoch in range(3):
        assert torch.equal(stored.epoch(epoch)[1], computed.epoch(epoch)[1])
        assert torch.equal(stored.epoch(epoch)[1], shortened(whole.epoch(epoch)[1], 3, rest))
    # Of 20 images in 3 epochs: three places of a byte and three logits each, and the mean or nothing.
    artifact = made[0].labels.artifact
    assert artifact is not None
    assert artifact.manifest["files"]["logits.bin"]["bytes"] == 60 * (3 * (1 + 4) + bytes_of_rest)
