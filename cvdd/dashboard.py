"""``python -m cvdd.dashboard``: the workspace of a project on Weights & Biases, as code.

Its panels show what :mod:`cvdd.running.loggers` sends: a sweep's accuracies over two fields, accuracy against IPC,
images, the terms of the loss by member, and how fast images and students are made.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvdd.schema.surroundings import LoggerConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import USER_ERROR
from cvdd.support.refusals import place_errors

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

NAME, SPEC = "cvdd", "dashboard.json"
AXES = ("temperature.vote", "committee.size")
SECONDS_TO_ANSWER = 10.0
COLOURS = ("#440154", "#31688e", "#35b779", "#fde725")
"""Of a heat map, from the lowest to the highest accuracy; readable without telling red from green."""

TOP1, BEST_TOP1 = "result/top1", "result/best_top1"
IMAGES_PER_SECOND, IMAGE_SECONDS, STUDENT_SECONDS = (
    f"result/{key}" for key in ("images_per_second", "image_seconds", "student_seconds")
)
LOSS, STACK, PICTURES = "distill/loss", "distill/stack", "distill/images"
CURVES = {
    "Accuracy of students": r".*evaluate/.*/top1",
    "Cross-entropy by member": r".*distill/ce/.*",
    "BatchNorm distance by member": r".*distill/bn/.*",
    "Distance of features by member": r".*distill/features/.*",
    "Weight by member": r".*distill/weight/.*",
    "Agreement by pair": r".*distill/agreement/.*",
    "Training of members": r".*train/.*/train_loss",
}
"""Titles and keys, as patterns, of what is logged for each member, pair or student; rows and seeds come before."""

IPC = "ipc.images_per_class"
STEP, SECONDS = "trainer/global_step", "RelativeTime(Process)"


class Offline(Exception):
    """Nothing can be sent now; the message says why."""


def build(entity: str, project: str, group: str | None, axes: tuple[str, str]) -> ws.Workspace:
    """Build the workspace without talking to anybody.

    Args:
        entity: whose project it is; empty is your default.
        project: where the runs are.
        group: only runs of this sweep; None shows all of the project.
        axes: dotted fields along x and y of the heat map.

    Raises:
        ConfigError: an optional package is not installed, or there is no such field.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ConfigError("cvdd.dashboard needs: pip install 'cvdd[wandb]'") from error
    _require_fields(axes)
    curves = {
        title: wr.LinePlot(title=title, x=STEP, metric_regex=pattern, smoothing_type="none")
        for title, pattern in CURVES.items()
    }
    sections = [
        ws.Section(
            name="Sweep", is_open=True, panels=[_heat_map(axes), _all_axes(axes), wr.RunComparer(diff_only="split")]
        ),
        ws.Section(
            name="Accuracy against IPC",
            is_open=True,
            panels=[
                wr.ScatterPlot(title="Top-1 against IPC", x=wr.Config(IPC), y=wr.SummaryMetric(TOP1), log_x=True),
                wr.BarPlot(title="Top-1 by method", metrics=[TOP1], groupby=wr.Config("method.name")),
                curves["Accuracy of students"],
            ],
        ),
        ws.Section(
            name="Images",
            is_open=True,
            panels=[
                wr.MediaBrowser(title="Distilled images", media_keys=[PICTURES], mode="gallery", gallery_axis="step")
            ],
        ),
        ws.Section(
            name="Distillation",
            panels=[
                wr.LinePlot(title="Loss", x=STEP, y=[LOSS], log_y=True, smoothing_type="none"),
                *(panel for title, panel in curves.items() if title != "Accuracy of students"),
            ],
        ),
        ws.Section(
            name="Throughput",
            panels=[
                wr.BarPlot(title="Images a second", metrics=[IMAGES_PER_SECOND], groupby=wr.Config("method.name")),
                wr.BarPlot(title="Seconds for all images", metrics=[IMAGE_SECONDS]),
                wr.BarPlot(title="Seconds for a student", metrics=[STUDENT_SECONDS]),
                wr.LinePlot(title="Stacks begun over time", x=SECONDS, y=[STACK], smoothing_type="none"),
            ],
        ),
    ]
    settings = ws.RunsetSettings(
        filters=[ws.Metric("Group") == group] if group else [],
        order=[ws.Ordering(ws.Summary(TOP1), ascending=False)],
        pinned_columns=[f"summary:{TOP1}", f"summary:{BEST_TOP1}"],
    )
    name = f"{NAME}: {group}" if group else NAME
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=settings)


def _heat_map(axes: tuple[str, str]) -> Any:
    """Accuracy as colour over two fields: the library has no panel of tiles, so every run is a point."""
    import wandb_workspaces.reports.v2 as wr

    gradient = [
        wr.GradientPoint(color=colour, offset=100 * index / (len(COLOURS) - 1)) for index, colour in enumerate(COLOURS)
    ]
    x, y = (wr.Config(axis) for axis in axes)
    title = f"Top-1 over {axes[0]} and {axes[1]}"
    return wr.ScatterPlot(title=title, x=x, y=y, z=wr.SummaryMetric(TOP1), gradient=gradient)


def _all_axes(axes: tuple[str, str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    shown = dict.fromkeys([*axes, IPC])
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=key) for key in shown]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(TOP1), display_name="top-1"))
    return wr.ParallelCoordinatesPlot(title="All runs", columns=columns)


def _require_fields(axes: Sequence[str]) -> None:
    from cvdd.composition.fields import fields

    known = [field.key for field in fields()]
    for axis in axes:
        if axis not in known:
            close = [key for key in known if key.rpartition(".")[2] == axis.rpartition(".")[2]]
            choices = f"choose from {', '.join(close)}" if close else "python evaluate.py --help lists all"
            raise ConfigError(f"--axes {axis}: there is no such field; {choices}")


def spec_of(workspace: ws.Workspace) -> dict[str, Any]:
    """Return what would be sent, as JSON; the same for the same arguments."""
    tree: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    # The library draws identifiers by chance; here they are counted.
    drawn = {value: f"panel{index}" for index, value in enumerate(dict.fromkeys(_identifiers(tree)))}
    renamed = _renamed(tree, drawn)
    assert isinstance(renamed, dict)
    return renamed


def _identifiers(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("__id__", "id") and isinstance(value, str) and value:
                yield value
            else:
                yield from _identifiers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _identifiers(value)


def _renamed(tree: Any, names: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


def send(workspace: ws.Workspace) -> str:
    """Save a workspace as a new view of its project; return its address.

    Raises:
        Offline: that is not possible now.
    """
    import wandb

    settings = wandb.setup().settings
    if settings.mode not in ("online", "shared"):
        raise Offline(f"WANDB_MODE={settings.mode}")
    try:
        # The client would try again for many minutes.
        urllib.request.urlopen(settings.base_url, timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        # Whoever refuses a page is there.
        pass
    except OSError as error:
        raise Offline(f"{settings.base_url}: {getattr(error, 'reason', error)}") from error
    try:
        if not workspace.entity:
            workspace.entity = str(wandb.Api().default_entity)
        workspace.save()
    except wandb.errors.UsageError as error:
        raise Offline(f"{error}; log in with wandb login") from error
    except Exception as error:
        # The client's errors about what a server answers have no base of their own.
        raise Offline(f"{type(error).__name__}: {error}") from error
    return str(workspace.url)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cvdd.dashboard", description="Make the workspace of a project on Weights & Biases."
    )
    parser.add_argument("--entity", default="", help="wandb entity; without it your default")
    parser.add_argument("--project", default=LoggerConfig().project, help="wandb project; %(default)s if not given")
    parser.add_argument("--group", metavar="SWEEP", help="only runs of this sweep")
    parser.add_argument(
        "--axes",
        nargs=2,
        default=AXES,
        metavar=("X", "Y"),
        help=f"fields of the heat map; {' '.join(AXES)} if not given",
    )
    parser.add_argument("--spec", type=Path, metavar="FILE", help=f"write it there and send nothing; offline {SPEC}")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code, which is 2 if it was to be sent and was not."""
    options = _parser().parse_args(arguments)
    try:
        workspace = build(options.entity, options.project, options.group, tuple(options.axes))
        if options.spec is not None:
            _write(workspace, options.spec)
            print(f"The spec is in {options.spec}")
            return 0
        try:
            print(send(workspace))
            return 0
        except Offline as error:
            print(f"not sent ({error}); repeat the command to send it.", file=sys.stderr)
            _write(workspace, Path(SPEC))
            print(f"The spec is in {SPEC}", file=sys.stderr)
    except ConfigError as error:
        print(error, file=sys.stderr)
    return USER_ERROR


def _write(workspace: ws.Workspace, file: Path) -> None:
    with place_errors(file, "another place with --spec FILE"):
        file.write_text(json.dumps(spec_of(workspace), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
