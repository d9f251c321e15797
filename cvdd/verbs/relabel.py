"""``relabel``: soft labels."""

from __future__ import annotations

from cvdd.chain.compare import distil
from cvdd.chain.context import Context
from cvdd.report.tables import print_artifact
from cvdd.support.config_base import ConfigError
from cvdd.verbs.made import Made


def relabel(context: Context, commands: list[str]) -> Made:
    """Make the labels.

    Raises:
        ConfigError: the configuration says that labels are not stored, or has none, so there is nothing to make.
    """
    if context.config.label.given is not None:
        raise ConfigError(
            f"label.given={context.config.label.given} are labels that are there already, and relabel.py makes some. "
            "Run evaluate.py, or choose another label"
        )
    if context.config.label.teachers == "none":
        raise ConfigError(
            "label.teachers=none makes no labels: students learn the images' own, or those that a method made with "
            "them. Run evaluate.py, or choose another label"
        )
    if context.config.label.store == "none":
        raise ConfigError("label.store=none computes labels when a student asks; use label.store=logits to store them")
    made = distil(context, context.config.method.name)
    assert made.labels.artifact is not None
    teachers = ", ".join(
        f"{name} {weight:.3f}" for name, weight in zip(made.labels.teachers, made.labels.weights, strict=True)
    )
    row = context.config.method.name
    artifacts = {f"{row}/images": made.images, f"{row}/labels": made.labels.artifact}
    context.log_artifacts(artifacts)
    print_artifact(made.labels.artifact, {"images": str(made.images.path), "teachers": teachers})
    return Made(artifacts=artifacts)
