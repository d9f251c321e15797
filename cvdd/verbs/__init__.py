"""What each command does: four functions of a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cvdd.chain.context import Context
from cvdd.verbs.distill import distill
from cvdd.verbs.evaluate import evaluate
from cvdd.verbs.made import Made
from cvdd.verbs.relabel import relabel
from cvdd.verbs.train import train

VerbFunction = Callable[[Context, list[str]], Made]

VERBS: Mapping[str, VerbFunction] = MappingProxyType(
    {"train": train, "distill": distill, "relabel": relabel, "evaluate": evaluate}
)
