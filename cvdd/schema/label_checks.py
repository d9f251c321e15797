"""What labels and protocol must agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cvdd.schema.batch_checks import parts_problems
from cvdd.schema.label import LabelConfig
from cvdd.schema.protocol import ProtocolConfig


def label_problems(
    label: LabelConfig, protocol: ProtocolConfig, members: Sequence[str], image_size: int
) -> Iterator[str]:
    """Yield why labels and students cannot be made so, each with what to type.

    Args:
        label: the label recipe.
        protocol: of the students.
        members: names of the committee.
        image_size: side of the images in pixels.
    """
    if isinstance(label.teachers, list):
        for name in label.teachers:
            if name not in members:
                yield f"label.teachers names {name}; the members are {', '.join(members)}, or committee"
    if label.hard and protocol.loss != "cross_entropy":
        yield (
            f"protocol.loss={protocol.loss} learns from teachers, and label.teachers=none; set "
            "protocol.loss=cross_entropy, or choose teachers with label=NAME"
        )
    if not label.hard and protocol.loss == "cross_entropy":
        yield (
            "protocol.loss=cross_entropy would not use the labels of label.teachers; choose label=hard, or "
            "protocol.loss=kl or mse"
        )
    if label.rest == "nothing" and protocol.loss != "kl":
        mean = "" if label.given is not None else "label.rest=mean, or "
        yield (
            f"label.rest=nothing leaves classes without a logit, which protocol.loss={protocol.loss} needs; set {mean}"
            "protocol.loss=kl"
        )
    if protocol.student == "protocol":
        because = ", which together count more than a batch"
        yield from parts_problems(protocol.accumulation, "protocol", label.batch_size, "label", because)
    if label.shuffle > 1 and image_size % label.shuffle:
        yield f"label.shuffle={label.shuffle} needs an even dataset.image_size, not {image_size}; set label.shuffle=1"
    yield from _epoch_problems(label, protocol)


def _epoch_problems(label: LabelConfig, protocol: ProtocolConfig) -> Iterator[str]:
    given, soft, hard = label.given is not None, protocol.soft_epochs, protocol.hard_epochs
    if label.hard and protocol.hard_share:
        yield (
            f"protocol.hard_share={protocol.hard_share} is beside the labels of teachers, and label.teachers=none; set "
            "protocol.hard_share=0.0"
        )
    can_repeat = (label.store == "logits" or given) and label.keep == 1
    if protocol.repeat_labels:
        if not can_repeat:
            stored = "" if given or label.hard else "label.store=logits and label.keep=1, or "
            yield (
                "protocol.repeat_labels=true draws from stored label batches, from all of them; set "
                f"{stored}protocol.repeat_labels=false"
            )
    elif soft > label.epochs:
        beside = f" without the {hard} of protocol.hard_share" if hard else ""
        fewer = range(label.epochs, protocol.epochs)
        enough = max(epochs for epochs in fewer if protocol.soft_epochs_of(epochs) <= label.epochs)
        ways = [*([] if given else [f"label.epochs={soft}"]), f"protocol.epochs={enough}"]
        # Records of the published programs are given labels that cannot.
        again = ", or protocol.repeat_labels=true to see them more than once" if can_repeat and not given else ""
        yield (
            f"protocol.epochs={protocol.epochs}{beside} needs labels of as many epochs, and label.epochs is "
            f"{label.epochs}; set {' or '.join(ways)}{again}"
        )
    if hard and not given and not label.hard and label.keep == 1 and label.epochs > soft:
        yield (
            f"label.epochs={label.epochs} are more than students see, as protocol.hard_share={protocol.hard_share} of "
            f"protocol.epochs={protocol.epochs} need none; set label.epochs={soft}"
        )
