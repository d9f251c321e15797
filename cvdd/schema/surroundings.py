"""Where things run and where results go; never part of what an artefact is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from cvdd.schema.types import Positive
from cvdd.support.config_base import CheckedConfig, StrictConfig


class TrainerConfig(CheckedConfig):
    """Where things run and how much at once; never part of what an artefact is."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(description="where to run")
    devices: Positive = Field(1, description="processes that share the work, one on each GPU")
    split_units: bool = Field(
        False, description="processes share the images of each unit, for units too large for one device"
    )
    threads: Positive | None = Field(None, description="CPU threads; null leaves PyTorch's choice")
    assistants: int = Field(
        0,
        ge=0,
        description="further processes on this machine that make parts of an evaluation, members, or teachers of APM",
    )
    workers: int = Field(2, ge=0, description="loader processes for data that does not fit memory")
    progress: Literal["auto", "bar", "lines", "none"] = Field("auto", description="bar in a terminal, lines elsewhere")

    def _problems(self) -> Iterator[str]:
        if self.split_units and self.devices == 1:
            yield "trainer.split_units=true needs processes to share units: trainer=ddp trainer.devices=2"
        if self.split_units and self.assistants:
            yield "trainer.split_units=true: assistants have no part in it; set trainer.assistants=0"


class LoggerConfig(StrictConfig):
    """Besides csv, which is always on."""

    wandb: bool = Field(False, description="Weights & Biases")
    wandb_mode: Literal["online", "offline"] = Field("online", description="offline runs are sent later by wandb sync")
    project: str = Field("cvdd", description="wandb project")
    entity: str | None = Field(None, description="wandb entity; null is your default")
    group: str | None = Field(None, description="wandb group; null is the sweep's directory, if any")
    tensorboard: bool = Field(False, description="TensorBoard event files")


SILENT: Mapping[str, Any] = MappingProxyType(
    {
        "trainer.assistants": 0,
        "trainer.progress": "none",
        "logger.wandb": False,
        "logger.tensorboard": False,
    }
)
"""Overrides of a process that helps another one, which speaks for both."""


class PathsConfig(StrictConfig):
    """Directories; never part of an artefact's identity."""

    data: Path = Field(description="raw data sets")
    store: Path = Field(description="artefacts")
    output: Path = Field(description="this run's table, metrics, page and logs")

    @field_validator("data", "store", "output", mode="before")
    @classmethod
    def _is_named(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic takes it for the current directory, which a shell's variable that is not set would fill.
        if isinstance(value, str) and not value.strip():
            key = f"paths.{info.field_name}"
            variable = {"paths.data": "CVDD_DATA", "paths.store": "CVDD_STORE"}.get(key)
            otherwise = f", and unset {variable} if that is empty" if variable else ""
            raise ValueError(f"{key}=: names no directory; type {key}=DIR, or leave it out{otherwise}")
        return value
