"""What a configuration may contain: types, one line of help for each field, and the checks across fields.

Hydra composes; this package decides whether the result can run. Nothing else in the project reads a raw config.
"""

from cvdd.schema.anchors import AnchorsConfig
from cvdd.schema.committee import CommitteeConfig, MemberConfig, PriorConfig, TemperatureConfig
from cvdd.schema.difficulty import DifficultyConfig
from cvdd.schema.engine import EngineConfig
from cvdd.schema.expected import ExpectedConfig
from cvdd.schema.label import LabelConfig
from cvdd.schema.method import IpcConfig, MethodConfig, PatchesConfig, StatisticsConfig
from cvdd.schema.protocol import ProtocolConfig
from cvdd.schema.recipe import RecipeConfig
from cvdd.schema.retrieval import RetrievalConfig
from cvdd.schema.run import (
    RunConfig,
    members_used,
    needs_priors,
    teachers_of,
    voters_of_a_slot,
    votes_by_priors,
    with_overrides,
)
from cvdd.schema.surroundings import SILENT, LoggerConfig, PathsConfig, TrainerConfig
from cvdd.schema.types import Verb

__all__ = [
    "SILENT",
    "AnchorsConfig",
    "CommitteeConfig",
    "DifficultyConfig",
    "EngineConfig",
    "ExpectedConfig",
    "IpcConfig",
    "LabelConfig",
    "LoggerConfig",
    "MemberConfig",
    "MethodConfig",
    "PatchesConfig",
    "PathsConfig",
    "PriorConfig",
    "ProtocolConfig",
    "RecipeConfig",
    "RetrievalConfig",
    "RunConfig",
    "StatisticsConfig",
    "TemperatureConfig",
    "TrainerConfig",
    "Verb",
    "members_used",
    "needs_priors",
    "teachers_of",
    "voters_of_a_slot",
    "votes_by_priors",
    "with_overrides",
]
