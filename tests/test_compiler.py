"""What one process has compiled, another finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvdd.computing.compiler import memory_format_of

PROGRAM = """
import torch
from torch._dynamo.utils import counters
from cvdd.computing.compiler import compiling

def double(images):
    return (2 * images).cos().sum()

with compiling(True):
    images = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.compile(double)(images).backward()
print(dict(counters["aot_autograd"]))
"""


@pytest.mark.parametrize("name", ["contiguous_format", "channels_last"])
def test_memory_formats_have_names(name: str) -> None:
    layout = getattr(torch, name)
    assert memory_format_of(str(layout)) is layout


def test_what_is_compiled_is_found_whatever_was_imported_first(tmp_path: Path) -> None:
    """With multiprocessing imported before it, PyTorch alone would look for another key (2.11 and 2.15)."""
    surroundings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = []
    for first in ("", "import multiprocessing\n"):
        program = tmp_path / "program.py"
        program.write_text(first + PROGRAM)
        run = subprocess.run(
            [sys.executable, program], env=surroundings, capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    assert "'autograd_cache_hit': 1" not in said[0]
    assert "'autograd_cache_hit': 1" in said[1]
