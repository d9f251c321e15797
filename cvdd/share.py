"""A distilled set as one folder for other people: ``python -m cvdd.share store/labels/NAME-HASH FOLDER``.

The folder is a small store with the images, their labels and a page that says what they are, in the form in which hubs
of data sets show it. Whoever has it needs nothing else: checksums come with it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torchvision.utils import make_grid

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import MANIFEST, DamagedArtifact, read_manifests_of
from cvdd.chain.students import ADDED
from cvdd.composition.arguments import FIELDS, preset_numbers
from cvdd.composition.config_directory import config_directory
from cvdd.distilled import DistilledSet, load, open_set
from cvdd.report.columns import measured_images
from cvdd.schema.unread import as_typed
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import told
from cvdd.support.pictures import write_png
from cvdd.support.readable import standard_error, with_error
from cvdd.support.refusals import place_errors

_SEED = re.compile(r"-seed\d+$")
TEMPLATE, CARD, PREVIEW = "card.md.j2", "README.md", "preview.png"
SHOWN = 10
"""Classes of the preview, and images of each."""


@dataclass
class Students:
    """Students of one kind that were trained on a set.

    Attributes:
        name: that it was given among the students.
        parameters: of the network; None of students that earlier versions trained.
        epochs: of their training.
        measured_on: ``test``, ``validation`` or ``train`` images.
        protocol: how they were trained, by the fields of ``protocol``.
        seeds: of their initialisation.
        top1: of each, in percent, after the last epoch.
        best_top1: of each, at its best epoch.
    """

    name: str
    parameters: int | None
    epochs: int
    measured_on: str
    protocol: Mapping[str, Any]
    seeds: list[int] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    best_top1: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> str:
        """Their mean with its standard error, if there are several."""
        return with_error(statistics.fmean(self.top1), standard_error(self.top1), "+-")

    @property
    def best(self) -> float:
        """Mean at the best epochs."""
        return statistics.fmean(self.best_top1)


@dataclass(frozen=True)
class Member:
    """A member of the committee behind a set.

    Attributes:
        name: that it has in the committee.
        parameters: of the network; None if the store has it no more.
        top1: on test or validation images, in percent; None likewise.
    """

    name: str
    parameters: int | None
    top1: float | None


def share(path: Path, folder: Path) -> DistilledSet:
    """Write a distilled set into a folder of its own.

    Args:
        path: directory of its labels, whose images come with them, or of its images alone, in a store.
        folder: is made.

    Returns:
        the set, as it can be read from the folder.

    Raises:
        ConfigError: there is something in the folder already, it cannot be written, or ``path`` holds no distilled set.
        DamagedArtifact: a file of the set is missing or was changed.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name a folder that is not there yet")
    images, labels = open_set(path)
    made = [images] if labels is None else [images, labels]
    with place_errors(folder, "another folder"):
        for artifact in made:
            _copy(artifact, folder / artifact.kind / artifact.path.name)
        shared = load(folder / made[-1].kind / made[-1].path.name)
        (folder / CARD).write_text(_card(images, labels, shared))
        write_png(_preview(shared), folder / PREVIEW)
    return shared


def _copy(artifact: Artifact, target: Path) -> None:
    """Copy what an artefact's manifest lists; what else lies beside it was never looked at."""
    for name in sorted([*artifact.manifest["files"], MANIFEST]):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Whoever gets the folder may read it, whatever earlier versions allowed of the store.
        shutil.copyfile(artifact.path / name, copy)


def _card(images: Artifact, labels: Artifact | None, shared: DistilledSet) -> str:
    made, store = [images] if labels is None else [images, labels], images.path.resolve().parent.parent
    identity = images.manifest["identity"]
    count, classes = len(shared.images), shared.classes
    ipc = identity.get("ipc") or "as many as there are"
    environment = Environment(
        loader=PackageLoader("cvdd", "report"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    students = students_of(store, images, labels)
    environment.filters["number"] = lambda number: "unknown" if number is None else f"{number:,}"
    text: str = environment.get_template(TEMPLATE).render(
        title=made[-1].name,
        artifacts=made,
        labels=labels,
        count=count,
        classes=classes,
        ipc=ipc,
        size="x".join(str(side) for side in shared.images.shape[-2:]) + " pixels",
        data=identity["data"],
        measured=measured_images(identity["data"]),
        epochs=shared.epochs,
        left_out=_left_out(labels),
        students=students,
        members=_members(store, made),
        code={"commit": None, **images.manifest["code"]},
        command=_command(images, labels, shared, students),
    )
    return text


def _left_out(labels: Artifact | None) -> int | None:
    """Return how many logits of each label are kept, if nothing stands for the others."""
    recipe: Mapping[str, Any] = labels.manifest["identity"]["label"] if labels else {}
    return recipe.get("top") if recipe.get("rest") == "nothing" else None


def _command(images: Artifact, labels: Artifact | None, shared: DistilledSet, students: Sequence[Students]) -> str:
    ipc = len(shared.images) // len(shared.classes)
    # Others have no preset.
    field = "ipc" if str(ipc) in preset_numbers([config_directory()], "ipc") else FIELDS["ipc"]
    given = f"python evaluate.py method=given method.given=images/{images.path.name} {field}={ipc}"
    if labels is None:
        return given
    given = f"{given} label=given label.given=labels/{labels.path.name} compare=none"
    for one in students:
        if one.protocol.get("repeat_labels"):
            # Labels of few epochs were made for how these students go through them.
            told = [name for name in ("epochs", "accumulation", *ADDED) if name in one.protocol]
            return " ".join([given, *(f"protocol.{name}={as_typed(one.protocol[name])}" for name in told)])
    return f"{given} protocol.epochs={shared.epochs}"


def students_of(store: Path, images: Artifact, labels: Artifact | None) -> list[Students]:
    """List the students that a store has of a set, those that differ in the seed alone together.

    Args:
        store: its root.
        images: that they were trained on.
        labels: that they were trained with; None for all students of the images.
    """
    found: dict[str, Students] = {}
    for student in _read(store / "students"):
        identity = student.manifest["identity"]
        if not _learnt_from(student, images, labels):
            continue
        key = json.dumps({name: value for name, value in identity.items() if name != "seed"}, sort_keys=True)
        epochs, measured_on = identity["protocol"]["epochs"], identity["measured_on"]
        if measured_on == "test":
            measured_on = measured_images(images.manifest["identity"]["data"])
        # A backbone of another width or depth may have the same name.
        images_name, parameters = student.manifest["parents"][0]["name"], student.metrics.get("parameters")
        name = _SEED.sub("", student.name.removeprefix(f"{images_name}-"))
        group = found.setdefault(key, Students(name, parameters, epochs, measured_on, identity["protocol"]))
        group.seeds.append(identity["seed"])
        group.top1.append(student.metrics["top1"])
        group.best_top1.append(student.metrics["best_top1"])
    return sorted(found.values(), key=lambda one: (one.name, one.epochs))


def _learnt_from(student: Artifact, images: Artifact, labels: Artifact | None) -> bool:
    if {"protocol", "labels", "measured_on"} - student.manifest["identity"].keys():
        # Of a method that trains students in its own way, on labels of its own.
        return False
    parents = [parent["digest"] for parent in student.manifest["parents"]]
    if parents[:1] != [images.digest]:
        return False
    if labels is None:
        return True
    said: Mapping[str, Any] = student.manifest["identity"]["labels"]
    given: Mapping[str, Any] = labels.manifest["identity"]
    teachers = [parent["digest"] for parent in labels.manifest["parents"]]
    return parents == teachers and all(given.get(key) == value for key, value in said.items())


def _members(store: Path, made: Sequence[Artifact]) -> list[Member]:
    """List the members behind a set, and what is known of each if the store still has it."""
    parents = [parent for artifact in made for parent in artifact.manifest["parents"] if parent["kind"] == "members"]
    known = {member.digest: member.metrics for member in _read(store / "members")}
    prefix = f"{made[0].manifest['identity']['data']['name']}-"
    names = {parent["name"].removeprefix(prefix): known.get(parent["digest"], {}) for parent in parents}
    return [Member(name, found.get("parameters"), found.get("test_top1")) for name, found in names.items()]


def _read(kind: Path) -> list[Artifact]:
    found = []
    for artifact in read_manifests_of(kind):
        if isinstance(artifact, DamagedArtifact):
            print(f"left out: {artifact}", file=sys.stderr)
        else:
            found.append(artifact)
    return found


def _preview(shared: DistilledSet) -> Any:
    rows = [shared.images[shared.labels == index][:SHOWN] for index in range(min(SHOWN, len(shared.classes)))]
    columns = min(len(row) for row in rows)
    return make_grid([image for row in rows for image in row[:columns]], nrow=columns, padding=1, pad_value=255)


def main(arguments: Sequence[str]) -> None:
    """Write a distilled set, its labels and a page about them into a folder that can be given to others."""
    parser = argparse.ArgumentParser(prog="python -m cvdd.share", description=main.__doc__)
    parser.add_argument("path", metavar="STORE/labels/NAME-HASH", help="its labels, or STORE/images/NAME-HASH alone")
    parser.add_argument("folder", metavar="FOLDER", help="where it goes; it is made")
    given = parser.parse_args(arguments)
    shared = share(Path(given.path), Path(given.folder))
    labels = f" and soft labels of {shared.epochs} epoch{'s' * (shared.epochs != 1)}" if shared.epochs else ""
    print(f"{len(shared.images)} images{labels} in {given.folder}; see {CARD} there")


if __name__ == "__main__":
    with told(sweeping=False):
        main(sys.argv[1:])
