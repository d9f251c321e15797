"""The LightningModule that trains a committee member without labels: MoCo v2 (arXiv 2003.04297), as SC-DD does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cvdd.augmentation.augment import Views, apply_views, draw_views
from cvdd.augmentation.colours import Colours, apply_colours, draw_colours
from cvdd.backbones.heads import require_head
from cvdd.computing.passes import Passes
from cvdd.running.distributed import gather_parts
from cvdd.schema.moco import MocoConfig
from cvdd.support.batch_parts import parts_of
from cvdd.support.curves import cosine
from cvdd.support.seeds import derive_seed, generator, own_draws, seed_networks
from cvdd.training.real_images import RealImagesModule


class MocoModule(RealImagesModule):
    """Trains a network to find, among many representations, that of another view of the same image.

    The network's last linear layer is replaced by a projection of two layers (:func:`with_projection`). A second
    network, whose parameters follow those of the first slowly, makes the representations that are searched: that of
    the image's other view, and those of images of earlier batches, which wait in a queue.

    A batch comes in groups, each with BatchNorm statistics of its own; the second network sees the images in other
    groups than the first, or else statistics would tell which views belong together. Running statistics move by each
    group in turn, and by all of them together as far as by one batch. Groups are the parts that ranks can share.

    Args:
        config: of the training.
        flip: whether views are flipped at random.
        pixels: [n, 3, size, size] uint8 training images, or None if batches bring their own.
        mean: of the normalisation.
        std: of the normalisation.
        size: side of the network's input.
        passes: how the network computes.
        shared: arguments of :class:`cvdd.training.classifier.Classifier`; the network is one :func:`with_projection`.
    """

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        config: MocoConfig,
        flip: bool,
        pixels: Tensor | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        passes: Passes | None = None,
        **shared: object,
    ) -> None:
        super().__init__(pixels, mean, std, size, passes, **shared)
        self.config, self.flip = config, flip
        self.part = config.batch_size // config.groups
        waiting = torch.randn(config.dimension, config.queue, generator=generator(self.seed, "queue"))
        self.register_buffer("queue", nn.functional.normalize(waiting, dim=0))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        for layer in self.network.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
                # What matters of an encoder besides its weights: a few hundred images would be too few to remember.
                layer.momentum /= config.groups
        self._compiled_keys = self._passes.compiled(self.key_network)

    def on_fit_start(self) -> None:
        """Bring the images to the device, and the networks into the form in which they compute there."""
        super().on_fit_start()
        self._passes.prepare(self.key_network, self.device)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy of finding the other view; a batch is indices of images in memory, or (pixels, labels)."""
        pixels = self._pixels_of(batch)
        source = generator(self.seed, "views", self.current_epoch, batch_index)
        count, _, height, width = pixels.shape
        seen, held = (draw_view(self.config, self.flip, count, height, width, source) for _ in range(2))
        order = torch.randperm(count, generator=source)
        parts = parts_of(count, self.part)
        keys = self._keys(pixels, held, order, parts, batch_index)

        def loss(part: slice) -> Tensor:
            views = self.shown(apply_view(pixels[part], self.size, seen.of(part)))
            found = self._represented(self._compiled or self.network, views)
            right = (found * keys[part]).sum(dim=1, keepdim=True)
            similar = torch.cat([right, found @ self.queue], dim=1) / self.config.temperature
            first = torch.zeros(len(similar), dtype=torch.int64, device=similar.device)
            return nn.functional.cross_entropy(similar, first) * len(similar) / count

        total = self.loss_in_parts([partial(loss, part) for part in parts], batch_index)
        self._enqueue(keys)
        return self._note(total)

    def _pixels_of(self, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(batch, Tensor):
            assert self._pixels is not None
            return self._pixels[batch]
        return batch[0]

    @torch.no_grad()
    def _keys(self, pixels: Tensor, held: ViewDraws, order: Tensor, parts: list[slice], batch_index: int) -> Tensor:
        """Representations of the second network, [n, dimension], whose groups are those of a drawn order."""
        follow(self.key_network, self.network, self.config.key_momentum)
        forward, own = self._compiled_keys or self.key_network, []
        for index in self.own_parts(len(parts)):
            # Dropout draws for each part alike, whichever rank has it.
            seed_networks(derive_seed(self.seed, "keys", self.current_epoch, batch_index, index), self.device)
            rows = order[parts[index]]
            views = apply_view(pixels[rows.to(pixels.device, non_blocking=True)], self.size, held.of(rows))
            own.append(self._represented(forward, self.shown(views)))
        if self._ranks[1] > 1:
            found = gather_parts([keys.flatten() for keys in own], len(parts))
            own = [keys.view(-1, self.config.dimension) for keys in found]
        return torch.cat(own)[order.argsort().to(pixels.device, non_blocking=True)]

    def _represented(self, forward: Callable[..., Tensor], shown: Tensor) -> Tensor:
        with self._passes.around(shown.device):
            found: Tensor = forward(shown)
        return nn.functional.normalize(found.float(), dim=1)

    def _enqueue(self, keys: Tensor) -> None:
        where = (self.place + torch.arange(len(keys), device=self.place.device)) % self.config.queue
        self.queue[:, where] = keys.T
        self.place.add_(len(keys)).remainder_(self.config.queue)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD whose rate falls in a cosine, epoch by epoch."""
        config = self.config
        optimizer = torch.optim.SGD(
            self.network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, total=config.epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


@torch.no_grad()
def follow(behind: nn.Module, ahead: nn.Module, momentum: float) -> None:
    """Move the parameters of one network towards those of another, which get ``1 - momentum`` of the weight."""
    torch._foreach_lerp_(list(behind.parameters()), list(ahead.parameters()), 1 - momentum)


def with_projection(network: nn.Module, seed: int) -> str:
    """Put a layer as wide as its input before a network's last linear layer, in place; return that layer's name.

    The network's last layer has as many outputs as a representation has numbers.

    Args:
        network: as it was built.
        seed: of the new layer's initial weights.

    Raises:
        ConfigError: it has no linear layer.
    """
    name, head = require_head(network, "recipe.moco")
    with own_draws(seed, torch.device("cpu")):
        hidden = nn.Linear(head.in_features, head.in_features)
    network.set_submodule(name, nn.Sequential(hidden, nn.ReLU(), head))
    return name


def only_probed(network: nn.Module) -> nn.Linear:
    """Leave only a network's last linear layer to be trained, in place, and return it.

    BatchNorm and dropout are as in evaluation from here on: what was learnt without labels stays as it is.

    Raises:
        ConfigError: it has no linear layer.
    """
    _, head = require_head(network, "recipe.moco")
    network.eval().requires_grad_(False)
    head.requires_grad_(True)
    return head


class ViewDraws(NamedTuple):
    """How each image of a batch is seen.

    Attributes:
        boxes: [n, 4] of the crops: top, left, height, width in pixels.
        flips: [n] bool.
        colours: of each image.
    """

    boxes: Tensor
    flips: Tensor
    colours: Colours

    def of(self, part: slice | Tensor) -> ViewDraws:
        """Those of some of the images."""
        return ViewDraws(self.boxes[part], self.flips[part], Colours(*(values[part] for values in self.colours)))


def draw_view(
    config: MocoConfig, flip: bool, count: int, height: int, width: int, source: torch.Generator
) -> ViewDraws:
    """Draw a view of each image.

    Args:
        config: ranges and shares.
        flip: whether to flip at random.
        count: images.
        height: of the images in pixels.
        width: of the images in pixels.
        source: of the draws.
    """
    views = draw_views(count, height, width, config.crop_scale, flip, 0, source)
    colours = draw_colours(count, config.changes, config.changed, config.grey, config.blurred, source)
    return ViewDraws(views.boxes, views.flips, colours)


def apply_view(pixels: Tensor, size: int, drawn: ViewDraws) -> Tensor:
    """Show images as it was drawn.

    Args:
        pixels: [n, 3, h, w] uint8.
        size: side of a view.
        drawn: for the n images, on the CPU.

    Returns:
        [n, 3, size, size] float 0..255.
    """
    boxes, flips = (values.to(pixels.device, non_blocking=True) for values in (drawn.boxes, drawn.flips))
    shifts = torch.zeros(len(pixels), 2, dtype=torch.long, device=pixels.device)
    return apply_colours(apply_views(pixels.float(), Views(boxes, flips, shifts), size), drawn.colours)
