"""How networks are trained and images labelled: settings that cannot be used, or that nothing would read."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose_raw

from cvdd.config_base import ConfigError
from cvdd.validation import check


def told(directory: Path, *overrides: str) -> list[str]:
    """What a configuration is refused for."""
    with pytest.raises(ConfigError) as caught:
        check(compose_raw(directory, "evaluate", *overrides))
    return str(caught.value).splitlines()


# --- parts of batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [33, 63, 64, 1000])
def test_no_part_of_a_members_batch_is_a_single_image(number: int, tmp_path: Path) -> None:
    (line,) = told(tmp_path, f"recipe.accumulation={number}")
    assert line.startswith(f"recipe.accumulation={number} would cut recipe.batch_size=64 into 63 parts, some of one")
    assert line.endswith("; set recipe.accumulation to one of 1, 2, 3, 4, 7, 8, 9, 16, 21, 32")


def test_a_members_batch_is_not_cut_into_more_parts_than_asked_for(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "recipe.accumulation=5")
    assert line.startswith("recipe.accumulation=5 would cut recipe.batch_size=64 into 6 parts; set")


@pytest.mark.parametrize("number", [6, 9, 10, 1000])
def test_no_part_of_a_students_batch_is_a_single_image(number: int, tmp_path: Path) -> None:
    (line,) = told(tmp_path, f"protocol.accumulation={number}")
    assert line.startswith(f"protocol.accumulation={number} would cut label.batch_size=10 into 9 parts, some of one")
    assert line.endswith("; set protocol.accumulation to one of 1, 2, 3, 5")


@pytest.mark.parametrize("number", [1, 3, 32])
def test_other_numbers_of_parts_are_possible(number: int, tmp_path: Path) -> None:
    config = check(compose_raw(tmp_path, "evaluate", f"recipe.accumulation={number}"))
    assert config.recipe.accumulation == number


# --- settings that nothing would read ---------------------------------------------------------------------------------


def test_nesterov_needs_a_momentum(tmp_path: Path) -> None:
    sgd = ("recipe.optimizer=sgd", "recipe.nesterov=true")
    (line,) = told(tmp_path, *sgd, "recipe.momentum=0")
    assert line.startswith("recipe.nesterov=true looks ahead along recipe.momentum, which is 0; set recipe.momentum")
    check(compose_raw(tmp_path, "evaluate", *sgd, "recipe.momentum=0.5"))
