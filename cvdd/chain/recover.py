"""Recover: optimise the images of one stack (specification of the SRe2L family, section 2.2)."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.tensor_files import is_whole, save_tensors
from cvdd.augmentation.augment import denormalise, normalise, pixel_bounds
from cvdd.chain.context import Context
from cvdd.chain.difficulty import take_group_statistics
from cvdd.chain.members import load_network
from cvdd.chain.real_choice import anchors_of_units
from cvdd.chain.retrieval import Retrieval
from cvdd.chain.unit_files import UNITS, write_unit
from cvdd.chain.votes import effective_terms
from cvdd.computing.compiler import compiling
from cvdd.methods.fadrm import adjustable_residual, resized
from cvdd.schema import MethodConfig
from cvdd.schema.method import StatisticsConfig
from cvdd.statistics.bn import require_batchnorm
from cvdd.statistics.matching import Matcher
from cvdd.statistics.recording import RealStatistics
from cvdd.support.config_base import ConfigError
from cvdd.support.grids import image_grid
from cvdd.support.memory import OutOfMemory, enough_memory
from cvdd.support.progress import Advance
from cvdd.support.seeds import generator
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.engine import Engine, judges_by_unit, ready_voter
from cvdd.synthesis.log_rows import LogRow
from cvdd.synthesis.units import Stack, Stage, Unit, plan_stages, unit_views
from cvdd.synthesis.voting import Voter

log = logging.getLogger(__name__)


SHORT = {"ce": "CE", "bn": "BN", "features": "features"}
"""Names of a member's terms in lines of the console."""

Member = tuple[Voter, RealStatistics | None]
"""A member that votes, and recorded statistics where the method matches any."""


@dataclass(frozen=True)
class RealSources:
    """What the stacks take of real images.

    Attributes:
        start: initial images [classes, ipc, 3, size, size] uint8; None for noise.
        anchors: positions of the real images that each is made of, [classes, ipc, parts], where these are anchors.
        retrieval: chooses what is blended in after a stage; None for the initial images.
    """

    start: Tensor | None
    anchors: Tensor | None = None
    retrieval: Retrieval | None = None


def recover_stack(
    context: Context,
    engine: Engine,
    stack: Stack,
    members: Sequence[Member],
    weights: Tensor,
    real: RealSources,
    work: Path,
    advance: Advance,
) -> Engine:
    """Optimise a stack and save its units; an interrupted call goes on from its last checkpoint.

    Where memory is short members judge half as many units in a pass, which shows in the last bits alone.

    With ``trainer.split_units`` all ranks call this together, and rank 0 saves.

    Args:
        context: the configuration and its surroundings.
        engine: how members judge.
        stack: what to make.
        members: of its draw.
        weights: [members, units] shares of the vote.
        real: where they begin, and what else is real.
        work: the artefact's directory.
        advance: called with the number of iterations done since the last call.

    Returns:
        How members judged in the end.

    Raises:
        OutOfMemory: a single unit is too much.
    """
    config, data = context.config, context.data()
    method = config.method
    names = [voter.name for voter, _ in members]
    images = torch.stack([_start(context, unit, real.start) for unit in stack.units])
    rows: list[LogRow] = []
    if method.iterations:
        images, rows, engine = _optimise(context, engine, stack, members, weights, images, work, advance, real)
    else:
        advance(1)
    if splits_units(context) and not context.world.main:
        return engine
    # What nobody has changed has 8 bits already, and would lose one of them here and there.
    truncate = method.jpeg_round_trip and method.iterations > 0
    pixels = denormalise(images, data.mean, data.std, truncate=truncate)
    if method.jpeg_round_trip:
        pixels = torch.stack([jpeg_round_trip(image) for image in pixels.flatten(0, 1)]).view_as(pixels)
    stages = plan_stages(method, data.image_size)
    for unit, unit_pixels, unit_weights in zip(stack.units, pixels, weights.T, strict=True):
        shares = dict(zip(names, unit_weights.tolist(), strict=True))
        # Rows of earlier stages are of other units.
        first = stages[stack.first_stage(unit)].first
        own = [asdict(row) for row in rows if row.iteration > first]
        write_unit(work / UNITS, unit, unit_pixels, own, shares)
    for leftover in work.glob(f"stack{stack.index:05d}.*.tmp"):
        leftover.unlink()
    return engine


def _optimise(
    context: Context,
    engine: Engine,
    stack: Stack,
    members: Sequence[Member],
    weights: Tensor,
    initial: Tensor,
    work: Path,
    advance: Advance,
    real: RealSources,
) -> tuple[Tensor, list[LogRow], Engine]:
    config, data = context.config, context.data()
    method = config.method
    shares = dict(zip([voter.name for voter, _ in members], weights.mean(dim=1).tolist(), strict=True))
    images, rows, done = initial[:0], list[LogRow](), 0
    split = splits_units(context)
    anchors = None if real.anchors is None else anchors_of_units(context, real.anchors, stack.units)

    def on_row(row: LogRow, current: Tensor) -> None:
        nonlocal done
        advance(row.iteration - done)
        done = row.iteration
        _log_row(context, stack, row, shares, current)

    for stage in plan_stages(method, data.image_size):
        units = stack.begun(stage.index)
        if not units:
            continue
        finished = work / f"stack{stack.index:05d}.stage{stage.index}.tmp"
        if is_whole(finished):
            images, rows = _load_stage(finished)
            advance(stage.last - done)
            done = stage.last
            continue
        images = _next_images(method, stack, stage, images, initial, real.retrieval)
        checkpoint = work / f"stack{stack.index:05d}.stage{stage.index}.ckpt.tmp"
        while True:
            module = DistillModule(
                images,
                torch.stack([unit.targets for unit in units]),
                [unit_views(unit, method, stage) for unit in units],
                _voters(context, members, len(units)),
                weights[:, : len(units)],
                method,
                pixel_bounds(data.mean, data.std),
                on_row,
                stage,
                split,
                engine.units_per_pass,
                engine.opinion,
                engine.record,
                None if anchors is None else stack.take_begun(anchors, stage.index),
            )
            module.rows = list(rows)
            try:
                with (
                    enough_memory(f"stack {stack.index} of the images", _less_memory(method, units)),
                    compiling(engine.compile),
                ):
                    context.fit(module, None, module.epochs, checkpoint, context.world.size if split else 1)
                break
            except OutOfMemory as error:
                module.on_fit_end()
                fewer = engine.fewer(len(units)) if judges_by_unit(method) and not split else None
                if fewer is None:
                    raise
                alone = " and members one after the other" if engine.record and not fewer.record else ""
                log.warning("%s; going on with %d units in a pass%s", error, fewer.units_per_pass or 1, alone)
                engine = fewer
        images, rows = module.images.detach().cpu(), module.rows
        if stage.last < method.iterations and (context.world.main or not split):
            _save_stage(finished, images, rows)
    return images, rows, engine


def _next_images(
    method: MethodConfig, stack: Stack, stage: Stage, images: Tensor, initial: Tensor, retrieval: Retrieval | None
) -> Tensor:
    """Return what a stage begins with: what the last one left, blended, and those that begin now as they were."""
    before, now = stage.index - 1, stage.index
    if not len(images):
        return resized(stack.take_begun(initial, now), stage.size)
    if method.residual == 1:
        back = images
    elif retrieval is not None:
        back = retrieval.real_images(images, stack.begun(before))
    else:
        back = stack.take_begun(initial, before)
    blended = adjustable_residual(images, back, method.residual, stage.size)
    if stack.begun(before) == stack.begun(now):
        return blended
    return stack.put_begun(blended, before, resized(stack.take_begun(initial, now), stage.size))


def _less_memory(method: MethodConfig, units: Sequence[Unit]) -> str:
    count, images = len(units), len(units[0].targets)
    if count > 1 and not judges_by_unit(method):
        shown = f"{count} units of {images} images are judged together, as method.statistics needs it"
        return f"{shown}; lower method.units_per_stack to at most {count // 2}"
    shown = f"a unit of {images} images is judged in one forward pass"
    return f"{shown}; lower method.classes_per_unit, or share each unit: trainer.split_units=true"


def splits_units(context: Context) -> bool:
    """Whether ranks share the images of each unit, rather than the units."""
    return context.config.trainer.split_units and context.world.size > 1


def require_splittable(context: Context, stacks: Sequence[Stack]) -> None:
    """Refuse a method whose units cannot be split.

    Raises:
        ConfigError: it looks at more of a unit than sums over its images tell, or a unit has too few of them, at least
            in a stage.
    """
    method, ranks = context.config.method, context.world.size
    if method.statistics != StatisticsConfig() or method.density:
        raise ConfigError(
            "trainer.split_units=true adds up the statistics of BatchNorm layers alone; method.statistics and "
            "method.density look at more. Set trainer.split_units=false"
        )
    stages = plan_stages(method, context.data().image_size)
    fewest = min(len(unit.targets) for stack in stacks for stage in stages for unit in stack.begun(stage.index))
    if fewest < ranks:
        raise ConfigError(
            f"trainer.split_units=true: a unit has {fewest} images, too few for {ranks} processes; set "
            f"method.classes_per_unit to at least {ranks}, or trainer.split_units=false"
        )


def _save_stage(path: Path, images: Tensor, rows: Sequence[LogRow]) -> None:
    save_tensors(path, {"images": images}, {"rows": json.dumps([asdict(row) for row in rows])})


def _load_stage(path: Path) -> tuple[Tensor, list[LogRow]]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("images"), [LogRow(**row) for row in json.loads(file.metadata()["rows"])]


def load_voter(
    context: Context, name: str, artifact: Artifact, engine: Engine, of_group: tuple[Artifact, int] | None = None
) -> Voter:
    """Load a member that votes, in the form in which it judges.

    Args:
        context: the configuration and its surroundings.
        name: of the member.
        artifact: its own.
        engine: how it judges.
        of_group: statistics of groups of real images, and the group whose statistics it has; None for its own.

    Raises:
        ConfigError: it has no BatchNorm layer whose statistics could be matched, or no layer of that name for anchors.
    """
    method, member = context.config.method, context.config.committee.members[name]
    network = load_network(context, artifact, member.backbone)
    if of_group is not None:
        take_group_statistics(network, *of_group)
    network = network.to(context.device)
    if method.r_bn and member.bn_scale and method.statistics.layers == "bn":
        require_batchnorm(network, name)
    return ready_voter(name, network.eval().requires_grad_(False), member.bn_scale, engine, method.anchored)


def _voters(context: Context, members: Sequence[Member], units: int) -> list[Voter]:
    method = context.config.method
    if method.statistics == StatisticsConfig():
        return [voter for voter, _ in members]
    groups = units if method.statistics_of == "unit" else 1
    return [
        replace(
            voter,
            matcher=Matcher(
                voter.network, method.statistics, groups, method.first_bn_multiplier, recorded, method.seed
            ),
        )
        for voter, recorded in members
    ]


def _start(context: Context, unit: Unit, start: Tensor | None) -> Tensor:
    data = context.data()
    if start is None:
        shape = (len(unit.targets), 3, data.image_size, data.image_size)
        return torch.randn(shape, generator=generator(context.config.method.seed, "noise", unit.slot, unit.block))
    return normalise(unit.of(start), data.mean, data.std)


def _log_row(context: Context, stack: Stack, row: LogRow, shares: Mapping[str, float], images: Tensor) -> None:
    """Log a stack: loss, learning rate, by member its terms and its weight, and by pair their agreement.

    The terms are those of the page's plot: cross-entropy times ``method.ce``, the BatchNorm distance times
    ``method.r_bn`` and the member's ``bn_scale``, and the distance of features times the weight of the anchors; that of
    densification is ``method.density`` times it. The sum over members of weight times their terms, and of that, is the
    loss where all members judge every iteration and all units of the stack have the same weights.
    """
    config, data = context.config, context.data()
    method = config.method
    said = asdict(row)
    terms = {name: effective_terms(config, name, said) for name in row.ce}
    values = {"distill/loss": row.loss, "distill/lr": row.lr, "distill/stack": float(stack.index)}
    values |= {
        f"distill/{term}/{name}": value for name, of_member in terms.items() for term, value in of_member.items()
    }
    values |= {f"distill/weight/{name}": value for name, value in shares.items()}
    if method.density:
        values["distill/density"] = method.density * row.density
    values |= {f"distill/agreement/{pair}": cosine for pair, cosine in row.agreement.items()}
    step = stack.index * method.iterations + row.iteration
    context.log(values, step)
    if row.iteration % method.grid_every == 0 or row.iteration == method.iterations:
        by_member = "; ".join(
            f"{name} weight {shares[name]:.2f} "
            + " ".join(f"{SHORT[term]} {value:.3g}" for term, value in of_member.items())
            for name, of_member in terms.items()
        )
        log.info("stack %d, iteration %d: loss %.4g; %s", stack.index, row.iteration, row.loss, by_member)
        grid = image_grid(denormalise(images[0], data.mean, data.std))
        context.log_images("distill/images", grid, step)
        context.save_picture(f"stack{stack.index:05d}", grid)


def jpeg_round_trip(image: Tensor) -> Tensor:
    """Return what remains of an image [3, h, w] uint8 after JPEG at quality 75 with 4:2:0 chroma, as released."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG")
    return torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)
