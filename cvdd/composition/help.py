"""What ``--help`` shows; made from the schema, and without PyTorch."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hydra.core.global_hydra import GlobalHydra

from cvdd.composition.fields import Field, fields

WIDTH = 120
KEY_WIDTH = 34

PUBLISHED = re.compile(r"\w+_(table\d+|results)_\w+")
"""Names of the files of ``experiment`` that hold a published number."""

SHARED = "experiment/base"
"""What these files share; not to be chosen by itself."""

PLACES: Mapping[str, str] = MappingProxyType(
    {"backbone": "+backbone@students.NAME=choice, backbone@committee.members.NAME.backbone=choice"}
)
"""Groups that are chosen for a place in the configuration, and how: a run has several of them."""

CHAIN = (
    "Whatever is missing on the way is made first, so that each command can be the first one; what exists is found "
    "again by the part of the configuration that made it, so that repeating a command costs seconds and an interrupted "
    "one goes on where it was."
)

INTRODUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "train": "Train the members of the committee on the real data set: networks with BatchNorm statistics. "
        + CHAIN,
        "distill": "Make synthetic images: optimise a few images per class until the committee's vote recognises them "
        "and their BatchNorm statistics look real. " + CHAIN,
        "relabel": "Make soft labels: for every epoch and batch, which crop and mix of which synthetic images, and the "
        "teachers' logits for it. " + CHAIN,
        "evaluate": "Train students on the synthetic images and their soft labels and measure them on real images, "
        "beside random real images and whatever else compare names. " + CHAIN,
    }
)

EXAMPLES: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "train": (
            ("", "the small committee of the embedded data set; nothing is downloaded"),
            ("dataset=cifar10 committee=small recipe=cifar", "the paper's five networks"),
            ("committee=tiny_resnet18", "one member alone"),
            ("recipe.epochs=20 recipe.lr=0.005", "another training"),
            ("--multirun seed=0,1,2", "three committees"),
        ),
        "distill": (
            ("", "ten images per class of the embedded data set"),
            ("ipc=50 temperature=2", "fifty per class, a sharper vote"),
            ("ipc.images_per_class=7 temperature.vote=2.5", "numbers without a file of their own"),
            ("committee.size=3 committee.draw=random", "three random members vote on each slot"),
            ("method=patches", "the initial images without optimisation"),
        ),
        "relabel": (
            ("", "labels of ten images per class of the embedded data set"),
            ("label=resnet18", "one teacher, as in the paper's algorithm"),
            ("label.bn_mode=running", "running instead of batch statistics"),
            ("label.epochs=300 protocol.epochs=300", "labels of more epochs"),
            ("label.store=none", "compute them on the fly, the same bits"),
        ),
        "evaluate": (
            ("", "the whole chain on the embedded data set; nothing is downloaded"),
            ("ipc=50 students=tiny_all", "fifty images per class, a cross-architecture table"),
            ("--multirun committee.size=1,2,3 temperature=1,5", "a sweep over N and T; members are trained once"),
            (
                "dataset=cifar10 committee=small recipe=cifar prior=cifar10 patches=medium method=cvdd label=committee "
                "protocol=paper students=small",
                "CIFAR-10 with the published settings instead of the embedded data set's",
            ),
            ("debug=smoke", "every stage for a moment, to see that a configuration runs"),
        ),
    }
)


def help_part(part: str, verb: str, program: str) -> str:
    """Return a part of the help, escaped for Hydra's template.

    Args:
        part: ``introduction``, ``examples``, ``groups`` or ``fields``.
        verb: what the command makes.
        program: how the command was started, ``sys.argv[0]``.
    """
    if part == "introduction":
        text = textwrap.fill(INTRODUCTIONS[verb], WIDTH)
    elif part == "examples":
        text = _examples(verb, program)
    elif part == "groups":
        text = group_table()
    else:
        text = field_table()
    return text.replace("$", "$$")


def _examples(verb: str, program: str) -> str:
    name = Path(program).name
    command = f"python {name}" if name.endswith(".py") else name
    lines = []
    for arguments, meaning in EXAMPLES[verb]:
        line = f"  {command} {arguments}".rstrip()
        lines.append(f"{line:60}  # {meaning}" if len(line) <= 60 else f"{line}\n{'':60}  # {meaning}")
    return "\n".join(lines)


def group_table() -> str:
    """The files of each group; those of published numbers are only counted. Hydra must have been initialised."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    lines = []
    for group in sorted(hydra.list_all_config_groups()):
        if group.partition("/")[0] == "hydra" or group == SHARED:
            continue
        names = sorted(hydra.config_loader.get_group_options(group))
        published = [name for name in names if group == "experiment" and PUBLISHED.fullmatch(name)]
        more = [f"and {len(published)} of published numbers (python -m cvdd.report experiments)"] if published else []
        place = f" ({PLACES[group]})" if group in PLACES else ""
        lines.append(f"{group}{place}: {', '.join([*(name for name in names if name not in published), *more])}")
    return "\n".join(lines)


def field_table() -> str:
    """Every field of the configuration with its help, under the help of its section."""
    lines: list[str] = []
    section = ""
    for field in fields():
        if field.section != section:
            section = field.section
            lines.extend(["", f"{section}: {field.section_help}"])
        lines.extend(_field_lines(field))
    return "\n".join(lines).strip("\n")


def _field_lines(field: Field) -> list[str]:
    choices = f" ({' | '.join(field.choices)})" if field.choices else ""
    text = textwrap.wrap(inspect.cleandoc(field.description) + choices, WIDTH - KEY_WIDTH - 4)
    first = [f"  {field.key}"] if len(field.key) > KEY_WIDTH else []
    column = "" if first else field.key
    return first + [f"  {column if n == 0 else '':{KEY_WIDTH}}  {line}" for n, line in enumerate(text)]
