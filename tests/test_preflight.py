"""What a later stage would refuse is refused before any work; networks of timm pass and work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY, configure, tiny_context

from cvdd.artifact import Store
from cvdd.artifact.cleaning import sealed
from cvdd.backbones import batchnorm_layers
from cvdd.chain.context import Context
from cvdd.chain.members import load_network, make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.unit_files import load_history
from cvdd.commands.runtime import Invocation, run
from cvdd.support.config_base import ConfigError
from cvdd.verbs.made import Made


def timm_network(place: str, model: str) -> tuple[str, str]:
    return (f"+backbone@{place}=timm", f"{place}.arguments.model_name={model}")


WITHOUT = timm_network("committee.members.extra.backbone", "test_vit")
"""A member without BatchNorm."""
VOTES = ("committee.draw=fixed", "committee.fixed=[[resnet18,extra]]", "+prior.values.extra=20")
"""It votes on every slot."""
SILENT = ("committee.draw=fixed", "committee.fixed=[[resnet18,resnet50]]", "+prior.values.extra=20")
"""It does not."""
MEASURED = ("prior.source=measured", "prior.values=null", "prior.images_per_class=2", "prior.iterations=2")
NO_STATISTICS = r"member extra has no BatchNorm layer.*method\.r_bn=0.*label\.bn_mode=running"

REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "voter": ("distill", (*WITHOUT, *VOTES), NO_STATISTICS),
    "teacher": ("relabel", (*WITHOUT, *SILENT), NO_STATISTICS),
    "voter of a row": (
        "evaluate",
        (*WITHOUT, *SILENT, "label.bn_mode=running", "+compare.alone={committee.fixed: [[resnet18, extra]]}"),
        NO_STATISTICS,
    ),
    "measured member": ("distill", (*WITHOUT, *SILENT, *MEASURED, "prior.epochs=1"), NO_STATISTICS),
    "observer": (
        "distill",
        (*WITHOUT, *SILENT, *MEASURED, "prior.epochs=1", "method.r_bn=0", "prior.observer=extra"),
        NO_STATISTICS,
    ),
    "graphs without a GPU": ("train", ("engine.cuda_graphs=true",), r"engine\.cuda_graphs=true needs a GPU"),
    "last batch": ("relabel", ("label.batch_size=9",), r"^label\.batch_size=9 leaves a last batch of 2 of 20 images"),
    "last batch of a row": (
        "evaluate",
        ("+compare.larger={label.batch_size: 9}",),
        r"^compare\.larger: label\.batch_size=9 leaves a last batch of 2 of 20 images",
    ),
    "last batch of the measurement": (
        "distill",
        (*MEASURED, "prior.epochs=1", "prior.images_per_class=1", "label.batch_size=9"),
        r"last batch of 1 of 10 images that measure a prior, .*, or raise prior\.images_per_class, or give",
    ),
    "few images for both": (
        "distill",
        (*MEASURED, "prior.epochs=1", "method=random_real", "method.iterations=0", "ipc.images_per_class=31"),
        r"class 0 has 30 images; ipc\.images_per_class=31 needs as many",
    ),
    "unknown student": (
        "evaluate",
        timm_network("students.mine", "resnet81"),
        r"students\.mine: backbone\.arguments\.model_name=resnet81 is no timm model; closest: .*resnet",
    ),
    "unknown member": (
        "train",
        (*timm_network("committee.members.extra.backbone", "resnet81"), "+prior.values.extra=20"),
        r"committee\.members\.extra: .*is no timm model",
    ),
    "images of another size": (
        "evaluate",
        timm_network("students.mine", "vit_tiny_patch16_224"),
        r"students\.mine: vit_tiny_patch16_224 takes no images of 32 pixels: .*224",
    ),
    "small images": (
        "evaluate",
        ("students.tiny_resnet18.min_size=64",),
        r"students\.tiny_resnet18: resnet18 is made for images of at least 64 pixels, and dataset\.image_size=32",
    ),
    "small images for a member that herds": (
        "distill",
        (
            *("method.voters=[resnet18,resnet50]", "label.teachers=[resnet18]"),
            "method.init=herding",
            "committee.members.shufflenetv2.backbone.min_size=64",
        ),
        r"committee\.members\.shufflenetv2: shufflenetv2 is made for images of at least 64 pixels",
    ),
    "few real images": (
        "distill",
        ("method.init=real", "ipc.images_per_class=31"),
        r"class 0 has 30 images; ipc\.images_per_class=31 needs as many",
    ),
    "few images because few were asked for": (
        "distill",
        ("dataset.train_per_class=3", "dataset.test_per_class=3", "ipc.images_per_class=10"),
        r"class 0 has 3 images and offers 3 candidates for 10 patches.* Or raise dataset\.train_per_class=3, which",
    ),
    "few real images of a row": (
        "evaluate",
        ("+compare.real={method.init: real, ipc.images_per_class: 31, method.iterations: 0}",),
        r"^compare\.real: class 0 has 30 images; ipc\.images_per_class=31 needs as many",
    ),
    "few real images to herd": (
        "distill",
        ("method.init=herding", "ipc.images_per_class=11"),
        r"patches\.candidates=10 images of class 0 are looked at, of 30; ipc\.images_per_class=11 needs as many. Raise",
    ),
    "few images for the measurement": (
        "distill",
        (*MEASURED, "prior.epochs=1", "method.init=real", "prior.images_per_class=31", "ipc.images_per_class=1"),
        r"class 0 has .* and offers 10 candidates for 31 patches, .* Lower prior\.images_per_class",
    ),
    "few candidates": (
        "distill",
        ("ipc.images_per_class=11",),
        r"class 0 has .* and offers 10 candidates for 11 patches",
    ),
    "a batch of one image": (
        "evaluate",
        ("label.bn_mode=running", "label.batch_size=19", "students.tiny_resnet18.arguments.stem_stride=16"),
        r"label.batch_size=19 leaves a batch of a single one of 20 images, which students.tiny_resnet18 cannot",
    ),
    "few candidates for the measurement": (
        "distill",
        (*MEASURED, "prior.epochs=1", "prior.images_per_class=12"),
        r"class 0 has .* and offers 10 candidates for 12 patches",
    ),
}


@pytest.mark.parametrize(("verb", "overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(verb: str, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    config = configure(tmp_path, *TINY, *overrides, verb=verb)
    with pytest.raises(ConfigError, match=message):
        run(config, Invocation(()))
    assert {artifact.kind for artifact in sealed(config.paths.store)} <= {"data"}
    assert not list(config.paths.output.iterdir())


def test_what_is_refused_has_no_price(tmp_path: Path) -> None:
    verb, overrides, message = REFUSED["voter of a row"]
    config = configure(tmp_path, *TINY, *overrides, "cost=true", verb=verb)
    with pytest.raises(ConfigError, match=message):
        run(config, Invocation(()))
    assert not (config.paths.store / "predictions").exists()


def test_threads_are_those_of_one_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of a multirun may run in one process, and bits depend on the number of threads."""
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr("cvdd.commands.runtime.check_before_work", lambda context: seen.append(torch.get_num_threads()))
    monkeypatch.setattr("cvdd.commands.runtime.VERBS", {"train": lambda context, lines: Made(1.0)})
    assert run(configure(tmp_path, *TINY, f"trainer.threads={before + 1}", verb="train"), Invocation(())) == Made(1.0)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


PASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "trained alone": ("train", (*WITHOUT, "+prior.values.extra=20")),
    "not drawn": ("distill", (*WITHOUT, *SILENT)),
    "no BatchNorm term": ("distill", (*WITHOUT, *VOTES, "method.r_bn=0")),
    "no BatchNorm term of its own": (
        "distill",
        (*WITHOUT, *VOTES, "+committee.members.extra.bn_scale=0"),
    ),
    "nothing is optimised": ("distill", (*WITHOUT, *VOTES, "method=patches", "method.iterations=0")),
    "no teacher": ("relabel", (*WITHOUT, *SILENT, "label.teachers=[resnet18]")),
    "running statistics": ("relabel", (*WITHOUT, *VOTES, "method.r_bn=0", "label.bn_mode=running")),
    "running statistics of small batches": ("relabel", ("label.batch_size=9", "label.bn_mode=running")),
    "labels are not made": ("distill", ("label.batch_size=9",)),
    "small images for members that nothing needs": (
        "evaluate",
        (
            *("method=random_real", "method.iterations=0", "label=hard", "protocol.loss=cross_entropy"),
            "committee.members.resnet18.backbone.min_size=64",
        ),
    ),
    "small images for a member that neither votes nor herds": (
        "distill",
        (
            *("method.voters=[resnet18,resnet50]", "label.teachers=[resnet18]"),
            "committee.members.shufflenetv2.backbone.min_size=64",
        ),
    ),
    "smaller images on request": ("evaluate", ("students.tiny_resnet18.min_size=32",)),
}


@pytest.mark.parametrize(("verb", "overrides"), PASSES.values(), ids=PASSES)
def test_passes(verb: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    check_before_work(tiny_context(tmp_path, *overrides, verb=verb))


def test_classes_known_from_the_configuration_need_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tmp_path, "label.batch_size=9", verb="relabel")
    monkeypatch.setattr(type(context), "data", lambda self: pytest.fail("the data were loaded"))
    with pytest.raises(ConfigError, match=r"label\.batch_size=9"):
        check_before_work(context)


FOLDER = ("dataset=image_folder", "dataset.name=mine", "dataset.root=nowhere", "dataset.image_size=16")
NOBODY = ("compare=none", "method=random_real", "label=hard", "protocol=hard_tiny")


@pytest.mark.parametrize("verb", ["train", "distill", "relabel", "evaluate"])
def test_images_too_small_for_a_network_are_refused_before_the_data_are_read(verb: str, tmp_path: Path) -> None:
    """The classes of a folder are known only once it is read."""
    config = configure(tmp_path, *FOLDER, verb=verb)
    with pytest.raises(ConfigError, match=r"^committee\.members\.\w+: .* 32 pixels, and dataset\.image_size=16"):
        run(config, Invocation(()))


def test_images_too_small_for_a_student_are_refused_before_the_data_are_read(tmp_path: Path) -> None:
    """No member is needed for real images with labels of their own, whatever images it is made for."""
    config = configure(tmp_path, *FOLDER, *NOBODY, verb="evaluate")
    with pytest.raises(ConfigError, match=r"^students\.\w+: .* 32 pixels, and dataset\.image_size=16"):
        run(config, Invocation(()))


def row_with(root: Path, *row: str) -> Context:
    """A comparison of one small network with a row of its own."""
    typed = ",".join(f"'{override}'" for override in row)
    overrides = ("dataset.digits.train_placements=1", "dataset.digits.test_placements=1", f"+compare.row=[{typed}]")
    config = configure(root, "committee=tiny_resnet18", "compare=none", *overrides)
    return Context(config, Store(config.paths.store), torch.device("cpu"))


def test_a_row_may_have_members_that_the_command_has_not(tmp_path: Path) -> None:
    check_before_work(row_with(tmp_path, "committee=tiny"))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("committee.members.vit.bn_scale=1",), r"member vit has no BatchNorm layer"),
        (
            ("committee.members.vit.backbone.min_size=64",),
            r"committee\.members\.vit: \w+ is made for images of at least 64",
        ),
    ],
)
def test_members_of_a_row_are_looked_at_too(row: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^compare\.row: {problem}"):
        check_before_work(row_with(tmp_path, "committee=tiny_mixed", *row))


# --- networks of timm -------------------------------------------------------------------------------------------------

SHORT = ("recipe.epochs=1", "method.iterations=2", "protocol.epochs=1", "trainer.threads=1")


def test_a_member_and_a_student_of_timm(tmp_path: Path) -> None:
    """The member has BatchNorm layers of timm's own kind; its statistics are matched, and those of batches label."""
    member = timm_network("committee.members.extra.backbone", "test_efficientnet")
    student = timm_network("students.mine", "test_resnet")
    overrides = (*TINY, *SHORT, *member, *student, *VOTES)
    config = configure(tmp_path, *overrides)
    top1 = run(config, Invocation(overrides)).metric
    assert top1 is not None
    context = tiny_context(tmp_path, *SHORT, *member, *student, *VOTES)
    artifact = make_member(context, "extra")
    network = load_network(context, artifact, config.committee.members["extra"].backbone)
    assert len(batchnorm_layers(network)) == artifact.metrics["batchnorm_layers"] == 13
    assert batchnorm_layers(network)[0][1].num_batches_tracked > 0
    (images,) = (found for found in sealed(context.store.root) if found.kind == "images")
    history = load_history(images)["slot0000_block0000"]
    assert list(history["weights"]) == ["resnet18", "extra"]
    assert history["rows"][-1]["bn"]["extra"] > 0
    assert (config.paths.output / "results.csv").read_text().count("\ncvdd,mine,") == 1


def test_a_member_without_batchnorm_votes_by_its_cross_entropy(tmp_path: Path) -> None:
    overrides = (*TINY, *SHORT, *WITHOUT, *VOTES, "method.r_bn=0", "label.bn_mode=running")
    config = configure(tmp_path, *overrides)
    assert run(config, Invocation(overrides)) is not None
    (images,) = (found for found in sealed(config.paths.store) if found.kind == "images")
    row = load_history(images)["slot0000_block0000"]["rows"][-1]
    assert row["ce"]["extra"] > 0
    assert row["bn"]["extra"] == 0
