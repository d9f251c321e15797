"""What a command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from cvdd.artifact import Artifact, parents_of
from cvdd.chain.spent import spent_on
from cvdd.report.columns import best_shown, labels_shown
from cvdd.report.verdict import verdict_sentence
from cvdd.schema import RunConfig
from cvdd.support.console import new_console, new_table, print_table
from cvdd.support.readable import readable_bytes, readable_seconds, with_error


def print_members(config: RunConfig, members: Mapping[str, Artifact]) -> None:
    """Print one line per member."""
    table = new_table(f"committee {config.committee.name} on {config.dataset.name}: top-1 accuracy in percent")
    for column in ("member", config.dataset.evaluate_on, "train", "parameters", "BN layers", "time", "artefact"):
        left = column in ("member", "artefact")
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for name, member in members.items():
        metrics = member.metrics
        # What was trained without labels is an artefact of its own.
        seconds = sum(one.manifest["cost"]["wall_seconds"] for one in (member, *parents_of(member, "encoders")))
        table.add_row(
            escape(name),
            f"{metrics['test_top1']:.1f}",
            f"{metrics['train_top1']:.1f}" if "train_top1" in metrics else "-",
            f"{metrics['parameters']:,}",
            str(metrics["batchnorm_layers"]),
            readable_seconds(seconds),
            escape(member.path.name),
        )
    print_table(table)


def print_artifact(artifact: Artifact, more: Mapping[str, str]) -> None:
    """Print what was made, where, and how large it is."""
    table = Table(show_header=False, title=escape(f"{artifact.kind}: {artifact.name}"))
    table.add_column(no_wrap=True)
    # A path is there to be copied.
    table.add_column(overflow="fold")
    cost = spent_on(artifact)
    rows = {
        "path": str(artifact.path),
        "size": readable_bytes(artifact.bytes),
        "made in": f"{readable_seconds(cost.seconds)}, peak memory {readable_bytes(cost.peak_memory)}",
        **more,
    }
    for key, value in rows.items():
        table.add_row(key, escape(value))
    new_console().print(table)


def print_results(results: Sequence[Mapping[str, Any]], measured: str = "test") -> None:
    """Print the table of a comparison: mean of the last epoch with its standard error, the best epoch beside it.

    It fits 80 columns; loss and seconds are in results.csv and on the page.

    Args:
        results: summaries of the rows.
        measured: the images that accuracies are of: ``test`` or ``validation``.
    """
    protocols = list(dict.fromkeys(result["protocol"] for result in results))
    title = f"top-1 in percent on {measured} images, last epoch, with standard error"
    if len(protocols) == 1:
        title += f"\nprotocol {protocols[0]}"
    table = new_table(title)
    names = ["row", "student"] + (["protocol"] if len(protocols) > 1 else [])
    for column in names:
        table.add_column(column, overflow="fold")
    for column in ("n", "top-1", "best", "top-5", "images", "labels"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            *(escape(str(result[column])) for column in names),
            str(result["n"]),
            with_error(result["top1"], result["standard_error"], "+-"),
            best_shown(result),
            f"{result['top5']:.1f}",
            readable_bytes(result["image_bytes"]),
            labels_shown(result),
        )
    print_table(table)


def print_ranking(ranking: Sequence[Mapping[str, Any]]) -> None:
    """Print DD-Ranking's scores with their standard errors, if rows were made for any."""
    if not ranking:
        return
    table = new_table("DD-Ranking: points of accuracy, and scores from 0 to 1")
    for column in ("row", "student"):
        table.add_column(column, overflow="fold")
    columns = {"hlr": 1, "ior": 1, "lrs": 3, "ars": 3}
    for column in columns:
        table.add_column(column.upper(), justify="right", no_wrap=True)
    for one in ranking:
        shown = [
            with_error(one[key]["value"], one[key]["error"], "+-", digits) if one[key] else "-"
            for key, digits in columns.items()
        ]
        table.add_row(escape(one["row"]), escape(one["student"]), *shown)
    if any(one["hlr"] is None for one in ranking):
        table.caption = "HLR and LRS need protocol.full_data=true, and a row of the same images with hard labels"
    print_table(table)


def print_verdict(verdict: Mapping[str, Any] | None) -> None:
    """Print what was expected beside what was measured, if a published number was given."""
    if verdict is not None:
        new_console().print(verdict_sentence(verdict), markup=False, highlight=False)
