"""Methods with an engine of their own, as the chain finds them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from helpers import tiny_context

from cvdd.chain.own_engines import OWN, own_engine
from cvdd.schema import MethodConfig
from cvdd.schema.method import OWN_SECTIONS
from cvdd.support.config_base import StrictConfig


def test_every_section_for_such_a_method_has_an_engine() -> None:
    sections = {
        name
        for name, field in MethodConfig.model_fields.items()
        if field.default is None
        and any(isinstance(one, type) and issubclass(one, StrictConfig) for one in get_args(field.annotation))
    }
    # Groups by difficulty, anchors and retrieval are parts of the recover loop.
    assert set(OWN) == set(OWN_SECTIONS) == sections - {"difficulty", "anchors", "retrieval"}


@pytest.mark.parametrize(("method", "section"), [("apm_tiny", "apm"), ("mtt_tiny", "mtt"), ("tesla", "mtt")])
def test_a_method_is_known_by_its_section(method: str, section: str, tmp_path: Path) -> None:
    options = (f"method={method}", "label=hard", "protocol=method", "method.iterations=4", "method.checkpoint_every=4")
    config = tiny_context(tmp_path, *options, "method.log_every=2", "method.grid_every=4", "compare=none").config
    assert own_engine(config.method) is OWN[section]
    assert config.method.brings_students


def test_a_method_that_votes_has_none(tmp_path: Path) -> None:
    assert own_engine(tiny_context(tmp_path).config.method) is None
