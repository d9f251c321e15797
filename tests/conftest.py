"""What all tests share: a store of their own, and configurations composed as the commands compose them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig
from simulated_gpu import simulated_gpu

from cvdd.composition.arguments import prepare
from cvdd.composition.command import expanded
from cvdd.composition.config_directory import config_directory
from cvdd.composition.validation import check
from cvdd.schema import RunConfig

Compose = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test, and every command that it starts, away from the user's store and data."""
    monkeypatch.setenv("CVDD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CVDD_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    # Nothing that a test starts may talk to a tracking server.
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def gpu_or_stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests for a GPU have one."""
    if request.node.get_closest_marker("gpu") is None or torch.cuda.is_available():
        yield
    else:
        with simulated_gpu():
            yield


def compose_raw(directory: Path, verb: str, *overrides: str) -> DictConfig:
    """Compose a configuration as ``python <verb>.py <overrides>`` would, with all its directories inside one."""
    conf = config_directory()
    places = [f"paths.{name}={directory / name}" for name in ("data", "store", "output")]
    # A developer's conf/local must not decide what the tests see.
    arguments = [*places, "~local", *overrides] if (conf / "local").is_dir() else [*places, *overrides]
    with initialize_config_dir(str(conf), version_base="1.3"):
        prepared = prepare(arguments, conf)
        composed = hydra_compose(verb, prepared)
        debug = next((item.removeprefix("debug=") for item in overrides if item.startswith("debug=")), None)
        return expanded(composed, prepared, debug)


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """Return a function from verb and overrides to a checked configuration."""

    def composed(verb: str, *overrides: str) -> RunConfig:
        return check(compose_raw(tmp_path, verb, *overrides))

    return composed
