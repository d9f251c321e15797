"""Every published number that has a recipe: the recipe composes and agrees with what was transcribed once."""

from __future__ import annotations

import copy
import csv
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_repository import ConfigRepository

from cvdd.composition.config_directory import config_directory
from cvdd.composition.validation import check
from cvdd.labels.sources import check_batches
from cvdd.schema import ExpectedConfig, RunConfig
from cvdd.synthesis.committee import draw_members

CONF = config_directory()
FOLDER = CONF / "experiment"
OTHERS = ("apm_", "mtt_")
"""Recipes that are held against tables of their own, in the tests of their methods."""
RECIPES = {
    path.stem: path
    for path in sorted(FOLDER.glob("*.yaml"))
    if "\nexpected:" in path.read_text() and not path.stem.startswith(OTHERS)
}
STUDENTS = {"r18": "resnet18", "r50": "resnet50", "r101": "resnet101"}
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenette": 10, "imagewoof": 10, "imagenet1k": 1000}
SETTINGS = {"sre2l_pp": "cvdd", "fadrm_plus": "fadrm", "psm": "fadrm", "psm_plus": "fadrm"}
"""Methods whose students are trained like those of another one."""


@functools.cache
def rows(name: str) -> list[dict[str, str]]:
    with (CONF / "reference" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def row(name: str, **wanted: Any) -> dict[str, str]:
    (found,) = [row for row in rows(name) if all(row[key] in (str(value), "all") for key, value in wanted.items())]
    return found


def numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.split()]


RESULTS = {result["recipe"]: result for result in rows("results")}


@pytest.fixture(scope="module", autouse=True)
def one_initialisation() -> Iterator[None]:
    """Compose hundreds of configurations in seconds: Hydra is initialised once, and each file is read once."""
    read, known = ConfigRepository.load_config, {}

    def load(repository: ConfigRepository, config_path: str) -> Any:
        if config_path not in known:
            known[config_path] = read(repository, config_path)
        return copy.deepcopy(known[config_path])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield


def composed(name: str) -> RunConfig:
    places = [f"paths.{key}=somewhere" for key in ("data", "store", "output")]
    local = ["~local"] if (CONF / "local").is_dir() else []
    return check(hydra_compose("evaluate", [*places, *local, f"experiment={name}"]))


def test_recipes_and_transcribed_results_are_the_same() -> None:
    assert set(RECIPES) == set(RESULTS)
    assert len(RESULTS) == len(rows("results")) > 200


def test_every_shared_file_is_used() -> None:
    files = [*FOLDER.glob("*.yaml"), *(FOLDER / "base").glob("*.yaml")]
    used = {line.strip(" -\n") for path in files for line in path.read_text().splitlines()}
    shared = {path.stem for path in (FOLDER / "base").glob("*.yaml")}
    assert shared
    assert all(f"base/{name}" in used or name in used for name in shared)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_agrees_with_the_reference(name: str) -> None:
    config, result = composed(name), RESULTS[name]
    method, dataset, ipc = result["method"], result["dataset"], int(result["ipc"])
    assert (config.method.name, config.dataset.name, config.ipc.images_per_class) == (method, dataset, ipc)
    agrees_about_members(config, "psm" if method.startswith("psm") else "cvdd")
    agrees_about_images(config, row("images", method=method, dataset=dataset, ipc=ipc))
    agrees_about_labels(config, row("labels", method=method, dataset=dataset, ipc=ipc), result["variant"])
    agrees_about_students(config, result)
    agrees_about_the_result(config, result)
    if method == "cim":
        agrees_about_cims_students(config)
    if method == "cvdd":
        agrees_about_the_vote(config, result["variant"])
    command = f"#   python evaluate.py experiment={name}\n"
    assert command in RECIPES[name].read_text()


def agrees_about_members(config: RunConfig, settings: str) -> None:
    reference, recipe = row("members", settings=settings, dataset=config.dataset.name), config.recipe
    pretrained = [member.backbone.pretrained for member in config.committee.members.values()]
    if reference["epochs"]:
        assert (recipe.epochs, recipe.batch_size) == (int(reference["epochs"]), int(reference["batch"]))
    if not reference["optimizer"]:
        assert all(pretrained)
        return
    assert not any(pretrained)
    assert (recipe.optimizer, recipe.crop) == (reference["optimizer"], reference["crop"])
    assert (recipe.lr, recipe.weight_decay) == (float(reference["lr"]), float(reference["weight_decay"]))
    assert (recipe.cosine_period or recipe.epochs) == int(reference["cosine_period"])
    assert recipe.schedule == "cosine"
    if recipe.optimizer == "sgd":
        assert recipe.momentum == float(reference["momentum"])


def agrees_about_images(config: RunConfig, reference: dict[str, str]) -> None:
    method, patches = config.method, config.patches
    assert (method.init, method.iterations) == (reference["init"], int(reference["iterations"]))
    if method.init == "patches":
        assert (patches.difficulty, patches.factor) == (reference["difficulty"], int(reference["factor"]))
        assert (patches.crops, patches.candidates) == (int(reference["crops"]), int(reference["candidates"]))
        assert (patches.observer, patches.crop_scale) == ("resnet18", (0.08, 1.0))
        # One set of initial images serves all IPC of an optimised method; RDED ranks them for each.
        assert patches.images_per_class == (50 if method.iterations else config.ipc.images_per_class)
    if not method.iterations:
        return
    graded = reference["forward_share"] and (float(reference["forward_share"]), reference["start"])
    found = method.difficulty
    assert (found and (found.forward_share, found.start)) == (graded or None)
    assert found is None or found.variance_weight == 1
    assert (method.classes_per_unit, method.jitter) == (int(reference["unit"]), int(reference["jitter"]))
    assert (method.lr, method.r_bn) == (float(reference["lr"]), float(reference["r_bn"]))
    assert method.first_bn_multiplier == float(reference["first_bn"])
    assert (list(method.betas), method.eps) == (numbers(reference["betas"]), float(reference["eps"]))
    lowest = reference["lowest_crop"]
    assert (method.crop_scale, method.crop_schedule) == (
        (lowest and (float(lowest), 1.0)) or None,
        reference["crop_schedule"],
    )
    assert (method.pad, method.anchors and method.anchors.layer) == (
        int(reference["pad"] or 0),
        reference["anchors"] or None,
    )
    if method.anchors is not None:
        assert (method.ce, method.schedule, method.factor) == (0, "constant", int(reference["factor"]))
        assert (method.anchors.weight, method.anchors.distance, method.cutout) == (1, "l1", 0.5)
        assert patches.candidates == int(reference["candidates"])
    if method.init == "medium":
        assert (patches.observer, patches.candidates) == ("resnet18", int(reference["candidates"]))
    assert (method.early_late, method.composer) == (reference["early_late"] == "true", reference["composer"] or "slots")
    assert (method.stages, method.residual) == (int(reference["stages"]), float(reference["residual"]))
    assert (method.sizes or []) == numbers(reference["sizes"])
    assert method.turns == reference["turns"]
    assert method.voters == ("drawn" if reference["voters"] == "drawn" else reference["voters"].split())


def agrees_about_labels(config: RunConfig, reference: dict[str, str], variant: str) -> None:
    label, protocol = config.label, config.protocol
    assert (label.batch_size, label.mix) == (int(reference["batch"]), reference["mix"])
    assert label.crop_scale == (float(reference["lowest_crop"]), 1.0)
    assert label.bn_mode == ("running" if variant == "no_bssl" else reference["batchnorm"])
    teachers = reference["teachers"]
    assert label.teachers == (teachers if teachers == "committee" else teachers.split())
    assert label.weights == (reference["weights"] or label.weights)
    assert label.epochs == protocol.epochs
    assert label.randaugment == (config.method.name == "delt")
    check_batches(config.ipc.images_per_class * CLASSES[config.dataset.name], label)
    assert protocol.accumulation == int(reference["accumulation"])
    assert protocol.temperature == float(reference["temperature"])
    assert protocol.weight_decay == float(reference["weight_decay"])


def agrees_about_students(config: RunConfig, result: dict[str, str]) -> None:
    reference = row(
        "students",
        settings=SETTINGS.get(result["method"], result["method"]),
        dataset=result["dataset"],
        student=result["student"],
        ipc=result["ipc"],
        epochs=result["epochs"],
    )
    assert config.protocol.epochs == int(result["epochs"])
    assert (config.protocol.lr, config.protocol.eta) == (float(reference["lr"]), float(reference["eta"]))
    networks = {student.target for student in config.students.values()}
    assert len(networks) == len(config.students) == (11 if result["table"] == "CV-DD table 4" else 1)


def agrees_about_cims_students(config: RunConfig) -> None:
    label, protocol = config.label, config.protocol
    assert (label.dsa, label.store, label.factor, label.flip) == (True, "none", 2, config.dataset.mirror)
    assert (protocol.loss, protocol.hard_label_weight, protocol.optimizer) == ("mse", 0, "adamw")
    assert (protocol.schedule, protocol.decay, protocol.betas) == ("two_steps", "all", (0.9, 0.999))
    assert protocol.eval_every * 4 == protocol.epochs


def agrees_about_the_result(config: RunConfig, result: dict[str, str]) -> None:
    expected = config.expected
    assert expected is not None
    assert expected.value == (float(result["top1"]) if result["top1"] else None)
    assert expected.tolerance == ((3.0 if result["ipc"] == "1" else 1.5) if result["top1"] else None)
    assert result["table"].endswith(expected.table.removesuffix(" table"))
    assert expected.student.removeprefix("imagenet_") == STUDENTS[result["student"]]
    assert config.students[expected.student].name == STUDENTS[result["student"]]
    # The list of recipes reads the files themselves.
    assert ExpectedConfig(**yaml.safe_load(RECIPES[result["recipe"]].read_text())["expected"]) == expected


def agrees_about_the_vote(config: RunConfig, variant: str) -> None:
    committee, dataset, ipc = config.committee, config.dataset.name, config.ipc.images_per_class
    priors = row("priors", dataset=dataset, release="final")
    members = list(committee.members)
    assert config.prior.values == {name: float(priors[name]) for name in members}
    assert (config.temperature.vote, config.temperature.label) == (5, 10)
    assert committee.voter == (variant if variant in ("equal", "random") else "prior")
    assert committee.size == (3 if variant == "n3" else 2)
    if ipc == 50:
        assert committee.draw == "random"
        return
    wanted = [
        set(draw["members"].split())
        for draw in rows("draws")
        if int(draw["size"]) == committee.size and int(draw["ipc"]) == ipc and draw["dataset"] in ("any", dataset)
    ]
    fixed = [[members.index(name) for name in names] for names in committee.fixed]
    values = [config.prior.values[name] for name in members]
    drawn = [draw_members(committee.draw, committee.size, slot, values, 0, fixed) for slot in range(ipc)]
    assert [{members[index] for index in draw} for draw in drawn] == wanted
