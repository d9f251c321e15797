"""Trajectories of experts on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from cvdd.support.config_base import ConfigError
from cvdd.synthesis.trajectories import Trajectories, TrajectoryLayout, TrajectoryWriter


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(folder: Path, dtype: str = "float32", experts: int = 2, snapshots: int = 5, size: int = 7) -> Tensor:
    """Write random trajectories and return them, [experts, snapshots, size]."""
    folder.mkdir(exist_ok=True)
    layout = TrajectoryLayout(experts, snapshots, size, dtype)
    values = torch.randn(experts, snapshots, size, generator=source(6))
    layout.save(folder)
    for expert in range(experts):
        writer = TrajectoryWriter(folder, layout, expert)
        for snapshot in range(snapshots):
            writer.write(snapshot, values[expert, snapshot])
        writer.finish()
    return values


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2e-3)])
def test_trajectories_come_back_by_slices(tmp_path: Path, dtype: str, tolerance: float) -> None:
    values = stored(tmp_path, dtype)
    trajectories = Trajectories(tmp_path)
    start, target = trajectories.segment(1, 1, 3)
    assert start.dtype == target.dtype == torch.float32
    torch.testing.assert_close(start, values[1, 1], rtol=0, atol=tolerance)
    torch.testing.assert_close(target, values[1, 4], rtol=0, atol=tolerance)
    # Writing to what was read must not reach the file, nor what is read next.
    start.zero_()
    torch.testing.assert_close(trajectories.snapshot(1, 1), values[1, 1], rtol=0, atol=tolerance)
    files = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert 0 < files - trajectories.layout.bytes < 2 * 200
    assert trajectories.layout.bytes == 2 * 5 * 7 * (4 if dtype == "float32" else 2)


def test_an_array_has_its_size_before_anything_is_written(tmp_path: Path) -> None:
    layout = TrajectoryLayout(1, 1000, 100, "float32")
    TrajectoryWriter(tmp_path, layout, 0)
    (file,) = tmp_path.iterdir()
    assert file.name.endswith(".tmp")
    assert file.stat().st_blocks * 512 >= layout.bytes


def test_a_writer_goes_on_with_what_is_there(tmp_path: Path) -> None:
    layout = TrajectoryLayout(1, 3, 4, "float32")
    layout.save(tmp_path)
    first = TrajectoryWriter(tmp_path, layout, 0)
    first.write(0, torch.zeros(4))
    first.write(1, torch.ones(4))
    del first
    second = TrajectoryWriter(tmp_path, layout, 0)
    second.write(2, 2 * torch.ones(4))
    second.finish()
    assert [Trajectories(tmp_path).snapshot(0, epoch).tolist() for epoch in range(3)] == [[k] * 4 for k in range(3)]


def test_parameters_beyond_the_range_of_half_precision_are_refused(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, TrajectoryLayout(1, 2, 3, "float16"), 0)
    with pytest.raises(ConfigError, match=r"after epoch 1 .*dtype=float32"):
        writer.write(1, torch.tensor([0.0, 70000.0, 0.0]))


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    last = TrajectoryLayout(2, 5, 7, "float32").file(tmp_path, 1)
    content = last.read_bytes()
    last.write_bytes(content[:-50])
    with pytest.raises(ConfigError, match=r"incomplete: expert00001\.npy, expert 2 of 2"):
        Trajectories(tmp_path)
    last.unlink()
    with pytest.raises(ConfigError, match=r"incomplete: expert00001\.npy, expert 2 of 2.*Delete this directory"):
        Trajectories(tmp_path)
    numpy.save(last, numpy.zeros((5, 6), dtype=numpy.float32))
    with pytest.raises(ConfigError, match=r"float32 \[5, 6\] instead of float32 \[5, 7\]"):
        Trajectories(tmp_path)
    (tmp_path / "trajectories.json").write_text(json.dumps({"experts": 2}))
    with pytest.raises(ConfigError, match="holds no trajectories"):
        Trajectories(tmp_path)


def test_segments_beyond_the_stored_epochs_are_refused(tmp_path: Path) -> None:
    values = stored(tmp_path)
    trajectories = Trajectories(tmp_path)
    assert torch.equal(trajectories.segment(0, 2, 2)[1], values[0, 4])
    with pytest.raises(ConfigError, match=r"snapshot 5 of expert 0 .*snapshots 0 to 4.*start_epochs"):
        trajectories.segment(0, 3, 2)


def test_an_expert_that_did_not_move_is_refused(tmp_path: Path) -> None:
    layout = TrajectoryLayout(1, 2, 3, "float32")
    layout.save(tmp_path)
    writer = TrajectoryWriter(tmp_path, layout, 0)
    for snapshot in range(2):
        writer.write(snapshot, torch.ones(3))
    writer.finish()
    with pytest.raises(ConfigError, match="expert 0 has the same parameters after epochs 0 and 1"):
        Trajectories(tmp_path).segment(0, 0, 1)
