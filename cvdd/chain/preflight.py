"""What can be known to fail is refused before any work, not after the hours that lead up to it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cvdd.backbones import BackboneConfig, build_network
from cvdd.backbones.heads import require_head
from cvdd.chain.compare import rows_of
from cvdd.chain.context import Context
from cvdd.chain.difficulty import ranking_members, require_ranking
from cvdd.chain.encoders import require_encoders
from cvdd.chain.given import check_given
from cvdd.chain.given_labels import check_given_labels
from cvdd.chain.own_engines import own_engine
from cvdd.chain.priors import priors_needed, shares_priors
from cvdd.chain.real_choice import require_real_images
from cvdd.chain.retrieval import require_candidates_of_slots
from cvdd.chain.votes import plan_draws
from cvdd.composition.prior_overrides import prior_overrides
from cvdd.computing.automatic import records
from cvdd.labels.pool import LabelPool
from cvdd.labels.rows import check_top
from cvdd.labels.sources import check_batches
from cvdd.schema import RunConfig, members_used, teachers_of, votes_by_priors
from cvdd.schema.anchors import BEGINNINGS, RANKED
from cvdd.statistics.bn import require_batchnorm
from cvdd.statistics.features import require_features
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.patches import require_candidates
from cvdd.synthesis.units import plan_units

log = logging.getLogger(__name__)

MEMORIES = 20
"""Of AdamW: 12 until squares of gradients that were 400 times as large are as small as others, and some more."""


def check_before_work(context: Context) -> None:
    """Refuse a configuration that a later stage of its verb would refuse, cheapest checks first.

    Raises:
        ConfigError: steps to be recorded without a GPU, an unknown or unsuitable network, a member without the
            BatchNorm layers that it needs, label batches too small for their statistics, classes with too few real
            images, or given images or labels that do not fit.
    """
    config = context.config
    records(config.engine.cuda_graphs, context.device)
    rows = _rows(context)
    measuring = _measuring(rows)
    needed = {name: _needed(row.config, name in measuring) for name, row in rows.items()}
    # Before anything asks for the data, which may have to be decoded.
    for name, row in rows.items():
        with _said_of(name):
            for member in needed[name]:
                _check_side(f"committee.members.{member}", row.config.committee.members[member].backbone, row.config)
    for name, backbone in config.students.items() if config.verb == "evaluate" else ():
        _check_side(f"students.{name}", backbone, config)
    labels = config.verb in ("relabel", "evaluate")
    for name, row in rows.items() if labels else ():
        with _said_of(name):
            check_batches(_images(row), row.config.label)
            check_top(row.config.label.top, _classes(row), row.config.label.rest)
    if config.verb == "evaluate":
        _warn_of_hard_epochs(rows)
    for name, row in measuring.items():
        with _said_of(name):
            check_batches(_images(row), row.config.label, measures_prior=True)
    networks = _Networks()
    members = {name: _members(name, row, needed[name], networks) for name, row in rows.items()}
    if config.verb == "evaluate":
        for name, backbone in config.students.items():
            network = networks.get(f"students.{name}", backbone, context)
            for row_name, row in rows.items():
                with _said_of(row_name):
                    _check_last_batch(row, name, network)
    for name, row in rows.items():
        if row.config.recipe.moco is not None:
            with _said_of(name):
                require_encoders(row, members[name])
    if config.verb == "train":
        return
    for name, row in rows.items():
        with _said_of(name):
            normalising = [*_matched(row.config, _classes(row)), *(_replaced(row.config) if labels else ())]
            normalising += _measured(measuring[name].config) if name in measuring else []
            for member in dict.fromkeys(normalising):
                require_batchnorm(members[name][member], member)
            if (anchors := row.config.method.anchored) is not None:
                for member in _voting(row.config, _classes(row)):
                    network, side = members[name][member], row.config.dataset.image_size
                    require_features(network, anchors.layer, member, side)
            if row.config.method.retrieves is not None:
                require_head(members[name][row.config.patches.observer], "method.retrieval")
            if row.config.method.ranks:
                require_ranking({member: members[name][member] for member in ranking_members(row.config)})
    for name, row in rows.items():
        with _said_of(name):
            _check_real_images(row, "ipc.images_per_class")
            if row.config.method.retrieves is not None:
                require_candidates_of_slots(row)
            own = own_engine(row.config.method)
            if own and own.check:
                own.check(row)
            if row.config.method.given is not None:
                check_given(row)
            if labels and row.config.label.given is not None:
                check_given_labels(row)
    for name, row in measuring.items():
        with _said_of(name):
            _check_real_images(row, "prior.images_per_class")


def _rows(context: Context) -> dict[str, Context]:
    """What the verb makes, by what messages call it: the configuration's own row has no name."""
    if context.config.verb != "evaluate":
        return {"": context}
    (_, own), *others = rows_of(context)
    return {"": own} | {f"compare.{name}": row for name, row in others}


@contextlib.contextmanager
def _said_of(row: str) -> Iterator[None]:
    """Name the row of a comparison that an error inside is about."""
    try:
        yield
    except ConfigError as error:
        if not row:
            raise
        raise ConfigError(f"{row}: {error}") from error


def _warn_of_hard_epochs(rows: Mapping[str, Context]) -> None:
    """Say, of rows that are alike once, where students hardly learn after hard epochs."""
    said: dict[str, str] = {}
    for name, row in rows.items():
        if text := _standstill(row):
            said.setdefault(text, f"{name}: " if name else "")
    for text, where in said.items():
        log.warning("%s%s", where, text)


def _standstill(row: Context) -> str | None:
    """Why students of a row hardly learn after hard epochs, if so.

    AdamW divides by the size of the last 1 / (1 - beta2) steps' gradients, and without T^2 those of a divergence are
    some T^2 times smaller than those of classes.
    """
    protocol = row.config.protocol
    if not protocol.hard_epochs or protocol.optimizer != "adamw" or protocol.loss != "kl":
        return None
    batches = LabelPool.of(row.config.label, _images(row)).batches
    steps = batches * (protocol.soft_epochs - protocol.soft_epochs // 2)
    remembered = round(1 / (1 - protocol.betas[1]))
    if protocol.temperature_squared or steps >= MEMORIES * remembered:
        return None
    return (
        f"AdamW remembers the gradients of {remembered} steps, and those of hard epochs are far larger than those of "
        f"soft labels: in the {steps} steps after them students hardly learn. Type protocol.temperature_squared=true"
    )


def _measuring(rows: Mapping[str, Context]) -> dict[str, Context]:
    """What measures priors, by row: once for all members of a row, who do not differ in what counts.

    Rows that share the priors of the first measure none.
    """
    own = rows[""].config
    measuring = {}
    for name, row in rows.items():
        config = row.config
        shared = name and shares_priors(own, config)
        if config.verb != "train" and config.prior.source == "measured" and not shared and priors_needed(config):
            measuring[name] = row.differing(prior_overrides(config, config.prior.observer), "")
    return measuring


def _needed(config: RunConfig, measures: bool) -> list[str]:
    """Names of the members that the verb may train.

    Args:
        config: of a row.
        measures: whether it measures priors.
    """
    if config.verb == "train":
        return list(config.committee.members) if own_engine(config.method) is None else []
    everyone = measures or config.method.init == "herding"
    return list(config.committee.members) if everyone else members_used(config)


def _check_side(where: str, backbone: BackboneConfig, config: RunConfig) -> None:
    """Refuse a network that is not made for such small images; ``where`` is the field that names it."""
    side = config.dataset.image_size
    if side < backbone.min_size:
        raise ConfigError(
            f"{where}: {backbone.name} is made for images of at least {backbone.min_size} pixels, and "
            f"dataset.image_size={side}. Choose another backbone, or set its min_size if it works all the same"
        )


def _classes(context: Context) -> int:
    dataset = context.config.dataset
    return dataset.num_classes or len(dataset.classes) or len(context.data().classes)


def _images(context: Context) -> int:
    """Count the images of the distilled set."""
    config = context.config
    return len(context.data().train) if config.method.init == "all" else config.ipc.images_per_class * _classes(context)


class _Networks:
    """Networks without their pretrained weights that took an image of their data set, each built once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], nn.Module] = {}

    def get(self, where: str, backbone: BackboneConfig, context: Context) -> nn.Module:
        """Return a network.

        Args:
            where: the field that names it, for messages.
            backbone: its configuration.
            context: with its data set.

        Raises:
            ConfigError: it cannot be built, or takes no such images.
        """
        classes, side = _classes(context), context.config.dataset.image_size
        key = (backbone.model_dump_json(), classes, side)
        if key not in self._known:
            self._known[key] = _try(where, backbone, classes, side)
        return self._known[key]


def _members(row: str, context: Context, needed: Sequence[str], networks: _Networks) -> dict[str, nn.Module]:
    members = context.config.committee.members
    with _said_of(row):
        return {name: networks.get(f"committee.members.{name}", members[name].backbone, context) for name in needed}


def _try(where: str, backbone: BackboneConfig, classes: int, side: int) -> nn.Module:
    """Build a network without its pretrained weights and show it an image."""
    try:
        network = build_network(backbone.model_copy(update={"pretrained": False}), classes, 0).eval()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        with torch.inference_mode():
            logits = network(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: {backbone.name} takes no images of {side} pixels: {first}") from error
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != [1, classes]:
        raise ConfigError(
            f"{where}: {backbone.name} returns {found} for an image of {classes} classes, not logits [1, {classes}]; "
            "its builder is given num_classes"
        )
    return network


def _check_last_batch(row: Context, student: str, network: nn.Module) -> None:
    """Refuse a batch of one image for a student whose BatchNorm has no second value to compare it with."""
    label, side, count = row.config.label, row.config.dataset.image_size, _images(row)
    alone = label.batch_size == 1 or count % label.batch_size == 1
    if row.config.protocol.student != "protocol" or not alone:
        return
    try:
        with torch.inference_mode():
            copy.deepcopy(network).train()(torch.zeros(1, 3, side, side))
    except ValueError as error:
        raise ConfigError(
            f"label.batch_size={label.batch_size} leaves a batch of a single one of {count} images, which "
            f"students.{student} cannot normalise while it learns; set another label.batch_size"
        ) from error


def _voting(config: RunConfig, classes: int) -> list[str]:
    """Names of the members that vote, as far as they are known."""
    method, members = config.method, config.committee.members
    unknown = method.voters == "drawn" and config.committee.draw == "best" and not config.prior.values
    if not method.recovers or unknown:
        return []
    units = plan_units(config.ipc.images_per_class, classes, method)
    values = config.prior.values if votes_by_priors(config) else {}
    voting = {index for draw in plan_draws(config, units, values) for index in draw}
    return [name for index, name in enumerate(members) if index in voting]


def _matched(config: RunConfig, classes: int) -> list[str]:
    """Names of the members whose statistics the images are matched to, as far as they are known."""
    if not config.method.r_bn or config.method.statistics.layers != "bn":
        return []
    return [name for name in _voting(config, classes) if config.committee.members[name].bn_scale]


def _replaced(config: RunConfig) -> list[str]:
    """Names of the teachers that label with the statistics of the batch."""
    members = config.committee.members
    return [name for name in teachers_of(config) if config.label.bn_mode == "batch" and members[name].bn_scale]


def _measured(config: RunConfig) -> list[str]:
    """Names of the members whose statistics the measurement of the priors needs."""
    members, prior = config.committee.members, config.prior
    alone = [name for name in members if members[name].bn_scale and config.method.r_bn]
    labels = config.label.bn_mode == "batch" and members[prior.observer].bn_scale
    return [*alone, *([prior.observer] if labels else [])]


def _check_real_images(context: Context, field: str) -> None:
    """Refuse classes with fewer real images than the field asks for."""
    config, data, patches = context.config, context.data(), context.config.patches
    ipc = config.ipc.images_per_class
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    per_class = config.dataset.train_per_class
    init = config.method.init
    factor = config.method.factor if init in BEGINNINGS else 1
    for name, count in zip(data.classes, counts, strict=True):
        try:
            if init == "real" or config.method.ranks:
                require_real_images(name, count, ipc, field=field, factor=factor)
            if init in ("herding", *RANKED):
                require_real_images(name, count, ipc, patches.candidates, field, factor)
            elif init == "patches":
                require_candidates(name, count, patches, field)
        except ConfigError as error:
            # More candidates than there are images are of no use.
            enough = patches.candidates if init in ("patches", "herding", *RANKED) else ipc * factor**2
            if count != per_class or count >= enough:
                raise
            raise ConfigError(f"{error}. Or raise dataset.train_per_class={per_class}, which leaves no more") from error
