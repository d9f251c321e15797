"""Fixtures of the tests of faults: the whole chain is made once, by commands that nobody interrupts."""

from __future__ import annotations

import pytest
from commands import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))
