"""Label recipes and protocols of the published methods, from the configuration to a student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import PRIORS, TINY, configure, tiny_context
from test_preflight import SILENT, WITHOUT

from cvdd.artifact import Artifact
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.labels import Labels, make_labels
from cvdd.chain.members import make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.priors import measure_prior
from cvdd.chain.students import make_student
from cvdd.chain.unit_files import load_images
from cvdd.labels.sources import HardLabels
from cvdd.schema import needs_priors, teachers_of
from cvdd.support.config_base import ConfigError

REAL = ("method=random_real", "method.iterations=0", "recipe.epochs=1", "protocol.eval_every=3")


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests: what is made anew has a hash of its own."""
    home = tmp_path_factory.mktemp("recipes")
    context = tiny_context(home, *REAL, store=home / "store")
    for name in context.config.committee.members:
        make_member(context, name)
    return home / "store"


def labelled(context: Context) -> Labels:
    return make_labels(context, make_images(context, PRIORS), PRIORS)


def studied(context: Context, labels: Labels) -> Artifact:
    return make_student(context, labels, "tiny_resnet18", context.config.students["tiny_resnet18"], 0)


RECIPES: dict[str, tuple[str, ...]] = {
    "rded": ("label=rded_stitched", "protocol=rded"),
    "gvbsm": ("label=gvbsm_imagenet1k", "label.batch_size=1024", "protocol=gvbsm_imagenet1k"),
    "edc": ("label=edc", "protocol=edc_cifar100"),
    "lpld": ("label=lpld_tiny_imagenet", "label.keep=0.5", "protocol=lpld_tiny_imagenet", "protocol.warmup=1"),
    "hard": ("label=hard", "protocol=hard"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_student_of_every_recipe(name: str, at: Path, tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *REAL, *RECIPES[name], store=at)
    check_before_work(context)
    labels = labelled(context)
    student = studied(context, labels)
    assert 0 <= student.metrics["top1"] <= 100
    assert student.metrics["loss"] > 0
    assert (labels.artifact is None) == (context.config.label.store == "none")


def test_hard_labels_have_neither_teachers_nor_a_store(at: Path, tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *REAL, *RECIPES["hard"], store=at)
    labels = labelled(context)
    assert (labels.artifact, labels.weights, labels.teachers, labels.parents) == (None, [], {}, [labels.images])
    assert teachers_of(context.config) == []
    assert not needs_priors(context.config)
    opened = labels.open(load_images(labels.images)[0])
    assert isinstance(opened, HardLabels)
    assert opened.count == 20


def test_a_balanced_average_is_another_artefact(at: Path, tmp_path: Path) -> None:
    contexts = [
        tiny_context(tmp_path, *REAL, f"label.weights={weights}", "label.bn_mode=running", store=at)
        for weights in ("equal", "balanced")
    ]
    equal, balanced = (labelled(context) for context in contexts)
    assert equal.weights == balanced.weights == pytest.approx([1 / 3] * 3)
    pixels = load_images(equal.images)[0]
    assert not torch.equal(equal.open(pixels).epoch(0)[1], balanced.open(pixels).epoch(0)[1])


def test_all_real_images_are_labelled_in_any_number(at: Path, tmp_path: Path) -> None:
    """300 images in batches of 64; the last has 44."""
    context = tiny_context(tmp_path, "recipe.epochs=1", "method.init=all", "method.iterations=0", store=at)
    context = context.differing({"label.batch_size": 64, "protocol.epochs": 1, "label.epochs": 1}, "")
    check_before_work(context)
    labels = labelled(context)
    assert labels.images.metrics["images"] == 300
    plan, logits = labels.open(load_images(labels.images)[0]).epoch(0)
    assert logits.shape == (300, 10)
    assert sorted(plan.index.tolist()) == list(range(300))
    assert studied(context, labels).metrics["loss"] > 0


def test_the_last_batch_of_all_images_is_checked_before_any_work(at: Path, tmp_path: Path) -> None:
    options = ("method.init=all", "method.iterations=0", "label.batch_size=299")
    context = tiny_context(tmp_path, *options, store=at, verb="relabel")
    with pytest.raises(ConfigError, match=r"label\.batch_size=299 leaves a last batch of 1 of 300 images"):
        check_before_work(context)


def test_a_pool_without_a_batch_is_refused_before_any_work(at: Path, tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "label.keep=0.01", store=at, verb="relabel")
    with pytest.raises(ConfigError, match=r"label\.keep=0\.01 keeps none of 9 label batches"):
        check_before_work(context)


def test_a_member_without_batchnorm_labels_if_it_says_so(at: Path, tmp_path: Path) -> None:
    options = (*REAL, *WITHOUT, *SILENT, "label.teachers=[extra]", "protocol.epochs=1")
    with pytest.raises(ConfigError, match=r"committee\.members\.extra\.bn_scale=0"):
        check_before_work(tiny_context(tmp_path, *options, store=at, verb="relabel"))
    context = tiny_context(tmp_path, *options, "+committee.members.extra.bn_scale=0", store=at)
    check_before_work(context)
    labels = labelled(context)
    assert labels.open(load_images(labels.images)[0]).epoch(0)[1].shape == (20, 10)


@pytest.mark.parametrize("more", [RECIPES["hard"], ("label.keep=0.5",)])
def test_priors_are_measured_with_an_observers_labels(more: tuple[str, ...], at: Path, tmp_path: Path) -> None:
    measured = ("prior.source=measured", "prior.values=null", "prior.images_per_class=1", "prior.iterations=1")
    context = tiny_context(tmp_path, *REAL, *more, *measured, "prior.epochs=1", "label.batch_size=5", store=at)
    priors = measure_prior(context, "resnet50")
    assert 0 <= priors.values["resnet50"] <= 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("label=hard",), r"protocol\.loss=kl learns from teachers, and label\.teachers=none; set protocol\.loss"),
        (("protocol.loss=cross_entropy",), r"protocol\.loss=cross_entropy would not use.*label=hard"),
        (("label.shuffle=2", "dataset.image_size=33"), r"label\.shuffle=2 needs an even dataset\.image_size, not 33"),
        (("label.teachers=[vgg]",), r"label\.teachers names vgg; the members are resnet18"),
    ],
)
def test_labels_and_protocol_that_do_not_agree(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(tmp_path, *TINY, *overrides)
