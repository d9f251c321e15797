"""Every decoupled method makes images with the same engine, and what is particular to it shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PRIORS, TINY, configure, method_config, same_files, tiny_context
from torch import Tensor

import cvdd.chain.recover
from cvdd.artifact import Artifact, Store
from cvdd.chain.compare import compare
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.priors import find_priors
from cvdd.chain.unit_files import UNITS, load_history, load_images, write_unit
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.units import Stage, plan_units

pytest_plugins = ["chain_fixtures"]

FOUR = "method.iterations=4"
PLUS = "method.voters=[resnet18,shufflenetv2]"
"""FADRM+ asks for members that the tiny committee of the tests does not have."""


def images_of(home: Path, *overrides: str) -> Artifact:
    return make_images(tiny_context(home, *overrides), PRIORS)


@pytest.mark.parametrize(
    ("overrides", "voters"),
    [
        (("method=sre2l", FOUR), ["resnet18"]),
        (("method=sre2l_pp", FOUR), ["resnet18"]),
        (("method=cda", FOUR), ["resnet18"]),
        (("method=gvbsm", FOUR, "method.crop_scale=null"), ["resnet18", "resnet50", "shufflenetv2"]),
        (("method=edc", FOUR), ["resnet18", "resnet50", "shufflenetv2"]),
        (("method=lpld", FOUR), ["resnet18"]),
        (("method=fadrm", FOUR), ["resnet18"]),
        (("method=fadrm_plus", FOUR, PLUS), ["resnet18", "shufflenetv2"]),
        (("method=psm", FOUR), ["resnet18"]),
        (("method=psm_plus", FOUR, PLUS), ["resnet18", "shufflenetv2"]),
        (("method=cim", FOUR, "method.crop_scale=null"), ["resnet18"]),
        (("method=rded", "patches=easy", "method.iterations=0"), []),
        (("method=random_real", "method.iterations=0"), []),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_method_makes_all_images_with_its_voters(
    overrides: tuple[str, ...], voters: list[str], chain_home: Path
) -> None:
    artifact = images_of(chain_home, *overrides)
    images, labels = load_images(artifact)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert len({image.numpy().tobytes() for image in images}) == 20
    history = next(iter(load_history(artifact).values()))
    assert list(history["weights"]) == voters
    assert bool(history["rows"]) == bool(voters)


def test_images_alone_in_their_class_crowd_nobody(chain_home: Path) -> None:
    artifact = images_of(chain_home, "method=gvbsm", FOUR, "method.crop_scale=null", "ipc.images_per_class=1")
    assert len(load_images(artifact)[0]) == 10
    assert {row["density"] for row in next(iter(load_history(artifact).values()))["rows"]} == {0.0}


def test_all_real_images(chain_home: Path) -> None:
    context = tiny_context(chain_home, "method=full", "method.iterations=0")
    images, labels = load_images(make_images(context, {}))
    train = context.data().train
    assert torch.equal(labels, train.labels.sort(stable=True).values)
    assert torch.equal(images, train.stacked()[train.labels.argsort(stable=True)])


def test_images_of_a_class_together_are_in_the_order_of_the_others(chain_home: Path, tmp_path: Path) -> None:
    real = images_of(chain_home, "method=random_real", "method.iterations=0")
    pixels, labels = load_images(real)
    (tmp_path / UNITS).mkdir()
    for unit in plan_units(2, 10, method_config(composer="classes", classes_per_unit=3)):
        write_unit(tmp_path / UNITS, unit, unit.of(pixels.view(10, 2, *pixels.shape[1:])), [], {})
    files = {f"{UNITS}/{file.name}": "" for file in (tmp_path / UNITS).iterdir()}
    found = load_images(replace(real, path=tmp_path, manifest=real.manifest | {"files": files}))
    assert torch.equal(found[0], pixels)
    assert torch.equal(found[1], labels)


def test_real_images_are_the_same_artefact_beside_every_method(chain_home: Path) -> None:
    """With nothing optimised nobody sees how images are composed into units."""
    kept = ("method.name=random_real", "method.init=real", "method.iterations=0")
    real = images_of(chain_home, "method=random_real", "method.iterations=0")
    for method in ("edc", "lpld", "fadrm"):
        assert images_of(chain_home, f"method={method}", *kept) == real
    assert images_of(chain_home, "method=edc", *kept, "method.init=herding") != real


def test_residual_pulls_images_back_to_where_they_began(chain_home: Path) -> None:
    start = load_images(images_of(chain_home, "method=rded", "method.iterations=0"))[0].float()

    def distance(*overrides: str) -> float:
        made = load_images(images_of(chain_home, "method=fadrm", "method.iterations=8", *overrides))[0].float()
        return float((made - start).abs().mean())

    free, pulled = distance("method.residual=1"), distance("method.residual=0.2")
    assert 1 < pulled < 0.8 * free


def test_stages_may_have_sizes_of_their_own(chain_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: set[tuple[int, int, int]] = set()

    def module(images: Tensor, *arguments: Any, **options: Any) -> DistillModule:
        stage = next(one for one in arguments if isinstance(one, Stage))
        sides.add((stage.index, stage.size, images.shape[-1]))
        return DistillModule(images, *arguments, **options)

    monkeypatch.setattr(cvdd.chain.recover, "DistillModule", module)
    changes = ("method=fadrm", "method.iterations=4", "method.stages=2")
    small = load_images(images_of(chain_home, *changes, "method.sizes=[24,32]"))[0]
    assert small.shape == (20, 3, 32, 32)
    assert sides == {(0, 24, 24), (1, 32, 32)}
    assert not torch.equal(small, load_images(images_of(chain_home, *changes))[0])
    with pytest.raises(ConfigError, match=r"method\.sizes=\[32, 24\] ends at 24, and dataset\.image_size=32"):
        images_of(chain_home, *changes, "method.sizes=[32,24]")


class PulledPlug(Exception):
    pass


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=fadrm_plus", "method.iterations=8", PLUS),
        ("method=edc", "method.iterations=8", "method.classes_per_unit=5"),
    ],
    ids=["stages", "moving averages"],
)
def test_an_interrupted_method_ends_with_the_same_bits(
    overrides: tuple[str, ...], chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = images_of(chain_home, *overrides)
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    original, calls = cvdd.chain.recover._log_row, []

    def stopping(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise PulledPlug
        original(*arguments)  # type: ignore[arg-type]

    again = tiny_context(chain_home, *overrides, store=tmp_path / "again")
    with monkeypatch.context() as patched:
        patched.setattr(cvdd.chain.recover, "_log_row", stopping)
        with pytest.raises(PulledPlug):
            make_images(again, PRIORS)
    assert len(calls) == 4
    assert same_files(make_images(again, PRIORS), whole)


def test_members_without_batchnorm_vote_with_their_cross_entropy_and_label(tmp_path: Path) -> None:
    usual = [override for override in TINY if "committee.members" not in override and "prior.values" not in override]
    overrides = ("committee=tiny_mixed", "~committee.members.resnet50", "~committee.members.convnext")
    config = configure(tmp_path, *usual, *overrides, "prior.values={resnet18: 40, vit: 30}", FOUR)
    config.paths.output.mkdir(parents=True, exist_ok=True)
    context = Context(config, Store(config.paths.store), torch.device("cpu"))
    distilled, results = compare(context)
    history = next(iter(load_history(distilled[0].images).values()))
    assert list(history["weights"]) == ["resnet18", "vit"]
    assert all(row["bn"]["vit"] == 0 and row["ce"]["vit"] > 0 for row in history["rows"])
    assert list(distilled[0].labels.teachers) == ["resnet18", "vit"]
    assert len(results[0].students) == 1


def test_a_prior_is_that_of_its_member_alone_whoever_votes(tmp_path: Path) -> None:
    """Neither the voters nor the stages of the method are those of the measurement."""
    few = ("method.iterations=4", "prior.iterations=3", "prior.epochs=1", "prior.images_per_class=1")
    context = tiny_context(
        tmp_path, "method=sampled_residual", "prior.source=measured", "prior.values=null", "label.batch_size=10", *few
    )
    priors = find_priors(context)
    voters = [list(next(iter(load_history(images).values()))["weights"]) for images in priors.images]
    assert voters == [["resnet18"], ["resnet50"], ["shufflenetv2"]]
