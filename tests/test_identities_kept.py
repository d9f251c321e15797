"""Artefacts that users have are found again by a newer version, unless a change is meant to make them anew.

``python tests/test_identities_kept.py`` writes the file that is held against.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import compose_raw
from helpers import FIXTURES

import cvdd.computing.automatic
from cvdd.composition.validation import check
from cvdd.cost import plan_pieces, planning

FILE = FIXTURES / "identities.json"
CONFIGURATIONS = (
    "compare=methods",
    "method=apm_tiny label=hard protocol=method",
    "method=mtt_tiny label=hard protocol=method",
    "method=lpld label=lpld protocol=lpld committee.size=3 temperature=1",
    "method.init=herding label.store=none protocol.images=per_seed",
    "experiment=cvdd_table1_cifar10_ipc10_r18 dataset.root=nowhere",
    "experiment=cvdd_table1_imagenet1k_ipc10_r18 dataset.root=nowhere",
)


def identities(overrides: str, folder: Path) -> list[str]:
    """Names of all artefacts of a command, which end in their digests, before any of them is made."""
    # Without a store the data set is only described, which depends on no machine.
    config = check(compose_raw(folder, "evaluate", *overrides.split()))
    return sorted(piece.name for piece in plan_pieces(planning(config, torch.device("cpu"))))


@pytest.mark.parametrize("overrides", CONFIGURATIONS)
def test_identities_are_those_that_were(overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvdd.computing.automatic, "has_compiler", lambda device: True)
    assert identities(overrides, tmp_path) == json.loads(FILE.read_text())[overrides]


if __name__ == "__main__":
    cvdd.computing.automatic.has_compiler = lambda device: True
    with tempfile.TemporaryDirectory() as nowhere:
        known = {overrides: identities(overrides, Path(nowhere)) for overrides in CONFIGURATIONS}
    FILE.write_text(json.dumps(known, indent=1) + "\n")
