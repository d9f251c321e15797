"""What a run was predicted to cost, beside what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from cvdd.chain.context import Context
from cvdd.cost import load_prediction, measured_seconds, plan_pieces, planning_beside


@dataclass(frozen=True)
class PredictedCost:
    """One stage of a run that ``cost=true`` was asked about before.

    Attributes:
        stage: members, patches, priors, images, labels or students.
        predicted: seconds of one process; None where the way in which something is made is not known to the prediction.
        measured: seconds of all processes together for the artefacts that were missing then.
    """

    stage: str
    predicted: float | None
    measured: float


def predicted_costs(context: Context) -> tuple[str, list[PredictedCost]] | None:
    """Return the machine of the prediction and its stages, if the same configuration was asked about.

    Args:
        context: of the finished run.
    """
    found = load_prediction(context.config)
    if found is None:
        return None
    machine, stages = found
    # The same walk as before the run names the same artefacts, all of which are there now.
    pieces = plan_pieces(planning_beside(context, context.config))
    costs = [PredictedCost(stage.stage, stage.seconds, measured_seconds(pieces, stage)) for stage in stages]
    return machine, [cost for cost in costs if cost.predicted or cost.measured]
