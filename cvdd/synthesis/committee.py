"""Who votes, and with what weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import generator

Draw = tuple[int, ...]
"""The members that vote on one slot, as indices into the committee."""


def vote_weights(priors: Sequence[float], temperature: float, voter: str, *, seed: int = 0, slot: int = 0) -> Tensor:
    """Weights of the members that were drawn (equations 4 and 5 of the paper).

    Args:
        priors: prior performance of each drawn member in percent.
        temperature: of the softmax; small lets the best member decide, large makes all equal.
        voter: ``prior`` (softmax of priors / temperature), ``equal``, or ``random`` (as released: uniform
            numbers, divided by their sum, drawn anew for each slot).
        seed: for ``random``.
        slot: for ``random``.

    Returns:
        [members] float32, summing to 1.

    Raises:
        ConfigError: the temperature is not greater than 0, or there is no such voter.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature.vote={temperature}: a temperature is greater than 0.")
    count = len(priors)
    if voter == "equal":
        return torch.full((count,), 1 / count)
    if voter == "random":
        # Never 0, so that a single member has a share.
        share = 1 - torch.rand(count, generator=generator(seed, "voter", slot))
        return share / share.sum()
    if voter == "prior":
        return torch.softmax(torch.tensor(priors, dtype=torch.float64) / temperature, dim=0).float()
    raise ConfigError(f"committee.voter={voter}: choose prior, equal or random.")


def draw_members(
    draw: str, size: int, slot: int, priors: Sequence[float], seed: int, fixed: Sequence[Sequence[int]] = ()
) -> Draw:
    """Choose the members that vote on one IPC slot.

    Args:
        draw: ``in_turn`` (all subsets of ``size`` in lexicographic order, slot after slot), ``random`` (without
            replacement, for each slot), ``best`` (highest priors, the same for all slots), or ``fixed`` (the list
            ``fixed``, in turn).
        size: N, the number of members that vote on a slot.
        slot: the IPC slot.
        priors: prior performance of all members.
        seed: of the random draw.
        fixed: lists of member indices.

    Returns:
        Sorted member indices (``fixed`` keeps its order).

    Raises:
        ConfigError: there are fewer members than are to vote, or no such draw.
    """
    count = len(priors)
    if not 1 <= size <= count:
        raise ConfigError(f"committee.size={size}: the committee has {count} members, so choose 1 to {count}.")
    if draw == "in_turn":
        subsets = list(itertools.combinations(range(count), size))
        return subsets[slot % len(subsets)]
    if draw == "random":
        return tuple(sorted(torch.randperm(count, generator=generator(seed, "committee", slot))[:size].tolist()))
    if draw == "best":
        order = sorted(range(count), key=lambda index: (-priors[index], index))
        return tuple(sorted(order[:size]))
    if draw == "fixed":
        return tuple(fixed[slot % len(fixed)])
    raise ConfigError(f"committee.draw={draw}: choose in_turn, random, best or fixed.")


def turn_weights(weights: Tensor, turns: str, iterations: int, seed: int) -> Tensor:
    """Shares of the vote in every iteration.

    Args:
        weights: [members, units] shares of the vote.
        turns: ``all`` (every member by its share), ``in_turn`` (one member after the other, alone), or ``sampled`` (one
            member alone, drawn by its share: an unbiased estimate of the whole vote at the cost of one member).
        iterations: how many.
        seed: of ``sampled``; units with the same shares draw the same member.

    Returns:
        [iterations, members, units].

    Raises:
        ConfigError: there is no such way.
    """
    members, units = weights.shape
    if turns == "all":
        return weights.expand(iterations, members, units)
    if turns == "in_turn":
        chosen = (torch.arange(iterations) % members)[:, None].expand(iterations, units)
    elif turns == "sampled":
        point = torch.rand(iterations, generator=generator(seed, "turns"), dtype=torch.float64)
        below = weights.double().cumsum(dim=0)[None] <= point[:, None, None]
        chosen = below.sum(dim=1).clamp(max=members - 1)
    else:
        raise ConfigError(f"method.turns={turns}: choose all, in_turn or sampled.")
    return torch.nn.functional.one_hot(chosen, members).transpose(1, 2).to(weights.dtype)
