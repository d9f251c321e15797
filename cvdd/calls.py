"""The four commands as functions, for programs and notebooks: ``cvdd.evaluate("method=fadrm", "ipc=10")``.

A call is the command with the same overrides: the same checks, the same store, the same files in the same places. What
a command says of a mistake before it ends is what a call raises.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, open_dict, read_write
from yaml import YAMLError

from cvdd.composition.arguments import ArgumentError, apart, prepare, typed_overrides
from cvdd.composition.command import checked, without_each
from cvdd.composition.composable import require_composable, said_of_yaml
from cvdd.composition.config_directory import config_directory
from cvdd.composition.launching import BASIC

if TYPE_CHECKING:
    from cvdd.distilled import DistilledSet


_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Run:
    """What a call has made.

    Attributes:
        metric: mean top-1 accuracy in percent: of the method's students (evaluate), of the members (train); else None.
        results: of ``evaluate``, a row for each set of images and each student, as in ``results.csv``: ``row``,
            ``student``, ``top1``, ``standard_error``, ``n``, ``best_top1``, bytes, seconds and more.
        artifacts: directories of the store by what they are, such as ``cvdd/images`` and ``cvdd/labels``.
        output: directory of what a run shows: of ``evaluate`` the page, ``report.html``; with ``cost=true`` nothing is
            shown there.
        row: name of the method's own row.
    """

    metric: float | None
    results: tuple[Mapping[str, Any], ...]
    artifacts: Mapping[str, Path]
    output: Path
    row: str

    def load(self, row: str | None = None) -> DistilledSet:
        """Read the distilled set that was made, with its soft labels if these are stored.

        Args:
            row: of a comparison; otherwise the method's own.

        Raises:
            ValueError: no images of such a row were made.
        """
        from cvdd.distilled import load

        name = self.row if row is None else row
        for kind in ("labels", "images"):
            if found := self.artifacts.get(f"{name}/{kind}"):
                return load(found)
        made = sorted(key.removesuffix("/images") for key in self.artifacts if key.endswith("/images"))
        raise ValueError(f"no images of {name} were made here; choose from {', '.join(made) or 'none'}")


def call(verb: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> Run:
    """Do what a command would do.

    Args:
        verb: train, distill, relabel or evaluate.
        overrides: what one would type after it.
        config_dir: of further files of the configuration, as ``--config-dir``.

    Raises:
        ValueError: something is wrong with an override; the message says what to write.
    """
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    for override in overrides:
        _refuse_what_is_of_commands(verb, override)
    ours = config_directory()
    # Hydra, the number of threads and the device are of the whole process, so calls go one after the other.
    with _ONE_AT_A_TIME, _no_other_hydra():
        try:
            arguments = prepare([*own, *overrides], ours)
            require_composable(verb, arguments, ours)
        except YAMLError as error:
            raise ArgumentError(said_of_yaml(error)) from error
        _, task = apart(arguments)
        for override in task:
            _refuse_several(override)
        composed = _composed(verb, task, config_dir)
        return _made(composed)


def _made(composed: DictConfig) -> Run:
    settings = HydraConfig.get()
    task = typed_overrides(settings.overrides.task)
    choices = settings.runtime.choices
    if choices["hydra/launcher"] != BASIC:
        raise ArgumentError(f"hydra/launcher={choices['hydra/launcher']} starts jobs of a command; leave it out")
    config = checked(composed, task, choices.get("debug"))
    # Only now is it known that there is something to do.
    from cvdd.commands.runtime import Invocation, run
    from cvdd.support.allocator import give_back_memory

    try:
        made = run(config, Invocation(tuple(task), without_each=partial(without_each, config, composed, task)))
    finally:
        # The process goes on with something else.
        give_back_memory()
    artifacts = {name: artifact.path for name, artifact in made.artifacts.items()}
    return Run(made.metric, tuple(made.results), artifacts, config.paths.output, config.method.name)


def _refuse_what_is_of_commands(verb: str, override: object) -> None:
    if not isinstance(override, str):
        raise ArgumentError(f"{override!r}: overrides are strings; write cvdd.{verb}('ipc=10', 'method=cvdd')")
    if override.startswith("-"):
        raise ArgumentError(f"{override}: options are the command line's; give overrides alone, such as method=cvdd")
    if override.lstrip("+").startswith(("sweep=", "point=")):
        raise ArgumentError(f"{override}: a sweep is a command; type python {verb}.py {override}")


def _refuse_several(override: str) -> None:
    if OverridesParser.create().parse_override(override).is_sweep_override():
        raise ArgumentError(f"{override}: several values are a multirun's; call once for each of them")


@contextlib.contextmanager
def _no_other_hydra() -> Iterator[None]:
    """Let the body have Hydra to itself, also inside a program that uses it."""
    theirs = GlobalHydra.instance().hydra, HydraConfig.instance().cfg, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    setbase("1.3")
    try:
        yield
    finally:
        # Asked for anew, because Hydra puts others in their places.
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg, VersionBase.instance().version_base = theirs


def _composed(verb: str, task: Sequence[str], config_dir: str | Path | None) -> DictConfig:
    """Compose as the command does, and let it be known where its results go."""
    path = create_config_search_path(str(config_directory()))
    if config_dir is not None:
        # Where the option puts it: before what Hydra wants to be last.
        path.prepend("command-line", f"file://{Path(config_dir).absolute()}", SearchPathQuery(provider="schema"))
    Hydra.create_main_hydra2(task_name=verb, config_search_path=path)
    whole = compose(verb, list(task), return_hydra_config=True)
    # As Hydra does when a job begins.
    HydraConfig.instance().set_config(whole)
    output = Path(whole.hydra.run.dir).absolute()
    with read_write(whole.hydra.runtime), open_dict(whole.hydra.runtime):
        whole.hydra.runtime.output_dir = str(output)
    HydraConfig.instance().set_config(whole)
    composed = copy.deepcopy(whole)
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return composed
