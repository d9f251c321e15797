"""Who votes on each unit, and with what weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvdd.schema import RunConfig
from cvdd.support.seeds import derive_seed
from cvdd.synthesis.committee import Draw, draw_members, vote_weights
from cvdd.synthesis.units import Unit, draw_per_unit


@dataclass(frozen=True)
class Vote:
    """Who votes on a unit.

    Attributes:
        draw: member indices.
        weights: their shares.
    """

    draw: Draw
    weights: tuple[float, ...]


def plan_draws(config: RunConfig, units: Sequence[Unit], priors: Mapping[str, float]) -> list[Draw]:
    """Return, unit by unit, the indices of the members that vote.

    Args:
        config: the configuration.
        units: all units.
        priors: prior performance of each member in percent; may be empty where the draw does not depend on it.
    """
    committee, voters = config.committee, config.method.voters
    names = list(committee.members)
    if voters == "all":
        return [tuple(range(len(names)))] * len(units)
    if voters != "drawn":
        return [tuple(names.index(name) for name in voters)] * len(units)
    alphas = priors_in_order(priors if committee.draw == "best" else {}, names)
    fixed = [[names.index(name) for name in group] for group in committee.fixed]
    seed = derive_seed(config.method.seed, "distill")

    def draw(turn: int) -> Draw:
        return draw_members(committee.draw, committee.size, turn, alphas, seed, fixed)

    return draw_per_unit(units, config.method, draw)


def plan_votes(config: RunConfig, units: Sequence[Unit], priors: Mapping[str, float]) -> list[Vote]:
    """Return, unit by unit, who votes and with what weight.

    Args:
        config: the configuration.
        units: all units.
        priors: prior performance of each member in percent; may be empty where nothing depends on it.
    """
    if not config.method.iterations:
        return [Vote((), ())] * len(units)
    committee = config.committee
    alphas = priors_in_order(priors if committee.voter == "prior" else {}, list(committee.members))
    seed = derive_seed(config.method.seed, "distill")
    votes = []
    for unit, draw in zip(units, plan_draws(config, units, priors), strict=True):
        chosen = [alphas[index] for index in draw]
        # In turn nobody has a weight, whatever priors are known for the labels.
        voter = committee.voter if len(draw) > 1 and config.method.turns != "in_turn" else "equal"
        weights = vote_weights(chosen, config.temperature.vote, voter, seed=seed, slot=unit.slot)
        votes.append(Vote(draw, tuple(weights.tolist())))
    return votes


def priors_in_order(priors: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Return the priors of these members; zeros where none are given because nothing depends on them."""
    return [priors[name] for name in names] if priors else [0.0] * len(names)


def effective_terms(config: RunConfig, member: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Multiply what a member said by its factors, so that it is what its vote weighs; terms with factor 0 are left out.

    Args:
        config: of the images.
        member: its name.
        row: of the log, with what members said as it is: by term (``ce``, ``bn``, ``features``) and member. Rows of
            earlier versions have no features.
    """
    method = config.method
    factors = {
        "ce": method.ce,
        "bn": method.r_bn * config.committee.members[member].bn_scale,
        "features": 0.0 if method.anchored is None else method.anchored.weight,
    }
    return {term: factor * row.get(term, {}).get(member, 0.0) for term, factor in factors.items() if factor}
