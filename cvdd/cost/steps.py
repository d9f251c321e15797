"""The kinds of work that plans are counted in: each is timed once, however often it happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from cvdd.backbones import BackboneConfig, build_network
from cvdd.schema import LabelConfig, MethodConfig, PatchesConfig, ProtocolConfig, RecipeConfig
from cvdd.schema.moco import MocoConfig
from cvdd.synthesis.engine import Engine


@dataclass(frozen=True)
class Network:
    """A network for so many classes and images of some size.

    Attributes:
        backbone: JSON of its configuration.
        classes: outputs.
        size: side of its input in pixels.
    """

    backbone: str
    classes: int
    size: int

    @staticmethod
    def of(backbone: BackboneConfig | Mapping[str, Any], classes: int, size: int) -> Network:
        """Return the network of a configuration, or of what a manifest says of it."""
        config = BackboneConfig.model_validate(backbone) if isinstance(backbone, Mapping) else backbone
        # Weights cost nothing here, and those of ImageNet might have to be fetched.
        return Network(config.model_copy(update={"pretrained": False}).model_dump_json(), classes, size)

    def build(self) -> nn.Module:
        """Build it with random weights."""
        return build_network(BackboneConfig.model_validate_json(self.backbone), self.classes, 0)


@dataclass(frozen=True)
class TrainStep:
    """One step of a member's training.

    Attributes:
        network: the member.
        recipe: JSON of how it is trained.
        in_memory: whether images are held decoded.
        probe: whether its last layer alone is trained.
    """

    network: Network
    recipe: str
    in_memory: bool
    probe: bool = False

    @staticmethod
    def of(network: Network, recipe: RecipeConfig, in_memory: bool) -> TrainStep:
        """Return the step of a recipe, whatever its length and rate."""
        same = {"name": "any", "epochs": 1, "lr": 1e-3, "schedule": "constant", "cosine_period": None, "moco": None}
        settings = recipe.model_copy(update=same).model_dump_json()
        return TrainStep(network, settings, in_memory, recipe.moco is not None)

    @property
    def settings(self) -> RecipeConfig:
        """How it is trained."""
        return RecipeConfig.model_validate_json(self.recipe)


@dataclass(frozen=True)
class MocoStep:
    """One step of a member's training without labels.

    Attributes:
        network: the member, with as many outputs as a representation has numbers.
        moco: JSON of how it is trained.
        flip: whether views are flipped.
        in_memory: whether images are held decoded.
    """

    network: Network
    moco: str
    flip: bool
    in_memory: bool

    @staticmethod
    def of(network: Network, recipe: RecipeConfig, in_memory: bool) -> MocoStep:
        """Return the step of a recipe, whatever its length and rate."""
        assert recipe.moco is not None
        same = recipe.moco.model_copy(update={"epochs": 1, "lr": 1e-3})
        return MocoStep(replace(network, classes=same.dimension), same.model_dump_json(), recipe.flip, in_memory)

    @property
    def settings(self) -> MocoConfig:
        """How it is trained."""
        return MocoConfig.model_validate_json(self.moco)


@dataclass(frozen=True)
class StudentStep:
    """One step of a student's training.

    Attributes:
        network: the student.
        protocol: JSON of how it is trained.
        label: JSON of its label recipe.
    """

    network: Network
    protocol: str
    label: str

    @staticmethod
    def of(network: Network, protocol: ProtocolConfig, label: LabelConfig) -> StudentStep:
        """Return the step of a protocol, whatever its length, rate and measurements."""
        same = {"name": "any", "epochs": 1, "warmup": 0, "lr": 1e-3, "seeds": [0], "eval_every": 1, "images": "once"}
        shown = protocol.model_copy(update={**same, "full_data": False})
        return StudentStep(network, shown.model_dump_json(), _plain(label))

    @property
    def settings(self) -> tuple[ProtocolConfig, LabelConfig]:
        """How it is trained."""
        return ProtocolConfig.model_validate_json(self.protocol), LabelConfig.model_validate_json(self.label)


@dataclass(frozen=True)
class VoteStep:
    """One member's judgement of a stack and its gradient.

    Attributes:
        network: the member.
        units: that it judges in one forward pass.
        images: of each unit.
        matched: whether statistics are matched.
        engine: how.
    """

    network: Network
    units: int
    images: int
    matched: bool
    engine: Engine


@dataclass(frozen=True)
class MoveStep:
    """What an iteration of a stack needs besides its members: views and the optimiser.

    Attributes:
        units: of the stack.
        images: of each unit.
        size: of the images in pixels.
        method: JSON of the method.
    """

    units: int
    images: int
    size: int
    method: str

    @staticmethod
    def of(units: int, images: int, size: int, method: MethodConfig) -> MoveStep:
        """Return the step of a method, whatever its length."""
        same = {"name": "any", "seed": 0, "iterations": 16}
        same |= {"stages": 1, "sizes": None, "residual": 1.0, "early_late": False, "retrieval": None}
        changed = method.model_copy(update=same)
        return MoveStep(units, images, size, changed.model_dump_json())

    @property
    def settings(self) -> MethodConfig:
        """How images are made."""
        return MethodConfig.model_validate_json(self.method)


@dataclass(frozen=True)
class ScoreStep:
    """One teacher's logits of one sample.

    Attributes:
        network: the teacher.
        label: JSON of the label recipe.
        together: samples in the largest forward pass.
    """

    network: Network
    label: str
    together: int

    @staticmethod
    def of(network: Network, label: LabelConfig, together: int) -> ScoreStep:
        """Return the step of a label recipe, whatever its length."""
        return ScoreStep(network, _plain(label), together)

    @property
    def settings(self) -> LabelConfig:
        """How it labels."""
        return LabelConfig.model_validate_json(self.label)


@dataclass(frozen=True)
class ReplayStep:
    """Drawing and showing one sample that is labelled.

    Attributes:
        label: JSON of the label recipe.
        size: of the images in pixels.
        together: samples that are held at once.
    """

    label: str
    size: int
    together: int

    @staticmethod
    def of(label: LabelConfig, size: int, together: int) -> ReplayStep:
        """Return the step of a label recipe, whatever its length."""
        return ReplayStep(_plain(label), size, together)

    @property
    def settings(self) -> LabelConfig:
        """How samples are shown."""
        return LabelConfig.model_validate_json(self.label)


@dataclass(frozen=True)
class MeasureStep:
    """A forward pass of one real image.

    Attributes:
        network: what is measured.
        batch: images in a pass.
    """

    network: Network
    batch: int


@dataclass(frozen=True)
class PatchStep:
    """Cutting and scoring the crops of one candidate image.

    Attributes:
        network: the observer.
        patches: JSON of how patches are made.
    """

    network: Network
    patches: str

    @staticmethod
    def of(network: Network, patches: PatchesConfig) -> PatchStep:
        """Return the step, whatever the number of candidates."""
        return PatchStep(network, patches.model_copy(update={"candidates": 1, "observer": ""}).model_dump_json())

    @property
    def settings(self) -> PatchesConfig:
        """How patches are made."""
        return PatchesConfig.model_validate_json(self.patches)


@dataclass(frozen=True)
class DecodeStep:
    """Decoding one image file, and resizing it.

    Attributes:
        size: to which.
    """

    size: int


@dataclass(frozen=True)
class Overhead:
    """What happens around steps.

    Attributes:
        of: starting a fit of Lightning, an epoch or a batch in it, sealing an artefact, finishing a part of one,
            writing a megabyte, or compiling a judgement.
    """

    of: Literal["fit", "epoch", "batch", "artifact", "part", "megabyte", "compile"]


Step = (
    TrainStep
    | MocoStep
    | StudentStep
    | VoteStep
    | MoveStep
    | ScoreStep
    | ReplayStep
    | MeasureStep
    | PatchStep
    | DecodeStep
    | Overhead
)


def _plain(label: LabelConfig) -> str:
    teachers = "none" if label.hard else "committee"
    store = "none" if teachers == "none" else "logits"
    same = {
        "name": "any",
        "epochs": 1,
        "teachers": teachers,
        "store": store,
        "parameters": "stored",
        "keep": 1.0,
        "given": None,
    }
    return label.model_copy(update=same).model_dump_json()
