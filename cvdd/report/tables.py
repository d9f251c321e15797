"""What a command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cvdd.artifact import Artifact
from cvdd.schema import RunConfig


def readable_bytes(count: float | None) -> str:
    """Write a number of bytes for people."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def with_spread(mean: float, spread: float | None) -> str:
    """Write a mean with its spread, if there is one."""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} +- {spread:.1f}"


def print_members(config: RunConfig, members: Mapping[str, Artifact]) -> None:
    """Print one line per member."""
    table = Table(title=f"committee {config.committee.name} on {config.dataset.name}")
    for column in ("member", "test top-1", "train top-1", "parameters", "BatchNorm layers", "seconds", "artefact"):
        table.add_column(column, justify="left" if column in ("member", "artefact") else "right")
    for name, member in members.items():
        metrics = member.metrics
        table.add_row(
            name,
            f"{metrics['test_top1']:.1f}",
            f"{metrics['train_top1']:.1f}" if "train_top1" in metrics else "-",
            f"{metrics['parameters']:,}",
            str(metrics["batchnorm_layers"]),
            f"{member.manifest['cost']['wall_seconds']:.0f}",
            member.path.name,
        )
    Console().print(table)


def print_artifact(artifact: Artifact, more: Mapping[str, str]) -> None:
    """Print what was made, where, and how large it is."""
    table = Table(show_header=False, title=f"{artifact.kind}: {artifact.name}")
    cost = artifact.manifest["cost"]
    rows = {
        "path": str(artifact.path),
        "size": readable_bytes(artifact.bytes),
        "made in": f"{cost['wall_seconds']:.0f} s, peak memory {readable_bytes(cost['peak_memory_bytes'])}",
        **more,
    }
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of a comparison: mean of the last epoch with its standard error, the best epoch beside it."""
    table = Table(title="top-1 accuracy in percent, last epoch, mean +- standard error")
    columns = (
        "images",
        "student",
        "protocol",
        "n",
        "top-1",
        "best epoch",
        "top-5",
        "loss",
        "image bytes",
        "label bytes",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("images", "student", "protocol") else "right")
    for result in results:
        table.add_row(
            result["row"],
            result["student"],
            result["protocol"],
            str(result["n"]),
            with_spread(result["top1"], result["standard_error"]),
            f"{result['best_top1']:.1f}",
            f"{result['top5']:.1f}",
            f"{result['loss']:.3f}",
            readable_bytes(result["image_bytes"]),
            readable_bytes(result["label_bytes"]),
        )
    Console().print(table)
