"""``train``: committee members."""

from __future__ import annotations

from cvdd.chain.assistants import assisted
from cvdd.chain.context import Context
from cvdd.chain.members import make_member
from cvdd.chain.own_engines import OwnEngine, own_engine
from cvdd.report.tables import print_artifact, print_members
from cvdd.support.config_base import ConfigError
from cvdd.verbs.made import Made


def train(context: Context, commands: list[str]) -> Made:
    """Make all members, or the networks that the method itself needs; their mean test accuracy is the metric.

    Raises:
        ConfigError: assistants are asked for where there is nothing to share.
    """
    own = own_engine(context.config.method)
    if own is not None:
        return _train_own(context, own)
    with assisted(context.config):
        members = {name: make_member(context, name) for name in context.config.committee.members}
    artifacts = {f"members/{name}": member for name, member in members.items()}
    context.log_artifacts(artifacts)
    print_members(context.config, members)
    return Made(sum(float(member.metrics["test_top1"]) for member in members.values()) / len(members), artifacts)


def _train_own(context: Context, own: OwnEngine) -> Made:
    assistants = context.config.trainer.assistants
    if assistants and not own.apart:
        raise ConfigError(
            f"trainer.assistants={assistants} has nothing to do: {own.called} are made one after the other, as one "
            "artefact; set trainer.assistants=0"
        )
    with assisted(context.config):
        made = own.networks(context, None)
    named = {f"{one.kind}/{index}": one for index, one in enumerate(made)} if own.apart else {made[0].kind: made[0]}
    context.log_artifacts(named)
    accuracies = [float(one.metrics["test_top1"]) for one in made if "test_top1" in one.metrics]
    shown = {"top-1 in percent": ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)} if accuracies else {}
    print_artifact(made[0], {own.called: str(len(made) if own.apart else own.count(context)), **shown})
    return Made(sum(accuracies) / len(accuracies) if accuracies else None, named)
