"""The recipe of labels that are there already: what a configuration says of them is read from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cvdd.support.config_base import ConfigError

RESOLVER = "cvdd_given"


def register_resolver() -> None:
    """Make ``${cvdd_given:PATH,FIELD}`` known to OmegaConf."""
    OmegaConf.register_new_resolver(RESOLVER, _field_of, replace=True)


def _field_of(path: Any, field: str) -> Any:
    # A folder may be called 123.
    return recipe_of(None if path is None else Path(str(path)))[field]


def recipe_of(path: Path | None) -> dict[str, Any]:
    """Read the recipe of given labels, by the fields of ``label``.

    Args:
        path: directory of labels in a store, or the folder of ``epoch_#/batch_#.tar`` that the published programs
            write.

    Raises:
        ConfigError: there are no labels.
    """
    if path is None:
        raise ConfigError(
            "label.given=null: label=given reads labels that are there; type label.given=store/labels/NAME-HASH, or "
            "the folder of the records (epoch_#/batch_#.tar) of the published programs"
        )
    folder = path.expanduser().absolute()
    if is_published(folder):
        from cvdd.labels.published_release import size_of_records

        epochs, batch_size = size_of_records(folder)
        return _with_defaults({"bn_mode": "batch", "batch_size": batch_size, "epochs": epochs})
    return _stored(path, folder)


def is_published(folder: Path) -> bool:
    """Whether a folder holds records of the published programs."""
    return any(folder.glob("epoch_*"))


def _stored(path: Path, folder: Path) -> dict[str, Any]:
    from cvdd.artifact.manifest import COPY, MANIFEST, DamagedArtifact, read_manifest
    from cvdd.schema.unread import without_unread

    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"label.given={path} holds neither labels of a store (store/labels/NAME-HASH) nor records of the "
            "published programs (epoch_#/batch_#.tar)"
        )
    try:
        artifact = read_manifest(folder, COPY)
    except DamagedArtifact as error:
        raise ConfigError(f"label.given={path}: {error}") from error
    if artifact.kind != "labels":
        raise ConfigError(f"label.given={path} is an artefact of kind {artifact.kind}, not labels")
    identity = artifact.manifest["identity"]
    return _with_defaults({**without_unread("label", identity["label"]), "parameters": identity["parameters"]})


def _with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    from cvdd.schema.label import LabelConfig

    defaults = {name: field.default for name, field in LabelConfig.model_fields.items() if not field.is_required()}
    # As a file of the configuration has them.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in {**defaults, **recipe}.items()}
