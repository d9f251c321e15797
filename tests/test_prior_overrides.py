"""A prior says how good a member is, and not how the images around it are made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Compose
from helpers import tiny_context

from cvdd.chain import priors
from cvdd.chain.context import Context
from cvdd.composition.prior_overrides import prior_overrides
from cvdd.schema import RunConfig, needs_priors, with_overrides
from cvdd.support.config_base import ConfigError

MEASURED = "prior=measured_small"
STRENGTHS = {"lr", "r_bn", "ce", "crop_scale", "jitter", "checkpoint_every", "log_every", "grid_every"}
"""Of the method, which a measurement takes from the run."""


def measured(config: RunConfig, member: str = "resnet18") -> RunConfig:
    return with_overrides(config, prior_overrides(config, member))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=full",),
        ("method=full", "label=committee", "protocol=paper"),
        ("method=gvbsm", "label=committee", "protocol=paper"),
        ("method=edc", "label=edc", "protocol=edc", "label.weights=prior"),
        ("method=lpld", "label=committee"),
        ("method=cda", "label=committee"),
        ("method=fadrm_plus", "label=committee"),
        ("method=psm", "label=committee"),
        ("method=cim", "method.init=real", "method.voters=all", "label=committee"),
        ("method=sampled_residual", "label=hard", "protocol=hard"),
        ("method=cvdd", "label=hard", "protocol=hard"),
        (
            "method=cvdd",
            "label=committee",
            "label.mix=mixup",
            "label.mix_alpha=0.8",
            "label.randaugment=true",
            "label.keep=0.5",
        ),
        ("label=lpqld", "protocol=lpqld", "label.teachers=committee", "label.weights=prior"),
        ("label=hald", "protocol=hald", "label.teachers=committee", "label.weights=prior", "protocol.loss=kl"),
    ],
    ids=" ".join,
)
def test_a_prior_is_measured_in_the_plain_loop_with_plain_labels(overrides: tuple[str, ...], compose: Compose) -> None:
    usual = measured(compose("evaluate", "method=cvdd", "label=committee", "protocol=paper", MEASURED))
    run = compose("evaluate", *overrides, MEASURED)
    assert needs_priors(run)
    found = measured(run)
    assert found.method.model_dump(exclude=STRENGTHS) == usual.method.model_dump(exclude=STRENGTHS)
    assert found.method.crop_scale is not None
    if run.method.anchors is not None:
        # Of features, as are the weights of its terms.
        assert (found.method.lr, found.method.ce, found.method.r_bn) == (0.25, 1.0, 0.01)
    label = {
        "bn_mode": "batch",
        "halves": True,
        "mix": "cutmix",
        "mix_alpha": 1.0,
        "randaugment": False,
        "shuffle": 1,
        "keep": 1.0,
    }
    assert found.label.model_dump(include=set(label)) == label
    assert (found.label.teachers, found.label.top, found.protocol.loss) == (["resnet18"], None, "kl")
    ways = {"hard_share", "repeat_labels", "label_smoothing", "temperature_factor", "student_temperature"}
    assert found.protocol.model_dump(include=ways) == usual.protocol.model_dump(include=ways)
    assert found.compare == {}
    assert not needs_priors(found)


@pytest.mark.parametrize(("dataset", "mirror"), [("cifar10", True), ("digits_photo", False)])
def test_a_measurement_crops_and_mirrors_as_the_data_set_may(dataset: str, mirror: bool, compose: Compose) -> None:
    """SRe2L on small images does neither."""
    plain = ("method=sre2l", "method.crop_scale=null", "method.flip=false", "label=committee")
    found = measured(compose("evaluate", f"dataset={dataset}", *plain, MEASURED))
    assert (found.method.flip, found.method.crop_scale is None) == (mirror, False)


def test_a_member_is_measured_alone(compose: Compose) -> None:
    run = compose("evaluate", MEASURED)
    found = measured(run, "densenet121")
    assert found.committee.fixed == [["densenet121"]]
    assert found.method.name == "prior-densenet121"
    assert found.method.iterations == run.prior.iterations
    assert found.protocol.epochs == found.label.epochs == run.prior.epochs


@pytest.mark.parametrize(("images", "patches"), [(12, 12), (3, 10)])
def test_there_are_patches_for_all_images_of_a_measurement(images: int, patches: int, compose: Compose) -> None:
    """The run itself needs ten of each class; a smaller measurement takes the first of these."""
    run = compose("evaluate", MEASURED, "ipc.images_per_class=10", f"prior.images_per_class={images}")
    found = measured(run)
    assert (found.ipc.images_per_class, found.patches.images_per_class) == (images, patches)


def test_a_prior_is_the_mean_accuracy_of_students_like_the_observer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def student(context: Context, labels: Any, name: str, backbone: Any, seed: int, part: str) -> SimpleNamespace:
        trained.append((context.label, name, backbone, seed, part))
        return SimpleNamespace(metrics={"top1": 40.0 + 10 * seed})

    for name, made in (("make_images", "images"), ("make_labels", "labels")):
        monkeypatch.setattr(priors, name, lambda context, *others, made=made: made)
    monkeypatch.setattr(priors, "make_student", student)
    source = ("prior.source=measured", "prior.values=null", "prior.measured_on=train")
    context = tiny_context(tmp_path, *source, "prior.observer=resnet50", "prior.seeds=2", "prior.epochs=1")
    found = priors.measure_prior(context, "shufflenetv2")
    assert found.values == {"shufflenetv2": 45.0}
    observer = context.config.committee.members["resnet50"].backbone
    assert trained == [("prior of shufflenetv2", "resnet50", observer, seed, "train") for seed in (0, 1)]


def test_a_measurement_that_cannot_run_is_refused_before_any_work(compose: Compose) -> None:
    cannot = ("protocol.warmup=80", "prior.epochs=60")
    with pytest.raises(ConfigError, match=r"measuring priors: .*protocol\.warmup=80.*; change prior\.\*, or give the"):
        compose("evaluate", *cannot, MEASURED)
    compose("evaluate", *cannot, MEASURED, "committee.voter=equal", "label.weights=equal")
