"""The configuration: every file composes, every wrong value is answered with what to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Compose, compose_raw
from helpers import PUBLISHED_IMAGES, PUBLISHED_LABELS
from omegaconf import OmegaConf

from cvdd.composition.config_directory import config_directory
from cvdd.composition.fields import fields
from cvdd.composition.validation import check
from cvdd.schema import RunConfig, needs_priors, teachers_of, with_overrides
from cvdd.support.config_base import ConfigError

CONF = config_directory()
VERBS = ("train", "distill", "relabel", "evaluate")
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.relative_to(CONF).parts[0] != "local")
PUBLISHED = [
    path for path in FILES if path.parts[0] == "experiment" and re.match(r"base|\w+_(table\d|results)_", path.parts[1])
]
"""Recipes of published numbers and what they share; test_experiments.py composes them."""
GROUP_FILES = [path for path in FILES if len(path.parts) > 1 and path not in PUBLISHED]

CIFAR = ("dataset=cifar10", "committee=small", "recipe=cifar", "prior=cifar10", "students=small", "protocol=paper")
LARGE = ("dataset=imagenette", "committee=imagenet", "recipe=imagenette", "students=imagenet", "patches=stitched")

COMPANIONS: dict[str, tuple[str, ...]] = {
    "dataset/cifar10": CIFAR,
    "dataset/cifar100": (*CIFAR, "prior=cifar100"),
    "dataset/tiny_imagenet": (*CIFAR, "recipe=tiny_imagenet", "prior=tiny_imagenet"),
    "dataset/imagenette": (*LARGE, "prior=imagenette"),
    "dataset/imagewoof": (*LARGE, "prior=measured"),
    "dataset/imagenet1k": (*LARGE, "recipe=imagenet1k", "committee=imagenet_pretrained", "prior=imagenet1k"),
    "committee/small": CIFAR,
    "committee/small_resnet18": CIFAR,
    "committee/imagenet": LARGE,
    "committee/imagenet_resnet18": LARGE,
    "committee/imagenet_pretrained": (*LARGE, "dataset=imagenet1k"),
    "debug/smoke_apm": ("label=hard", "method=apm_tiny", "protocol=method"),
    "debug/smoke_mtt": ("label=hard", "method=mtt_tiny", "protocol=method"),
    "debug/smoke_moco": ("recipe=tiny_moco",),
    "label/hald": ("protocol=hald",),
    "label/hard": ("protocol=hard_tiny",),
    "protocol/hald": ("label=hald",),
    "protocol/hard": ("label=hard",),
    "protocol/hard_tiny": ("label=hard",),
    "protocol/method": ("label=hard", "method=apm_tiny"),
    "label/given": ("compare=none", "method=given"),
}
"""What a file is used with, where the default of the other groups would make no sense."""


FIELDS: dict[str, tuple[str, ...]] = {
    "method/given": (f"method.given={PUBLISHED_IMAGES}",),
    "label/given": (f"method.given={PUBLISHED_IMAGES}", f"label.given={PUBLISHED_LABELS}", "protocol.epochs=3"),
}
"""Likewise, fields without which a file says too little."""


def overrides_for(path: Path) -> list[str]:
    group, name = path.parent.as_posix(), path.stem
    chosen, fields = [*COMPANIONS.get(f"{group}/{name}", ())], FIELDS.get(f"{group}/{name}", ())
    if group == "backbone":
        # A network has no place of its own in the configuration: it is used as a student here.
        chosen.append(f"+backbone@students.tried={name}")
        if name == "timm":
            chosen.append("students.tried.arguments.model_name=resnet18")
        return chosen
    if group in ("hydra/launcher", "hydra/sweeper"):
        return [f"{group}={name}"]
    # The later of two choices for a group would be refused as a repetition; the file under test decides.
    chosen = list({choice.partition("=")[0]: choice for choice in chosen}.values())
    return [*(choice for choice in chosen if not choice.startswith(f"{group}=")), f"{group}={name}", *fields]


@pytest.mark.parametrize("path", GROUP_FILES, ids=str)
def test_every_file_of_every_group_composes_and_passes(path: Path, compose: Compose) -> None:
    if path.parts[0] == "hydra" and path.parts[1] == "launcher":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    config = compose("evaluate", *overrides_for(path))
    if path.parts[0] == "dataset":
        assert config.dataset.name == path.stem
    if path.parts[0] == "backbone":
        assert "tried" in config.students


def test_the_published_recipe_has_two_names(compose: Compose) -> None:
    """And one identity, so that nothing is trained twice."""
    data = ("dataset=cifar10", "dataset.root=x")
    assert compose("train", *data, "recipe=paper") == compose("train", *data, "recipe=cifar")


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) == 1], ids=str)
def test_files_at_the_top_are_the_verbs_and_what_they_share(path: Path, compose: Compose) -> None:
    assert path.stem in (*VERBS, "base")
    if path.stem in VERBS:
        assert compose(path.stem).verb == path.stem


def test_every_file_starts_with_a_comment_that_says_what_it_is() -> None:
    silent = [str(path) for path in FILES if not (CONF / path).read_text().startswith("#")]
    assert not silent


def test_companions_name_files_that_exist() -> None:
    for name, companions in COMPANIONS.items():
        for choice in (name.replace("/", "="), *companions):
            assert (CONF / choice.replace("=", "/")).with_suffix(".yaml").is_file(), choice


@pytest.mark.parametrize("name", ["1", "10", "50"])
def test_ipc_presets_hold_the_number_in_their_name(name: str, compose: Compose) -> None:
    assert compose("evaluate", f"ipc={name}").ipc.images_per_class == int(name)


@pytest.mark.parametrize("name", [path.stem for path in GROUP_FILES if path.parts[0] == "temperature"])
def test_temperature_presets_hold_the_number_in_their_name(name: str, compose: Compose) -> None:
    assert compose("evaluate", f"temperature={name}").temperature.vote == float(name)


@pytest.mark.parametrize(
    ("experiment", "debug"),
    [
        ("demo", "smoke"),
        ("compare", "smoke"),
        ("cvdd_table1_cifar10_ipc10_r18", "smoke"),
        ("apm_table_a9_cifar10_ipc50", "smoke_apm"),
        ("mtt_cifar10_ipc1", "smoke_mtt"),
    ],
)
def test_a_moment_is_a_moment_whatever_the_experiment_says(experiment: str, debug: str, compose: Compose) -> None:
    config = compose("evaluate", f"experiment={experiment}", f"debug={debug}")
    assert (config.recipe.epochs, config.protocol.epochs, config.protocol.seeds) == (1, 1, [0])
    assert config.method.iterations in (0, 8)
    if experiment == "compare":
        assert config.compare["random_real"]["method.iterations"] == 0


def test_other_numbers_are_reached_by_their_field(compose: Compose) -> None:
    config = compose("evaluate", "ipc.images_per_class=7", "temperature.vote=2.5")
    assert (config.ipc.images_per_class, config.temperature.vote) == (7, 2.5)
    assert config.patches.images_per_class == 7


# --- wrong values -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "zero temperature": (("temperature.vote=0",), ("temperature.vote=0", "greater than 0")),
    "negative temperature": (("temperature.label=-1",), ("temperature.label=-1", "greater than 0")),
    "infinite temperature": (("temperature.vote=inf",), ("temperature.vote=inf", "finite")),
    "zero images": (("ipc.images_per_class=0",), ("ipc.images_per_class=0", "greater than 0")),
    "part of an image": (("ipc.images_per_class=1.5",), ("ipc.images_per_class=1.5", "whole number")),
    "large committee": (("committee.size=9",), ("committee.size=9", "choose 1 to 5", "densenet121")),
    "empty committee": (("committee.size=0",), ("committee.size=0", "greater than 0")),
    "word for a number": (("method.r_bn=much",), ("method.r_bn=much", "must be a number")),
    "word for a switch": (("label.flip=perhaps",), ("label.flip=perhaps", "true or false")),
    "no store": (("paths.store=",), ("paths.store=: names no directory; type paths.store=DIR", "unset CVDD_STORE")),
    "no data": (("paths.data=' '",), ("paths.data=: names no directory; type paths.data=DIR", "unset CVDD_DATA")),
    "no output": (("paths.output=",), ("paths.output=: names no directory; type paths.output=DIR, or leave it out",)),
    "number for a path": (("paths.store=[1]",), ("paths.store=[1]", "path")),
    "number for a list": (("protocol.seeds=3",), ("protocol.seeds=3", "list, as in [a,b]")),
    "no seeds": (("protocol.seeds=[]",), ("protocol.seeds=[]", "at least 1")),
    "one seed twice": (("protocol.seeds=[1,1]",), ("protocol.seeds=[1, 1]", "repeats")),
    "negative seed": (("seed=-1",), ("seed=-1", "at least 0")),
    "wrong choice": (("label.mix=cutmixx",), ("label.mix=cutmixx", "cutmix, mixup or none", "did you mean cutmix?")),
    "wrong number of a few": (("patches.factor=3",), ("patches.factor=3", "choose 1 or 2")),
    "share above one": (("method.crop_scale=[0.1,2]",), ("method.crop_scale[1]=2", "at most 1")),
    "half a range": (("method.crop_scale=[0.1]",), ("method.crop_scale", "too few values")),
    "two types": (("label.teachers=5",), ("label.teachers=5", "committee", "list, as in [a,b]")),
    "unknown key": (("+method.itterations=3",), ("method.itterations=3", "no such field", "did you mean iterations?")),
    "unknown section": (("+methods.lr=3",), ("methods=", "no such field", "did you mean method?")),
    "unknown key of a member": (
        ("+committee.members.resnet18.bn_scal=1",),
        ("committee.members.resnet18.bn_scal=1", "did you mean bn_scale?"),
    ),
    "dangerous builder": (
        ("committee.members.resnet18.backbone.target=os.system",),
        ("committee.members.resnet18.backbone.target", "os.system", "torchvision.models"),
    ),
    "missing section": (("~temperature",), ("temperature is missing", "choose temperature=NAME without ~temperature")),
    "missing students": (("~students",), ("students is missing", "choose students=NAME without ~students")),
    "missing members": (("~committee.members",), ("choose committee=NAME without ~committee.members",)),
    "missing number": (("~committee.size",), ("committee.size: a value is missing; set +committee.size=VALUE",)),
    "missing value": (
        ("+backbone@students.other=timm",),
        ("students.other", "model_name", "set students.other.arguments.model_name=VALUE"),
    ),
    "reference to nothing": (("seed=${nothing}",), ("seed", "cannot be resolved", "nothing")),
    "more epochs than labels": (
        ("protocol.epochs=9", "label.epochs=3"),
        ("protocol.epochs=9", "set label.epochs=9 or protocol.epochs=3"),
    ),
    "more parts than are averaged": (
        ("protocol.accumulation=4",),
        ("protocol.accumulation=4 would cut label.batch_size=10 into 5 parts", "to one of 1, 2, 3, 5"),
    ),
    "unknown teacher": (("label.teachers=[alexnet]",), ("label.teachers", "alexnet", "resnet18", "or committee")),
    "unknown observer": (("patches.observer=alexnet",), ("patches.observer=alexnet", "choose from resnet18")),
    "unknown prior observer": (("prior.observer=alexnet",), ("prior.observer=alexnet", "choose from resnet18")),
    "fixed draw without a list": (
        ("committee.draw=fixed",),
        ("committee.draw=fixed", "'committee.fixed=[[resnet18,resnet50]]', or committee.draw=in_turn"),
    ),
    "list without a fixed draw": (("committee.fixed=[[resnet18,resnet50]]",), ("type committee.draw=fixed, or leave",)),
    "stranger in a fixed draw": (
        ("committee.draw=fixed", "committee.fixed=[[resnet18,alexnet]]"),
        ("committee.fixed names alexnet", "resnet18"),
    ),
    "fixed draw of another size": (
        ("committee.draw=fixed", "committee.fixed=[[resnet18]]"),
        ("committee.fixed", "committee.size=2"),
    ),
    "given priors without numbers": (
        ("prior.source=given",),
        ("type 'prior.values={resnet18: PERCENT, ...}', or prior=measured", "prior.source=given"),
    ),
    "numbers that are measured": (
        ("+prior.values.resnet18=50",),
        ("type prior.source=given, or leave out prior.values",),
    ),
    "a member without prior": (
        ("prior=cifar10", "~prior.values.densenet121"),
        ("prior.values has no number for densenet121", "+prior.values.densenet121=PERCENT", "prior=measured"),
    ),
    "fewer patches than images": (
        ("patches.images_per_class=3",),
        ("patches.images_per_class=3", "ipc.images_per_class=10"),
    ),
    "nothing to keep": (("method.init=noise", "method.iterations=0"), ("method.iterations=0", "method.init=noise")),
    "nothing to optimise": (("method.ce=0", "method.r_bn=0"), ("method.ce=0", "method.r_bn=0")),
    "halves of one": (("label.batch_size=2",), ("label.batch_size=2", "label.halves=true")),
    "dropout in eval mode": (
        ("label.dropout=true", "label.bn_mode=running"),
        ("label.dropout=true", "label.bn_mode=batch"),
    ),
    "patches of no convolution": (
        ("method.statistics.patch=16",),
        ("method.statistics.patch=16", "method.statistics.layers=bn_and_conv"),
    ),
    "targets of no class": (
        ("method.statistics.class_statistics=moving",),
        ("method.statistics.class_statistics=moving", "method.statistics.class_share above 0"),
    ),
    "start of no average": (
        ("method.statistics.start=zero",),
        ("method.statistics.start=zero", "method.statistics.momentum"),
    ),
    "a prior of bare patches": (("prior.iterations=0",), ("prior.iterations=0", "greater than 0")),
    "batches of one": (("recipe.batch_size=1",), ("recipe.batch_size=1", "at least 2")),
    "compiled students of a method": (
        ("method=mtt_tiny", "label=hard", "protocol=method", "engine.compile_students=true"),
        ("protocol.student=method", "engine.compile_students=false"),
    ),
    "bf16 students of a method": (
        ("method=apm_tiny", "label=hard", "protocol=method", "engine.precision_students=bf16"),
        ("protocol.student=method", "engine.precision_students=fp32"),
    ),
    "a teacher twice": (
        ("method=apm_tiny", "method.apm.teachers.count=2", "method.apm.teachers.paths=[a,a]"),
        ("method.apm.teachers.paths", "twice"),
    ),
    "a range that falls": (
        ("method.crop_scale=[1.0,0.5]",),
        ("method.crop_scale", "must begin with the smaller number: [0.5,1]"),
    ),
    "moments that never fade": (("method.betas=[0.5,2]",), ("method.betas[1]=2", "less than 1")),
    "moments of students that never fade": (("protocol.betas=[0.5,1.0]",), ("protocol.betas[1]=1.0", "less than 1")),
    "text for a list": (("label.crop_scale=whole",), ("label.crop_scale=whole", "must be a list, as in [a,b]")),
    "too many classes per unit": (("dataset.classes_per_unit=11",), ("dataset.classes_per_unit=11", "use 1 to 10")),
    "row with an unknown key": (
        ("+compare.mine={method.itterations:3}",),
        ("compare.mine", "method.itterations=3", "did you mean method.iterations?"),
    ),
    "row with a wrong value": (
        ("+compare.mine={method.init:patchs}",),
        ("compare.mine", "method.init=patchs", "did you mean patches?"),
    ),
    "row of the command's own name": (
        ("+compare.cvdd={method.lr:3}",),
        ("compare.cvdd", "(method.name=cvdd)", "~compare.cvdd"),
    ),
    "row that contradicts itself": (
        ("+compare.mine={committee.size:9}",),
        ("compare.mine", "committee.size=9", "choose 1 to 5"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_answered_with_what_to_type(name: str, tmp_path: Path) -> None:
    overrides, expected = WRONG[name]
    composed = compose_raw(tmp_path, "evaluate", *overrides)
    with pytest.raises(ConfigError) as caught:
        check(composed)
    for part in expected:
        assert part in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    composed = compose_raw(tmp_path, "evaluate", "temperature.vote=0", "label.mix=other", "+recipe.depth=3")
    with pytest.raises(ConfigError) as caught:
        check(composed)
    told = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in told] == ["recipe.depth", "temperature.vote", "label.mix"]


SEVERAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "of a section": (
        ("protocol.seeds=[1,1]", "protocol.warmup=500"),
        ("protocol.seeds=[1, 1] repeats a seed", "protocol.warmup=500 must be less than protocol.epochs=200"),
    ),
    "of a section inside another": (
        ("method.statistics.patch=16", "method.statistics.start=zero"),
        ("method.statistics.patch=16 is of convolutions", "method.statistics.start=zero begins a moving average"),
    ),
    "of the data": (
        ("dataset.test_resize=10", "dataset.jitter=99"),
        ("dataset.test_resize=10 is smaller than", "dataset.jitter=99: must be smaller"),
    ),
    "across sections": (
        ("patches.observer=alexnet", "label.shuffle=2", "dataset.image_size=33", "label.epochs=3"),
        (
            "patches.observer=alexnet is not a member",
            "label.shuffle=2 needs an even dataset.image_size",
            "protocol.epochs=200 needs labels of as many epochs",
        ),
    ),
    "of a row": (
        ("+compare.mine={protocol.seeds: [1, 1], protocol.warmup: 500}",),
        ("compare.mine: protocol.seeds=[1, 1] repeats a seed", "compare.mine: protocol.warmup=500 must be less"),
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_all_that_does_not_agree_is_told_a_line_each(name: str, tmp_path: Path) -> None:
    overrides, starts = SEVERAL[name]
    with pytest.raises(ConfigError) as caught:
        check(compose_raw(tmp_path, "evaluate", *overrides))
    told = str(caught.value).splitlines()
    assert len(told) == len(starts)
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(start)


def test_an_unknown_key_inside_a_file_is_refused(tmp_path: Path) -> None:
    composed = compose_raw(tmp_path, "evaluate")
    OmegaConf.set_struct(composed, False)
    composed.protocol = OmegaConf.merge(composed.protocol, {"epoch": 3})
    with pytest.raises(ConfigError, match="protocol.epoch=3: there is no such field; did you mean epochs?"):
        check(composed)


def test_priors_are_asked_for_only_where_they_count(compose: Compose) -> None:
    config = compose(
        "evaluate", "prior=cifar10", "~prior.values.densenet121", "committee.voter=equal", "label.weights=equal"
    )
    assert not needs_priors(config)
    assert needs_priors(compose("evaluate"))


def test_teachers_come_in_the_order_of_the_committee(compose: Compose) -> None:
    assert teachers_of(compose("evaluate", "label.teachers=[densenet121,resnet18]")) == ["resnet18", "densenet121"]


def test_replacing_an_unknown_field_is_refused(compose: Compose) -> None:
    with pytest.raises(ConfigError, match="method.nothing"):
        with_overrides(compose("evaluate"), {"method.nothing": 1})


# --- help -------------------------------------------------------------------------------------------------------------


def test_every_field_has_one_line_of_help() -> None:
    assert len(fields()) > 100
    for field in fields():
        assert field.description, field.key
        assert "\n" not in field.description, field.key
        assert field.section_help, field.section


def test_the_parts_of_the_configuration_are_all_described() -> None:
    described = {field.key.partition(".")[0] for field in fields()}
    assert described == set(RunConfig.model_fields)
    assert {"students.NAME.target", "committee.members.NAME.backbone.target"} <= {field.key for field in fields()}


def test_units_are_split_in_the_recover_loop_alone(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.split_units=true splits units of the recover loop"):
        compose("distill", "method=apm_tiny", "trainer=ddp", "trainer.devices=2", "trainer.split_units=true")
