"""What a job's or a container's limit leaves is read from its control groups."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cvdd.computing.footprint
from cvdd.artifact import peak
from cvdd.computing.footprint import MEMORY, _free_in_machine, free_memory
from cvdd.computing.memory_limit import left_to_process

GB = 10**9


def group(folder: Path, version: int, limit: str, taken: int = 0, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}[version]
    for name, value in zip(names, (limit, str(taken)), strict=True):
        (folder / name).write_text(value + "\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' if version == 1 else ''}inactive_file {cache}\n")


def left(tmp_path: Path, groups: str) -> float:
    own = tmp_path / "own"
    own.write_text(groups)
    return left_to_process(tmp_path / "groups", own)


def test_the_narrowest_group_above_a_process_counts(tmp_path: Path) -> None:
    tree = tmp_path / "groups"
    group(tree / "slurm", 2, str(8 * GB), taken=3 * GB, cache=1 * GB)
    group(tree / "slurm" / "job", 2, "max", taken=2 * GB)
    group(tree / "slurm" / "job" / "step", 2, str(20 * GB), taken=2 * GB)
    group(tree / "other", 2, str(1 * GB))
    assert left(tmp_path, "0::/slurm/job/step\n") == 6 * GB
    assert left(tmp_path, "0::/nowhere\n") == math.inf


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    group(tmp_path / "groups", 2, str(4 * GB), taken=5 * GB)
    assert left(tmp_path, "0::/../../machine/path\n") == 0


def test_version_1_has_a_tree_for_memory(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory", 1, str(2**63 - 4096))
    group(tmp_path / "groups" / "memory" / "job", 1, str(3 * GB), taken=2 * GB, cache=GB // 2)
    assert left(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n") == 1.5 * GB


@pytest.mark.parametrize("files", [{}, {"memory.max": "a lot"}, {"memory.max": "5"}])
def test_what_cannot_be_read_limits_nothing(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "groups").mkdir()
    for name, text in files.items():
        (tmp_path / "groups" / name).write_text(text)
    assert left(tmp_path, "0::/\n") == math.inf
    assert left_to_process(tmp_path / "groups", tmp_path / "nothing") == math.inf


def test_free_memory_is_that_of_the_machine_or_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for limit in (12345.0, math.inf):
        monkeypatch.setattr(cvdd.computing.footprint, "left_to_process", lambda limit=limit: limit)
        assert (free_memory(cpu) == 12345) == (limit < math.inf)
    assert 0 < free_memory(cpu) < math.inf


def test_where_the_system_does_not_say_what_is_free_it_is_half_of_what_there_is(tmp_path: Path) -> None:
    total = next(int(line.split()[1]) * 1024 for line in MEMORY.read_text().splitlines() if "MemTotal" in line)
    assert _free_in_machine(tmp_path / "nothing") == pytest.approx(total / 2, rel=0.02)
    assert 0 < _free_in_machine() <= total


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_without_a_status_is_in_the_systems_unit(
    system: str, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(peak, "_STATUS", tmp_path / "nothing")
        patched.setattr(sys, "platform", system)
        patched.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
        found = peak.highest_resident()
    assert found == 7 * unit
    assert peak.highest_resident() > 2**20
