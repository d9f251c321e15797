"""The whole configuration and the checks across its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from cvdd.backbones.config import BackboneConfig
from cvdd.data.config import DatasetConfig
from cvdd.schema.anchors import BEGINNINGS, RANKED
from cvdd.schema.committee import CommitteeConfig, PriorConfig, TemperatureConfig
from cvdd.schema.engine import EngineConfig
from cvdd.schema.expected import ExpectedConfig
from cvdd.schema.label import LabelConfig
from cvdd.schema.label_checks import label_problems
from cvdd.schema.method import IpcConfig, MethodConfig, PatchesConfig
from cvdd.schema.protocol import ProtocolConfig
from cvdd.schema.recipe import RecipeConfig
from cvdd.schema.surroundings import LoggerConfig, PathsConfig, TrainerConfig
from cvdd.schema.types import Name, Verb, side_of_cut
from cvdd.support.config_base import CheckedConfig, ConfigError


class RunConfig(CheckedConfig):
    """The whole configuration; the same for all four verbs."""

    verb: Verb = Field(description="what the command makes; set by the script")
    cost: bool = Field(
        False, description="print what the command would cost, and make nothing; about ten seconds of measurement"
    )
    seed: int = Field(ge=0, description="of everything but the students, which have protocol.seeds")
    dataset: DatasetConfig
    recipe: RecipeConfig
    committee: CommitteeConfig
    prior: PriorConfig
    ipc: IpcConfig
    temperature: TemperatureConfig
    patches: PatchesConfig
    method: MethodConfig
    engine: EngineConfig
    label: LabelConfig
    protocol: ProtocolConfig
    students: dict[Name, BackboneConfig] = Field(min_length=1, description="networks to train on the distilled set")
    compare: dict[Name, dict[str, Any]] = Field(
        {}, description="more rows of the table: name -> the overrides in which the row differs from this config"
    )
    expected: ExpectedConfig | None = None
    trainer: TrainerConfig
    logger: LoggerConfig
    paths: PathsConfig

    def _problems(self) -> Iterator[str]:
        names = list(self.committee.members)
        for field, name in [("patches.observer", self.patches.observer), ("prior.observer", self.prior.observer)]:
            if name not in names:
                yield f"{field}={name} is not a member of the committee; choose from {', '.join(names)}"
        if isinstance(self.method.voters, list):
            for name in self.method.voters:
                if name not in names:
                    yield (
                        f"method.voters names {name}; the members are {', '.join(names)}. Choose among them, or drawn "
                        "or all, or a committee that has it"
                    )
        sizes, side = self.method.sizes, self.dataset.image_size
        if sizes is not None and sizes[-1] != side:
            yield f"method.sizes={sizes} ends at {sizes[-1]}, and dataset.image_size={side}; end at {side}"
        if self.label.given is not None and not self.method.keeps_given:
            yield (
                f"label.given={self.label.given} is of images that are there too; add method=given "
                "method.given=store/images/NAME-HASH, or the folder of these images. A row with other images needs a "
                "label of its own, or leave rows out with compare=none"
            )
        yield from label_problems(self.label, self.protocol, names, self.dataset.image_size)
        if self.prior.source == "given":
            missing = [name for name in names if name not in self.prior.values]
            if missing and needs_priors(self):
                yield (
                    f"prior.values has no number for {', '.join(missing)}; add +prior.values.{missing[0]}=PERCENT, or "
                    "use prior=measured"
                )
        if self.expected is not None and self.expected.student not in self.students:
            yield (
                f"expected.student={self.expected.student} is not among the students ({', '.join(self.students)}); "
                "choose one of them, or leave the published number out with expected=null"
            )
        yield from self._problems_of_factors()
        if self.method.init == "patches" and self.patches.images_per_class < self.ipc.images_per_class:
            yield (
                f"patches.images_per_class={self.patches.images_per_class} is less than "
                f"ipc.images_per_class={self.ipc.images_per_class}; set it to at least as many"
            )
        if self.trainer.split_units and self.method.brings_students:
            yield (
                "trainer.split_units=true splits units of the recover loop, which method.apm and method.mtt replace; "
                "set trainer.split_units=false"
            )
        if self.trainer.split_units and self.method.anchored is not None:
            yield (
                "trainer.split_units=true adds up what voters say of BatchNorm statistics over processes, and not what "
                "they say of features (method.anchors); set trainer.split_units=false"
            )
        if self.trainer.split_units and self.method.retrieves is not None:
            yield (
                "trainer.split_units=true needs equal images in all processes, and method.retrieval would be chosen in "
                "each by what it computes; set trainer.split_units=false"
            )
        for side in self.method.sizes or [self.dataset.image_size]:
            if self.method.recovers and self.method.cutout and not side_of_cut(side, self.method.cutout):
                yield (
                    f"method.cutout={self.method.cutout} of {side} pixels is no pixel; set it to at least "
                    f"{0.5 / side:.2g}, or to 0.0"
                )
        if self.protocol.full_data and self.recipe.moco is not None:
            yield (
                "protocol.full_data=true trains students on all real data as members are trained, and recipe.moco "
                "trains all but the last layer without labels; set protocol.full_data=false, or choose another recipe"
            )
        if self.protocol.student == "method":
            if not self.method.brings_students:
                yield (
                    "protocol.student=method is for methods that train students in a way of their own (method=apm, "
                    "method=mtt); choose another protocol"
                )
            elif not self.label.hard:
                yield (
                    "protocol.student=method would not use the labels of label.teachers; choose label=hard, which "
                    "makes none"
                )
            if self.engine.compile_students or self.engine.precision_students != "fp32":
                yield (
                    "protocol.student=method trains students in full precision without a compiler; set "
                    "engine.compile_students=false engine.precision_students=fp32"
                )

    def _problems_of_factors(self) -> Iterator[str]:
        method, label, size = self.method, self.label, self.dataset.image_size
        if size % max(method.factor, label.factor):
            yield f"method.factor=2 and label.factor=2 need an even dataset.image_size, not {size}; set both to 1"
        stitched = method.init == "patches" and self.patches.factor == 2
        if method.factor > 1 and method.init == "patches" and not stitched:
            yield (
                f"method.factor={method.factor} shows parts of images that are made of several, and patches.factor="
                f"{self.patches.factor} makes each of one; set patches.factor=2, or method.factor=1"
            )
        if label.factor < method.factor and not method.brings_students:
            yield (
                f"method.factor={method.factor} makes images of several, and label.factor={label.factor} shows them "
                f"whole; set label.factor={method.factor}, which a row that is written as a list does by itself"
            )
        if label.factor > method.factor and not stitched and method.given is None:
            made = f", or method.factor={label.factor}" if method.init in BEGINNINGS else ""
            yield (
                f"label.factor={label.factor} shows a part of each image, and method.factor={method.factor} with "
                f"method.init={method.init} makes whole ones; set label.factor=1{made}"
            )


def teachers_of(config: RunConfig) -> list[str]:
    """Names of the members that label, in committee order; none of hard labels."""
    if isinstance(config.label.teachers, str):
        return list(config.committee.members) if config.label.teachers == "committee" else []
    return [name for name in config.committee.members if name in config.label.teachers]


def members_used(config: RunConfig) -> list[str]:
    """Names of the members that may vote, that label, or that choose real images, in committee order."""
    observed = config.method.init in ("patches", *RANKED) or config.method.retrieves is not None
    used = set(teachers_of(config)) | ({config.patches.observer} if observed else set())
    if config.method.recovers or config.method.ranks:
        voters = config.method.voters
        used |= set(config.committee.members if isinstance(voters, str) else voters)
    return [name for name in config.committee.members if name in used]


def voters_of_a_slot(config: RunConfig) -> int:
    """Count the members that judge the images of a slot, all together or in turn."""
    method, committee = config.method, config.committee
    if isinstance(method.voters, str):
        return {"drawn": committee.size, "all": len(committee.members)}[method.voters]
    return len(method.voters)


def needs_priors(config: RunConfig) -> bool:
    """Whether anything in this configuration depends on the members' prior performance."""
    return votes_by_priors(config) or (config.label.weights == "prior" and len(teachers_of(config)) > 1)


def votes_by_priors(config: RunConfig) -> bool:
    """Whether the images depend on the members' prior performance."""
    method, committee = config.method, config.committee
    weighed = voters_of_a_slot(config) > 1 and committee.voter == "prior" and method.turns != "in_turn"
    return method.recovers and ((method.voters == "drawn" and committee.draw == "best") or weighed)


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return a copy of a configuration with dotted keys replaced, checked like a new one.

    Raises:
        ConfigError: a key does not exist or the result cannot run.
    """
    tree = config.model_dump()
    for key, value in overrides.items():
        *path, last = key.split(".")
        node: Any = tree
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ConfigError(f"{key}: there is no such field in the configuration")
        node[last] = value
    return RunConfig.model_validate(tree)
