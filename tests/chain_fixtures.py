"""Fixtures of the tests of the whole chain: it is run once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_context

import cvdd.artifact.store
from cvdd.chain.compare import Distilled, Result, compare
from cvdd.chain.context import Context


@pytest.fixture(scope="session")
def chain_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="session")
def made(chain_home: Path) -> tuple[Distilled, Result]:
    """The chain, run once for all tests."""
    distilled, results = compare(tiny_context(chain_home))
    return distilled[0], results[0]


@pytest.fixture
def again(made: tuple[Distilled, Result], chain_home: Path, tmp_path: Path) -> Callable[..., Context]:
    """A store of one's own that has everything but the given kinds of artefacts."""

    def without(*kinds: str) -> Context:
        store = tmp_path / "copy"
        shutil.copytree(chain_home / "store", store)
        for kind in kinds:
            shutil.rmtree(store / kind)
        return tiny_context(chain_home, store=store)

    return without


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of the artefacts that are made from here on."""
    kinds: list[str] = []
    seal = cvdd.artifact.store.seal

    def noting(work: Path, path: Path, manifest: dict[str, Any]) -> None:
        kinds.append(manifest["kind"])
        seal(work, path, manifest)

    monkeypatch.setattr(cvdd.artifact.store, "seal", noting)
    return kinds
