"""Every field stands in the composed configuration, to be set without a plus sign, and every method can be tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose, compose_raw
from omegaconf import OmegaConf
from test_config import FIELDS, GROUP_FILES, overrides_for

from cvdd.composition.fields import fields

KEYS = [field.key for field in fields()]
FILES = [path for path in GROUP_FILES if path.parts[0] not in ("hydra", "experiment", "sweep")]


def missing(tree: Any, key: str) -> Iterator[str]:
    """Yield where a field is absent; the entries of a dictionary, NAME in its key, are looked at one by one."""
    first, _, rest = key.partition(".")
    if tree is None:
        # A section that is null is set as a whole.
        return
    if first != "NAME" and first not in tree:
        yield key
        return
    for name in tree if first == "NAME" else [first]:
        if rest:
            yield from (f"{name}.{found}" for found in missing(tree[name], rest))


def composed(tmp_path: Path, *overrides: str) -> Mapping[str, Any]:
    tree = OmegaConf.to_container(compose_raw(tmp_path, "evaluate", *overrides))
    assert isinstance(tree, dict)
    return tree


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_field_is_mentioned_whatever_is_chosen(path: Path, tmp_path: Path) -> None:
    tree = composed(tmp_path, *overrides_for(path))
    assert not [found for key in KEYS for found in missing(tree, key)]


def test_the_search_finds_what_is_missing() -> None:
    tree = {"members": {"a": {"size": 1}, "b": {}}, "digits": None}
    assert list(missing(tree, "members.NAME.size")) == ["members.b.size"]
    assert list(missing(tree, "name")) == ["name"]
    assert list(missing(tree, "digits.seed")) == []


@pytest.mark.parametrize(
    "override",
    [
        "recipe.optimizer=sgd recipe.nesterov=true",
        "method.grid_every=250",
        "method.jpeg_round_trip=true",
        "label.stack=4",
        "protocol.betas=[0.8,0.9]",
        "logger.wandb_mode=offline",
        "logger.project=mine",
        "trainer.threads=1",
        "students.tiny_resnet18.pretrained=true",
        "students.tiny_resnet18.min_size=16",
        "committee.members.resnet50.bn_scale=0.5",
        "committee.members.resnet50.checkpoint=some/file.pth",
        "committee.members.resnet50.backbone.min_size=16",
    ],
)
def test_fields_are_set_without_a_plus_sign(override: str, compose: Compose) -> None:
    words = override.split()
    key, _, value = words[-1].partition("=")
    node: Any = compose("evaluate", *words).model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    assert str(node).lower().replace(" ", "") == value


def test_priors_are_given_without_a_plus_sign(compose: Compose) -> None:
    values = {"resnet18": 40.0, "resnet50": 30.0, "shufflenetv2": 35.0, "mobilenetv2": 36.0, "densenet121": 37.0}
    given = f"prior.values={{{', '.join(f'{name}: {value}' for name, value in values.items())}}}"
    assert compose("evaluate", "prior.source=given", given).prior.values == values
    one_by_one = [f"+prior.values.{name}={value}" for name, value in values.items()]
    assert compose("evaluate", "prior.source=given", *one_by_one).prior.values == values
    assert compose("evaluate", "prior=cifar10", "prior.values.resnet18=1").prior.values["resnet18"] == 1


@pytest.mark.parametrize("name", [path.stem for path in GROUP_FILES if path.parts[0] == "method"])
def test_every_method_can_be_tried_for_a_moment(name: str, compose: Compose) -> None:
    """Those that keep their initial images, and those with engines of their own, as the file says."""
    kept = name in ("random_real", "rded", "patches", "given", "full")
    own = next((engine for engine in ("apm", "mtt") if name.startswith(engine)), "mtt" if name == "tesla" else None)
    smoke = "debug=smoke" if own is None else f"debug=smoke_{own}"
    with_it = ("label=hard", "protocol=method") if own else ("method.iterations=0",) if kept else ()
    compose("distill", f"method={name}", smoke, *with_it, *FIELDS.get(f"method/{name}", ()))
