"""Prior performance of the members (specification of CV-DD, section 3)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cvdd.artifact import Artifact
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.labels import make_labels
from cvdd.chain.students import make_student
from cvdd.composition.prior_overrides import prior_overrides
from cvdd.schema import RunConfig, needs_priors, votes_by_priors, with_overrides


@dataclass(frozen=True)
class Priors:
    """Prior performance of the members.

    Attributes:
        values: in percent, by member name; empty where nothing depends on it.
        images: the sets, one for each member, by which it was measured; none if it was given.
        students: measured on them.
    """

    values: dict[str, float]
    images: tuple[Artifact, ...] = ()
    students: tuple[Artifact, ...] = ()


def find_priors(context: Context) -> Priors:
    """Return each member's prior performance, measured or given; empty where nothing depends on it."""
    config = context.config
    if not priors_needed(config):
        return Priors({})
    if config.prior.source == "given":
        return Priors({name: config.prior.values[name] for name in config.committee.members})
    measured = [measure_prior(context, name) for name in config.committee.members]
    return Priors(
        {name: value for one in measured for name, value in one.values.items()},
        tuple(artifact for one in measured for artifact in one.images),
        tuple(artifact for one in measured for artifact in one.students),
    )


def priors_needed(config: RunConfig) -> bool:
    """Whether priors are asked for: by what the verb makes, which is a comparison's rows too if it evaluates."""
    if config.verb == "distill":
        return votes_by_priors(config)
    if config.verb == "relabel":
        return needs_priors(config)
    rows = [config, *(with_overrides(config, {**overrides, "compare": {}}) for overrides in config.compare.values())]
    return any(needs_priors(row) for row in rows if shares_priors(config, row))


def shares_priors(config: RunConfig, row: RunConfig) -> bool:
    """Whether a row of a comparison has the priors of the command: the same members, measured or given alike.

    A comparison is of images under equal labels, and a prior that was measured with another row's initial images would
    change the weights of the teachers. Other members, or other settings of ``prior``, have priors of their own.
    """
    return (row.committee.members, row.prior) == (config.committee.members, config.prior)


def priors_of_row(context: Context, row: Context, shared: Priors) -> Priors:
    """Return the priors of a row of a comparison.

    Args:
        context: of the command.
        row: of the row.
        shared: those of the command.
    """
    return shared if shares_priors(context.config, row.config) else find_priors(row)


def measure_prior(context: Context, member: str) -> Priors:
    """Distil with one member alone, label with the observer, train its network, and return the top-1 accuracy.

    The observer labels also where the configuration itself has hard labels or a pruned store.
    Every step is an ordinary artefact, so a prior is measured once whatever is changed later in the committee.
    """
    config, prior = context.config, context.config.prior
    single = context.differing(prior_overrides(config, member), f"prior of {member}", serves="priors")
    images = make_images(single, {})
    labels = make_labels(single, images, {})
    backbone = config.committee.members[prior.observer].backbone
    students = [
        make_student(single, labels, prior.observer, backbone, seed, prior.measured_on) for seed in range(prior.seeds)
    ]
    top1 = statistics.fmean(float(student.metrics["top1"]) for student in students)
    return Priors({member: top1}, (images,), tuple(students))
