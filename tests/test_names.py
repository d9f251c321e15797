"""Names that end up in paths, and those that may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import compose_raw
from omegaconf import DictConfig, OmegaConf

from cvdd.composition.validation import check
from cvdd.support.config_base import ConfigError


def renamed(key: str, name: str, tmp_path: Path) -> DictConfig:
    """A configuration in which something has another name; * stands for the key of whatever is there."""
    composed = compose_raw(tmp_path, "evaluate")
    *path, last = key.split(".")
    if last == "*":
        held = OmegaConf.to_container(OmegaConf.select(composed, ".".join(path)))
        assert isinstance(held, dict)
        OmegaConf.update(composed, ".".join(path), {**held, name: next(iter(held.values()))}, force_add=True)
    else:
        OmegaConf.update(composed, key, name)
    return composed


@pytest.mark.parametrize("name", ["a/b", "x/../../escaped", "..", ".hidden", "/a", "a\\b", "", "a\n"])
@pytest.mark.parametrize(
    "key", ["method.name", "label.name", "protocol.name", "committee.members.*", "students.*", "compare.*"]
)
def test_names_that_would_lead_to_other_directories_are_refused(key: str, name: str, tmp_path: Path) -> None:
    told = re.escape(f"{key.replace('*', name)}: {name!r} cannot be part of a file's name; use letters, digits")
    with pytest.raises(ConfigError, match=told):
        check(renamed(key, name, tmp_path))


@pytest.mark.parametrize("name", ["lr.003_bn1", "prior-resnet18", "N2+T0.5", "two words", "-", "\u00e9t\u00e9"])
@pytest.mark.parametrize("key", ["method.name", "label.name", "protocol.name", "students.*", "compare.*"])
def test_other_names_are_allowed(key: str, name: str, tmp_path: Path) -> None:
    check(renamed(key, name, tmp_path))


def test_a_row_may_not_rename_its_method_either(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.mine: method\.name: 'a/b' cannot be part"):
        check(compose_raw(tmp_path, "evaluate", "+compare.mine={method.name:a/b}"))
