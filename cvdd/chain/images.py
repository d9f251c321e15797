"""Stage ``distill``: synthetic images, unit by unit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cvdd.artifact import Artifact, Maker, Parts
from cvdd.artifact.tensor_files import is_whole
from cvdd.chain.context import Context
from cvdd.chain.difficulty import make_difficulty, make_group_statistics
from cvdd.chain.elsewhere import as_it_was_made
from cvdd.chain.fitting import fit_units, forget, remember, remembered
from cvdd.chain.given import kept_as_given
from cvdd.chain.initial import initial_images, make_start
from cvdd.chain.members import make_member
from cvdd.chain.real_choice import chosen_positions, images_of_class
from cvdd.chain.recover import RealSources, load_voter, recover_stack, require_splittable, splits_units
from cvdd.chain.retrieval import Retrieval, make_candidates
from cvdd.chain.statistics import load_statistics, make_statistics
from cvdd.chain.unit_files import UNITS, write_unit
from cvdd.chain.votes import plan_votes
from cvdd.data import to_eval_tensor
from cvdd.schema import MethodConfig
from cvdd.schema.anchors import BEGINNINGS
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.engine import Engine, Work, choose_engine, engines_elsewhere, hand_over, vain_wishes
from cvdd.synthesis.units import Stack, Unit, as_composed, plan_stacks, plan_stages, plan_units


def make_images(context: Context, priors: Mapping[str, float]) -> Artifact:
    """Return the images that members vote on, or those that a method keeps as they are.

    Args:
        context: the configuration and its surroundings.
        priors: prior performance of each member in percent; may be empty where nothing depends on it.
    """
    config, data = context.config, context.data()
    method, ipc = as_composed(config), config.ipc.images_per_class
    if method.init == "all":
        return _all_images(context)
    patches = make_start(context)
    if (kept := kept_as_given(context, patches)) is not None:
        return kept
    units = plan_units(ipc, len(data.classes), method)
    votes = plan_votes(config, units, priors)
    stacks = plan_stacks(units, [vote.draw for vote in votes], method)
    weights = {unit: vote.weights for unit, vote in zip(units, votes, strict=True)}
    names = list(config.committee.members)
    voting = sorted({index for vote in votes for index in vote.draw})
    members = {index: make_member(context, names[index]) for index in voting}
    recorded = {index: make_statistics(context, names[index]) for index in voting if method.statistics.recorded}
    identity: dict[str, Any] = {
        "data": data.identity,
        "classes": list(data.classes),
        "ipc": ipc,
        "method": method.model_dump(mode="json", exclude=_ignored(method)),
        # Nothing is drawn of images that are given.
        "seed": None if method.keeps_given else method.seed,
    }
    if method.iterations:
        # Members are known by their artefacts, the parents, in this order; their names are for people.
        identity["draws"] = [[voting.index(index) for index in vote.draw] for vote in votes]
        identity["weights"] = [list(vote.weights) for vote in votes]
        identity["bn_scale"] = [config.committee.members[names[index]].bn_scale for index in voting]
    split = splits_units(context) and method.iterations > 0
    if split:
        require_splittable(context, stacks)
        # Sums over ranks round in another way than one rank does.
        identity["ranks_of_a_unit"] = context.world.size
    graded = {} if method.grades is None else _graded(context, stacks)
    parents = [members[index] for index in voting] + [*recorded.values(), *graded.values()]
    candidates = None if method.retrieves is None else make_candidates(context)
    parents += [made for made in (patches, candidates) if made is not None]
    engine = Engine()
    if method.iterations:
        work = _work(context, stacks)
        engine = choose_engine(config.engine, method, work, context.device)
        for wish in vain_wishes(config.engine, method, split):
            context.tell(wish, logging.WARNING)
        others = [one.identity for one in engines_elsewhere(config.engine, method, work)]
        typed = f"engine.compile={str(engine.compile).lower()} engine.precision={engine.precision}"
        identity |= as_it_was_made(context, "images", identity, parents, engine.identity, others, typed)

    def prepare(work: Path) -> None:
        (work / UNITS).mkdir(exist_ok=True)

    def done(work: Path, index: int) -> bool:
        return all(is_whole(work / UNITS / f"{unit.name}.safetensors") for unit in stacks[index].units)

    @contextlib.contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        steps = max(method.iterations, 1)
        real = RealSources(
            None if method.init == "noise" else initial_images(context, patches),
            None if method.anchored is None else chosen_positions(context, patches),
            None if candidates is None else Retrieval.of(context, candidates),
        )
        with context.progress("distill", len(stacks) * steps) as advance:
            voters = {index: load_voter(context, names[index], members[index], engine) for index in voting}
            targets = {index: load_statistics(artifact) for index, artifact in recorded.items()}
            if method.iterations and not split and not remembered(work):
                _note_engine(work, engine, fit_units(context, engine, stacks), stacks)

            def make(index: int) -> None:
                stack = stacks[index]
                if split and context.world.main:
                    context.world.say(f"{work.relative_to(context.store.root)} {index}")
                for member in stack.draw if graded else ():
                    # A stack is of one slot, whose statistics the member has from here on.
                    of_slot = (graded[member], stack.units[0].slot)
                    alike = load_voter(context, names[member], members[member], engine, of_slot)
                    hand_over(voters[member], alike)
                shares = torch.tensor([weights[unit] for unit in stack.units]).T
                drawn = [(voters[index], targets.get(index)) for index in stack.draw]
                kept = replace(engine, **remembered(work))
                used = recover_stack(context, kept, stack, drawn, shares, real, work, advance)
                _note_engine(work, kept, used, [stack])

            yield Maker(make, lambda indices: advance(len(indices) * steps))

    def finish(work: Path) -> dict[str, Any]:
        counts: dict[str, Any] = {"units": len(units), "stacks": len(stacks), "images": ipc * len(data.classes)}
        if less := forget(work):
            counts["units_per_pass_for_lack_of_memory"] = less["units_per_pass"]
        return counts

    parts = Parts([f"stack{stack.index:05d}" for stack in stacks], done, maker, prepare)
    name = f"{data.name}-{method.name}-ipc{ipc}" + (f"-N{len(votes[0].draw)}" if method.iterations else "")
    if split and not context.world.main:
        _join_stacks(context, maker)
    images = context.store.make_parts("images", name, identity, parents, parts, finish)
    if split and context.world.main:
        context.world.say(None)
    return images


def _graded(context: Context, stacks: Sequence[Stack]) -> dict[int, Artifact]:
    """By member, the statistics that it has of the groups of real images of the slots on which it votes."""
    difficulty, names = make_difficulty(context), list(context.config.committee.members)
    slots: dict[int, set[int]] = {}
    for stack in stacks:
        for index in stack.draw:
            slots.setdefault(index, set()).update(unit.slot for unit in stack.units)
    return {
        index: make_group_statistics(context, names[index], difficulty, sorted(slots[index])) for index in sorted(slots)
    }


def _note_engine(work: Path, planned: Engine, used: Engine, stacks: Sequence[Stack]) -> None:
    if used != planned:
        most = max(len(stack.units) for stack in stacks)
        remember(work, units_per_pass=used.units_per_pass or most, record=used.record)


def _work(context: Context, stacks: Sequence[Stack]) -> Work:
    config, data = context.config, context.data()
    members = list(config.committee.members.values())
    units = [unit for stack in stacks for unit in stack.units]
    shown = sum(
        (stage.last - stage.first) * len(unit.targets)
        for stage in plan_stages(config.method, data.image_size)
        for stack in stacks
        for unit in stack.begun(stage.index)
    )
    backbones = tuple(members[index].backbone for index in sorted({index for stack in stacks for index in stack.draw}))
    voters = len(stacks[0].draw) if config.method.turns == "all" else 1
    parts = config.method.parts_judged
    return Work(
        backbones,
        shown * parts * voters // len(backbones),
        max(len(unit.targets) for unit in units) * parts,
        max(len(stack.units) for stack in stacks),
        data.image_size,
        len(data.classes),
        splits_units(context),
    )


def _join_stacks(context: Context, maker: Callable[[Path], AbstractContextManager[Maker]]) -> None:
    """Take part in the stacks that rank 0 makes, until all of them are there."""
    with contextlib.ExitStack() as opened:
        joined: Maker | None = None
        while (said := context.world.say(None)) is not None:
            place, index = said.rsplit(" ", 1)
            if joined is None:
                joined = opened.enter_context(maker(context.store.root / place))
            joined.make(int(index))


def _all_images(context: Context) -> Artifact:
    """Every real training image, so that all data can be labelled and compared like a distilled set.

    Raises:
        ConfigError: the data set does not fit memory.
    """
    config, data = context.config, context.data()
    if not data.train.in_memory:
        raise ConfigError(
            f"method.init=all copies all of {data.name}, which is made for data sets that fit memory; use "
            "protocol.full_data=true to train students on the files themselves"
        )
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()

    def build(work: Path) -> dict[str, Any]:
        (work / UNITS).mkdir(exist_ok=True)
        for label, count in enumerate(counts):
            chosen = images_of_class(context, label)
            pixels = to_eval_tensor(data.train, data.image_size, config.dataset.test_resize, chosen)
            write_unit(work / UNITS, Unit(0, label, label, label + 1, count), pixels, [], {})
        return {"units": len(counts), "stacks": 0, "images": sum(counts)}

    identity = {"data": data.identity, "classes": list(data.classes), "method": {"init": "all"}}
    return context.store.make("images", f"{data.name}-all", identity, [], build)


def _ignored(method: MethodConfig) -> Mapping[str, Any]:
    # Given images are known by their artefact, a parent.
    ignored = {"name", "seed", "given", "log_every", "log_agreement", "grid_every", "checkpoint_every"}
    # Ranks of real images and statistics of their groups are parents; images without them are older than they are.
    # So are images of one real one each; without iterations only real ones are put together here.
    whole = method.at_default("factor") or not (method.iterations or method.init in BEGINNINGS)
    ignored |= {"factor"} if whole else set()
    ignored |= set(filter(method.at_default, ("anchors", "schedule", "retrieval", "cutout", "early_late")))
    chosen = {"difficulty": {"variance_weight", "forward_share"} if method.init == "difficulty" else True}
    # The candidates are a parent.
    chosen |= {"retrieval": {"candidates", "sigma"}}
    if method.iterations:
        # The draws and their weights are part of the identity by themselves, and recorded statistics are parents.
        return chosen | {"statistics": {"batch"}} | dict.fromkeys(ignored | {"voters"}, True)
    kept = {
        "init",
        "iterations",
        "composer",
        "classes_per_unit",
        "slots_per_unit",
        "difficulty",
        "factor",
        "jpeg_round_trip",
    }
    return chosen | dict.fromkeys(ignored | (set(MethodConfig.model_fields) - kept), True)
