"""Labels and students of prediction matching: L1 on the logits that belong to the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact
from cvdd.backbones import BackboneConfig, build_network
from cvdd.chain.apm import load_labelled
from cvdd.chain.apm_teachers import apm_of, make_apm_teachers
from cvdd.chain.context import Context
from cvdd.chain.labels import Labels
from cvdd.chain.space import families_of, input_space, measured_in, whitening_of
from cvdd.chain.training import every, log_epochs, save_student
from cvdd.methods.apm import logit_distance
from cvdd.support.seeds import derive_seed
from cvdd.training.classifier import Positions, ShuffledBatches, smallest_batch
from cvdd.training.sgd_training import SgdModule, dsa


def apm_labels(context: Context, images: Artifact) -> Labels:
    """Say whose logits a set carries; they lie with its images, so there is no store of their own.

    Args:
        context: the configuration and its surroundings.
        images: made by :func:`cvdd.chain.apm.make_apm_images`.
    """
    known = {parent["digest"] for parent in images.manifest["parents"]}
    ((index, teacher),) = [pair for pair in enumerate(make_apm_teachers(context)) if pair[1].digest in known]
    # Two sets with logits of one teacher have the same labels, as far as a comparison goes.
    identity = {"logits_of": teacher.digest}
    return Labels(identity, [images], None, context, images, [1.0], {f"teacher{index}": teacher})


def make_apm_student(
    context: Context,
    images: Artifact,
    name: str,
    backbone: BackboneConfig,
    seed: int,
    part: Literal["test", "train"] = "test",
) -> Artifact:
    """Return one student of any architecture: its curve and its final and best accuracy.

    The settings are those of ``method.apm.student`` whatever the architecture (specification of APM, section 5); of the
    protocol only ``seeds``, ``eval_every`` and ``eval_batch`` count. Images are augmented, their logits are static.

    Args:
        context: the configuration and its surroundings.
        images: made by :func:`cvdd.chain.apm.make_apm_images`.
        name: of the student.
        backbone: its network.
        seed: of its initialisation and training.
        part: images on which it is measured; ``train`` means the real training images, which it has not seen.
    """
    config, data, training = context.config, context.data(), apm_of(context).student
    whitening = whitening_of(context)
    identity = {
        "data": data.identity,
        "student": training.model_dump(mode="json"),
        "augmentations": list(families_of(context)),
        "eval_every": config.protocol.eval_every,
        "backbone": backbone.model_dump(mode="json"),
        "seed": seed,
        "measured_on": part,
    }

    def build(work: Path) -> dict[str, Any]:
        known = load_labelled(images)
        title, own = f"student {name} seed {seed}", derive_seed(seed, "student")
        network = build_network(backbone, len(data.classes), own)
        least, field = smallest_batch(network), "method.apm.student.batch_size"
        sampler = ShuffledBatches(len(known.images), training.batch_size, own, least, field)
        loader: DataLoader[Any] = DataLoader(Positions(), sampler=sampler, batch_size=None)
        with context.progress(title, training.epochs) as advance:
            module = SgdModule(
                training,
                known.images,
                known.logits,
                nn.Identity(),
                logit_distance,
                dsa(families_of(context)),
                network=network,
                name=title,
                seed=own,
                measure=measured_in(context, input_space(context, whitening), part),
                measured_at=every(config.protocol.eval_every, training.epochs),
                on_epoch=log_epochs(context, f"evaluate/{name}/seed{seed}", advance),
                rate="method.apm.student.lr",
            )
            context.fit(module, loader, training.epochs, work / "training.ckpt.tmp")
        return save_student(work, module.curve)

    parents = [images, *([] if whitening is None else [whitening])]
    return context.store.make("students", f"{images.name}-{name}-seed{seed}", identity, parents, build)
