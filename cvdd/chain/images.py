"""Stage ``distill``: synthetic images, unit by unit."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.augment import denormalise, normalise
from cvdd.bn import require_batchnorm
from cvdd.chain.initial import initial_images, make_initial_patches
from cvdd.chain.members import load_network, make_member
from cvdd.committee import Draw, draw_members, vote_weights
from cvdd.context import Context
from cvdd.grids import image_grid
from cvdd.progress import Advance
from cvdd.report.terms import effective_terms
from cvdd.schema import RunConfig
from cvdd.seeds import derive_seed, generator
from cvdd.synthesis import DistillModule, LogRow, Stack, Unit, pixel_bounds, plan_stacks, plan_units, unit_views
from cvdd.voting import Voter

log = logging.getLogger(__name__)

UNITS = "units"


def make_images(context: Context, priors: Mapping[str, float]) -> Artifact:
    """Return the distilled images of a configuration.

    Args:
        context: the configuration and its surroundings.
        priors: prior performance of each member in percent; may be empty where nothing depends on it.
    """
    config, data = context.config, context.data()
    method, ipc = config.method, config.ipc.images_per_class
    units = plan_units(ipc, len(data.classes), method.classes_per_unit)
    votes = _votes(context, priors) if method.iterations else [Vote((), ())] * ipc
    stacks = plan_stacks(units, lambda slot: votes[slot].draw, method.units_per_stack)
    names = list(config.committee.members)
    voting = sorted({index for vote in votes for index in vote.draw})
    members = {index: make_member(context, names[index]) for index in voting}
    patches = make_initial_patches(context) if method.init == "patches" else None
    ignored = IGNORED if method.iterations else IGNORED | OPTIMISATION
    identity: dict[str, Any] = {
        "data": data.identity,
        "classes": list(data.classes),
        "ipc": ipc,
        "method": method.model_dump(mode="json", exclude=set(ignored)),
        "seed": method.seed,
    }
    if method.iterations:
        # Members are known by their artefacts, the parents, in this order; their names are for people.
        identity["draws"] = [[voting.index(index) for index in vote.draw] for vote in votes]
        identity["weights"] = [list(vote.weights) for vote in votes]
        identity["bn_scale"] = [config.committee.members[names[index]].bn_scale for index in voting]
    parents = [members[index] for index in voting] + ([patches] if patches is not None else [])

    def build(work: Path) -> dict[str, Any]:
        folder = work / UNITS
        folder.mkdir(exist_ok=True)
        voters = {index: _voter(context, members[index], names[index]) for index in voting}
        start = None if method.init == "noise" else initial_images(context, patches)
        steps = max(method.iterations, 1)
        with context.progress("distill", len(stacks) * steps) as advance:
            for stack in stacks:
                if all((folder / f"{unit.name}.safetensors").exists() for unit in stack.units):
                    advance(steps)
                    continue
                weights = torch.tensor([votes[unit.slot].weights for unit in stack.units]).T
                _make_stack(context, stack, [voters[index] for index in stack.draw], weights, start, work, advance)
        return {"units": len(units), "stacks": len(stacks), "images": ipc * len(data.classes)}

    name = f"{data.name}-{method.name}-ipc{ipc}" + (f"-N{config.committee.size}" if method.iterations else "")
    return context.store.make("images", name, identity, parents, build)


IGNORED = frozenset({"name", "seed", "log_every", "grid_every", "checkpoint_every"})
"""Fields of the method that change nothing in the images."""

OPTIMISATION = frozenset(
    {
        "lr",
        "betas",
        "eps",
        "ce",
        "r_bn",
        "first_bn_multiplier",
        "statistics_of",
        "crop_scale",
        "flip",
        "jitter",
        "units_per_stack",
    }
)
"""Fields of the method that change nothing where nothing is optimised."""


@dataclass(frozen=True)
class Vote:
    """Who votes on a slot.

    Attributes:
        draw: member indices.
        weights: their shares.
    """

    draw: Draw
    weights: tuple[float, ...]


def plan_draws(config: RunConfig, priors: Mapping[str, float]) -> list[Draw]:
    """Return, slot by slot, the indices of the members that vote.

    Args:
        config: the configuration.
        priors: prior performance of each member in percent; may be empty where the draw does not depend on it.
    """
    committee = config.committee
    names = list(committee.members)
    alphas = [priors.get(name, 0.0) for name in names]
    fixed = [[names.index(name) for name in group] for group in committee.fixed]
    seed = derive_seed(config.method.seed, "distill")
    return [
        draw_members(committee.draw, committee.size, slot, alphas, seed, fixed)
        for slot in range(config.ipc.images_per_class)
    ]


def _votes(context: Context, priors: Mapping[str, float]) -> list[Vote]:
    config = context.config
    committee = config.committee
    alphas = [priors.get(name, 0.0) for name in committee.members]
    seed = derive_seed(config.method.seed, "distill")
    votes = []
    for slot, draw in enumerate(plan_draws(config, priors)):
        chosen = [alphas[index] for index in draw]
        weights = vote_weights(chosen, config.temperature.vote, committee.voter, seed=seed, slot=slot)
        votes.append(Vote(draw, tuple(weights.tolist())))
    return votes


def _voter(context: Context, artifact: Artifact, name: str) -> Voter:
    member = context.config.committee.members[name]
    network = load_network(context, artifact, member.backbone).to(context.device)
    if context.config.method.r_bn and member.bn_scale:
        require_batchnorm(network, name)
    return Voter(name, network, member.bn_scale)


def _make_stack(
    context: Context,
    stack: Stack,
    voters: Sequence[Voter],
    weights: Tensor,
    start: Tensor | None,
    work: Path,
    advance: Advance,
) -> None:
    config, data = context.config, context.data()
    method = config.method
    images = torch.stack([_start(context, unit, start) for unit in stack.units])
    rows: list[LogRow] = []
    checkpoint = work / f"stack{stack.index:05d}.ckpt.tmp"
    if method.iterations:
        done = 0
        shares = dict(zip([voter.name for voter in voters], weights.mean(dim=1).tolist(), strict=True))

        def on_row(row: LogRow, current: Tensor) -> None:
            nonlocal done
            advance(row.iteration - done)
            done = row.iteration
            _log_row(context, stack, row, shares, current)

        module = DistillModule(
            images,
            torch.stack([torch.arange(unit.start, unit.stop) for unit in stack.units]),
            [unit_views(unit, method, data.image_size, method.seed) for unit in stack.units],
            voters,
            weights,
            method,
            pixel_bounds(data.mean, data.std),
            on_row,
        )
        context.fit(module, None, module.epochs, checkpoint)
        images, rows = module.images.detach().cpu(), module.rows
    else:
        advance(1)
    pixels = denormalise(images, data.mean, data.std, truncate=method.jpeg_round_trip)
    if method.jpeg_round_trip:
        pixels = torch.stack([jpeg_round_trip(image) for image in pixels.flatten(0, 1)]).view_as(pixels)
    for unit, unit_pixels, unit_weights in zip(stack.units, pixels, weights.T, strict=True):
        shares = dict(zip([voter.name for voter in voters], unit_weights.tolist(), strict=True))
        _save_unit(work / UNITS, unit, unit_pixels, rows, shares)
    checkpoint.unlink(missing_ok=True)


def _start(context: Context, unit: Unit, start: Tensor | None) -> Tensor:
    data = context.data()
    if start is None:
        shape = (unit.stop - unit.start, 3, data.image_size, data.image_size)
        return torch.randn(shape, generator=generator(context.config.method.seed, "noise", unit.slot, unit.block))
    return normalise(start[unit.start : unit.stop, unit.slot], data.mean, data.std)


def _log_row(context: Context, stack: Stack, row: LogRow, shares: Mapping[str, float], images: Tensor) -> None:
    """Log a stack: loss, learning rate, and by member its two terms and its weight.

    The terms are those of the page's plot: cross-entropy times ``method.ce``, and the BatchNorm distance times
    ``method.r_bn`` and the member's ``bn_scale``. The sum over members of weight times both terms is the loss where
    all units of the stack have the same weights.
    """
    config, data = context.config, context.data()
    method = config.method
    terms = {name: effective_terms(config, name, row.ce[name], row.bn[name]) for name in row.ce}
    values = {"distill/loss": row.loss, "distill/lr": row.lr, "distill/stack": float(stack.index)}
    values |= {f"distill/ce/{name}": ce for name, (ce, _) in terms.items()}
    values |= {f"distill/bn/{name}": bn for name, (_, bn) in terms.items()}
    values |= {f"distill/weight/{name}": value for name, value in shares.items()}
    step = stack.index * method.iterations + row.iteration
    context.log(values, step)
    if row.iteration % method.grid_every == 0 or row.iteration == method.iterations:
        by_member = "; ".join(
            f"{name} weight {shares[name]:.2f} CE {ce:.3g} BN {bn:.3g}" for name, (ce, bn) in terms.items()
        )
        log.info("stack %d, iteration %d: loss %.4g; %s", stack.index, row.iteration, row.loss, by_member)
        grid = image_grid(denormalise(images[0], data.mean, data.std))
        context.log_images("distill/images", grid, step)
        context.save_picture(f"stack{stack.index:05d}", grid)


def _save_unit(folder: Path, unit: Unit, pixels: Tensor, rows: Sequence[LogRow], weights: dict[str, float]) -> None:
    path = folder / f"{unit.name}.safetensors"
    temporary = path.with_name(path.name + ".tmp")
    tensors = {"images": pixels.contiguous(), "labels": torch.arange(unit.start, unit.stop)}
    history = {"weights": weights, "rows": [asdict(row) for row in rows]}
    save_file(tensors, temporary, metadata={"history": json.dumps(history)})
    temporary.replace(path)


def jpeg_round_trip(image: Tensor) -> Tensor:
    """Return what remains of an image [3, h, w] uint8 after JPEG at quality 75 with 4:2:0 chroma, as released."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG")
    return torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)


def load_images(artifact: Artifact) -> tuple[Tensor, Tensor]:
    """Read distilled images and their labels: [classes * ipc, 3, size, size] uint8 and [classes * ipc].

    The order is that of the published folders: class by class, image i of a class is that of slot i.
    """
    slots: list[Tensor] = []
    labels: list[Tensor] = []
    for path in sorted((artifact.path / UNITS).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slots.append(file.get_tensor("images"))
            labels.append(file.get_tensor("labels"))
    images, classes = torch.cat(slots), torch.cat(labels)
    order = classes.argsort(stable=True)
    return images[order], classes[order]


def load_history(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Read, by the unit's name, the weights of its members and the log rows of its stack."""
    histories = {}
    for path in sorted((artifact.path / UNITS).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            histories[path.stem] = json.loads(file.metadata()["history"])
    return histories
