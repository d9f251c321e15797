"""The four commands. Only Hydra is imported here, so that help and completion are quick."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

NUMBERED_GROUPS = ("ipc", "temperature")
"""Groups whose files are named by numbers."""


def config_directory() -> str:
    """Folder of the configuration: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "conf"
    return str(installed if installed.is_dir() else package.parent / "conf")


def quote_numbers(arguments: list[str]) -> list[str]:
    """Write ``ipc=10`` as ``ipc='10'``: Hydra takes a bare number for a value, never for the name of a file.

    Lists of a sweep (``ipc=1,10,50``) are quoted one by one; everything else is left as it is.
    """
    number = r"\d+(?:\.\d+)?"
    pattern = re.compile(rf"({'|'.join(NUMBERED_GROUPS)})=({number}(?:,{number})*)")

    def quoted(argument: str) -> str:
        match = pattern.fullmatch(argument)
        return f"{match[1]}=" + ",".join(f"'{part}'" for part in match[2].split(",")) if match else argument

    return [quoted(argument) for argument in arguments]


def _command(verb: str) -> None:
    sys.argv[1:] = quote_numbers(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=config_directory(), config_name=verb)(_run)()


def _run(config: DictConfig) -> float | None:
    from cvdd.runtime import run

    return run(config)


def train() -> None:
    """Train the committee."""
    _command("train")


def distill() -> None:
    """Make synthetic images."""
    _command("distill")


def relabel() -> None:
    """Make soft labels."""
    _command("relabel")


def evaluate() -> None:
    """Train students on the distilled set and measure them beside the baselines."""
    _command("evaluate")
