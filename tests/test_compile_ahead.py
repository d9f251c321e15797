"""Compilers that run side by side before anything is measured."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import pytest
import torch

from benchmarks import cases, compile_ahead, speed
from benchmarks.cases import Case
from benchmarks.speed import default_cache_dir, use_own_cache
from benchmarks.table import markdown
from cvdd.synthesis.engine import Engine


def test_networks_are_compiled_before_cases_and_those_that_fail_leave_theirs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process for each network and size, however many cases need it; labels and students wait for none."""
    pairs = [("resnet18", "resnet50"), ("resnet18", "mobilenetv2"), ("resnet50", "mobilenetv2")]
    wanted = [Case("recover", "digits", pair, images=4, steps=1) for pair in pairs]
    others = [Case("student", "digits", ("resnet18",), images=4, steps=1)]
    started: list[list[str]] = []

    def compiler(command: list[str], env: dict[str, str], timeout: float, check: bool) -> CompletedProcess[bytes]:
        assert int(env["TORCHINDUCTOR_COMPILE_THREADS"]) >= 2
        assert timeout == 1.0
        started.append(command[3:])
        # One is refused, another never ends.
        if command[6] == "mobilenetv2":
            raise TimeoutExpired(command, timeout)
        return CompletedProcess(command, 1 if command[6] == "resnet50" else 0)

    ready: list[tuple[str, Case, str]] = []
    monkeypatch.setattr(compile_ahead.subprocess, "run", compiler)
    taken, left = compile_ahead.compile_all([*wanted, *others], 1.0, lambda *found: ready.append(found))
    assert sorted(arguments[3] for arguments in started) == ["mobilenetv2", "resnet18", "resnet50"]
    assert list(taken) == ["digits_4_resnet18"]
    assert left == others
    # What is compiled can be traced while others are not.
    assert [(key, name) for key, case, name in ready] == [("digits_4_resnet18", "resnet18")]
    assert "resnet18" in ready[0][1].members


def test_a_network_that_cannot_be_traced_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cases fail when they are measured, and are named then."""
    prepared: list[str] = []

    def prepare(case: Case, name: str, device: torch.device) -> None:
        prepared.append(name)
        torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] += 2
        if name == "resnet50":
            raise RuntimeError("no such network")

    monkeypatch.setattr(speed, "prepare_member", prepare)
    case = Case("recover", "digits", ("resnet18", "resnet50"), images=4, steps=1)
    found = {name: speed.traced(case, name, torch.device("cpu")) for name in case.members}
    assert prepared == ["resnet18", "resnet50"]
    assert all(one["compiled"]["inductor"] == {"hit": 2, "miss": 0, "bypass": 0} for one in found.values())
    assert all(one["seconds"] >= 0 for one in found.values())
    assert "no such network" in capsys.readouterr().err


def test_members_are_prepared_once_for_all_cases_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_VOTERS", {})
    pairs = [
        Case("recover", "digits", pair, images=4, steps=1) for pair in (("resnet18",), ("resnet18", "mobilenetv2"))
    ]
    small, large = pairs[0], replace(pairs[0], images=6)
    voters = [cases._voter(case, "resnet18", Engine(), torch.device("cpu")) for case in (small, pairs[1], large, small)]
    # Another size has its own, and the first is not forgotten for it.
    assert voters[0] is voters[1] is voters[3]
    assert voters[2] is not voters[0]


def test_what_was_compiled_before_does_not_make_compilation_look_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch may have named its usual folder in the environment by itself; one that the caller chose is kept."""
    for before, after in [(None, tmp_path), (default_cache_dir(), tmp_path), ("/a/b", Path("/a/b"))]:
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        if before is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        use_own_cache(tmp_path)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(after)
        assert os.environ["TRITON_CACHE_DIR"] == f"{after}/triton"


def test_the_table_says_how_long_compilers_took() -> None:
    result = json.loads((speed.RESULTS / "gpu.json").read_text())
    assert "Compiled side by side" not in markdown(result)
    took = {"compile_seconds": {"cifar_10_resnet18": 52.4}, "traced": {"cifar_10_resnet18": {"seconds": 17.6}}}
    assert "before anything was measured: cifar_10_resnet18 52 s, traced in 18 s." in markdown(result | took)
