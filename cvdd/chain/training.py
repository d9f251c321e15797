"""What all trainings of a network have in common: how they are logged and measured, and the files that they leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cvdd.artifact import Artifact, write_atomically
from cvdd.artifact.tensor_files import save_tensors
from cvdd.chain.context import Context
from cvdd.support.progress import Advance
from cvdd.training.classifier import EpochLog
from cvdd.training.measure import Evaluator

CURVE = "curve.json"
WEIGHTS = "weights.safetensors"


def log_epochs(context: Context, place: str, advance: Advance) -> EpochLog:
    """Return what a training calls after each epoch: progress goes on by one, and loggers get the epoch's row.

    Args:
        context: the configuration and its surroundings.
        place: what the loggers' keys begin with.
        advance: of the training's progress.
    """

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        advance(1)
        context.log({f"{place}/{key}": value for key, value in row.items()}, step=epoch + 1)

    return on_epoch


def every(period: int, epochs: int) -> Callable[[int], bool]:
    """Return whether to measure after an epoch (counted from 0): every ``period`` of them, and the last."""
    return lambda epoch: (epoch + 1) % period == 0 or epoch + 1 == epochs


def ten_times(epochs: int) -> Callable[[int], bool]:
    """Return whether to measure after an epoch (counted from 0), so that it happens about ten times."""
    return every(max(epochs // 10, 1), epochs)


def evaluator_of(context: Context, part: Literal["test", "train"] = "test") -> Evaluator:
    """Return what measures a network on real images, as the protocol says; ``train`` means the training images."""
    config, data = context.config, context.data()
    return Evaluator(
        data,
        config.protocol.eval_batch,
        context.device,
        test_resize=config.dataset.test_resize if part == "test" or not data.train.in_memory else None,
        part=part,
        workers=config.trainer.workers,
    )


def save_curve(path: Path, curve: Sequence[dict[str, float]]) -> None:
    """Write a curve: one JSON row per epoch, one line each."""
    lines = ",\n".join(json.dumps(row) for row in curve)
    write_atomically(path, (f"[\n{lines}\n]\n" if curve else "[]\n").encode())


def load_curve(artifact: Artifact) -> list[dict[str, float]]:
    """Read the curve of a student or a member: one row per epoch."""
    curve: list[dict[str, float]] = json.loads((artifact.path / CURVE).read_text())
    return curve


def save_weights(work: Path, network: nn.Module) -> None:
    """Write a network's parameters and buffers."""
    save_tensors(work / WEIGHTS, {key: value.contiguous().cpu() for key, value in network.state_dict().items()})


def count_parameters(network: nn.Module) -> int:
    """Return how many numbers of a network are trained."""
    return sum(parameter.numel() for parameter in network.parameters())


def save_student(work: Path, curve: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Write a student's curve and return its metrics: the last measurement, and the best by top-1."""
    save_curve(work / CURVE, curve)
    measured = [row for row in curve if "top1" in row]
    last, best = measured[-1], max(measured, key=lambda row: row["top1"])
    return {
        **{key: last[key] for key in ("top1", "top5", "loss")},
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
    }
