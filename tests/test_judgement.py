"""The benchmark of single judgements: what it counts and keeps; never how fast."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import judgement
from benchmarks.judgement import Kernel, compiler_settings, counted_bytes, kernels_of, table


def test_bytes_of_kernels_are_those_of_their_names() -> None:
    described = [
        {"kernel_name": "one", "kernel_num_gb": 0.5},
        {"kernel_name": "one", "kernel_num_gb": 0.5},
        # A forward and a backward pass each have a kernel of this name.
        {"kernel_name": "two", "kernel_num_gb": 0.5},
        {"kernel_name": "two", "kernel_num_gb": 0.25},
        {"kernel_name": "three"},
    ]
    assert counted_bytes(described) == {"one": 0.5}


def test_calls_of_a_step_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgement, "_made_by_compilers", lambda: [{"kernel_name": "aten::mm", "kernel_num_gb": 2.0}])
    square = torch.ones(64, 64)
    found = {kernel.name: kernel for kernel in kernels_of(lambda: (square @ square) @ square, torch.device("cpu"))}
    assert (found["aten::mm"].calls, found["aten::mm"].gigabytes) == (2, 4.0)
    assert all(kernel.milliseconds > 0 for kernel in found.values())


def test_the_table_has_rates_where_bytes_are_known() -> None:
    kernels = [Kernel("slow", 2, 4.0, 12.0), Kernel("fast", 1, 1.0), Kernel("last", 1, 0.5)]
    assert [line.split() for line in table(kernels, 2).splitlines()] == [
        ["ms", "calls", "GB", "TB/s", "kernel"],
        ["4.0000", "2", "12.0000", "3.00", "slow"],
        ["1.0000", "1", "fast"],
    ]


@pytest.mark.parametrize(
    ("written", "said"),
    [("triton.max_tile=2", "the compiler has no setting triton.max_tile"), ("triton.max_tiles=two", "write a value")],
)
def test_settings_of_the_compiler_are_its_own(written: str, said: str) -> None:
    assert compiler_settings(["triton.max_tiles=2", "fallback_random=True"]) == {
        "triton.max_tiles": 2,
        "fallback_random": True,
    }
    with pytest.raises(ValueError, match=f"{re.escape(written)}: {said}"):
        compiler_settings([written])


def test_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judgement, "RESULTS", tmp_path)
    arguments = ("resnet18", "mobilenetv2", "--data", "digits", "--units", "1", "--images", "2")
    options = ("--repetitions", "1", "--kernels", "3", "--out", "mine")
    monkeypatch.setattr("sys.argv", ["judgement", *arguments, *options])
    judgement.main()
    kept: dict[str, Any] = json.loads((tmp_path / "mine.json").read_text())
    assert [row["member"] for row in kept["members"]] == ["resnet18", "mobilenetv2"]
    assert all(row["cosine"] > 0.999 and row["launched"] > 0 for row in kept["members"])
    assert len(kept["members"][0]["kernels"]) > 10
    assert kept["settings"]["units"] == 1
    assert torch.__version__.startswith(kept["code"]["torch"])
    assert capsys.readouterr().out.count("kernel\n") == 2
