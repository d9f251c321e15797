"""``train``: committee members."""

from __future__ import annotations

from cvdd.assistants import assisted
from cvdd.chain.apm_teachers import make_apm_teachers
from cvdd.chain.members import make_member
from cvdd.chain.trajectories import make_trajectories
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.report.tables import print_artifact, print_members


def train(context: Context, commands: list[str]) -> float | None:
    """Make all members, or the networks that the method itself needs; return their mean test accuracy.

    Raises:
        ConfigError: assistants are asked for where there is nothing to share.
    """
    method = context.config.method
    if method.mtt is not None:
        if context.config.trainer.assistants:
            raise ConfigError(
                f"trainer.assistants={context.config.trainer.assistants} has nothing to do: experts are made one after "
                "the other, as one artefact; set trainer.assistants=0"
            )
        trajectories = make_trajectories(context)
        context.log_artifacts({"trajectories": trajectories})
        print_artifact(trajectories, {"experts": str(method.mtt.experts.count)})
        return None
    if method.apm is not None:
        with assisted(context.config):
            teachers = make_apm_teachers(context)
        accuracies = [float(teacher.metrics["test_top1"]) for teacher in teachers]
        shown = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        context.log_artifacts({f"teachers/{index}": teacher for index, teacher in enumerate(teachers)})
        print_artifact(teachers[0], {"teachers": str(len(teachers)), "top-1 in percent": shown})
        return sum(accuracies) / len(accuracies)
    with assisted(context.config):
        members = {name: make_member(context, name) for name in context.config.committee.members}
    context.log_artifacts({f"members/{name}": member for name, member in members.items()})
    print_members(context.config, members)
    return sum(float(member.metrics["test_top1"]) for member in members.values()) / len(members)
