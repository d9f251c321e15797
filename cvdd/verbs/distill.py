"""``distill``: synthetic images."""

from __future__ import annotations

from cvdd.chain.context import Context
from cvdd.chain.own_engines import make_distilled
from cvdd.chain.priors import find_priors
from cvdd.report.gallery import choose_images, read_images
from cvdd.report.tables import print_artifact
from cvdd.support.grids import ENLARGED, image_grid
from cvdd.support.pictures import write_png
from cvdd.verbs.made import Made

PIXELS = 2**25
"""Of a picture that shows all images; its making takes several times three bytes for each."""


def distill(context: Context, commands: list[str]) -> Made:
    """Make the images and save a picture of them, one class a row; of large sets it shows some."""
    images = make_distilled(context, find_priors(context).values)
    choice = choose_images(images, PIXELS // max(context.config.dataset.image_size, ENLARGED) ** 2)
    picture = context.config.paths.output / "images.png"
    shown = read_images(images, choice.labels, choice.slots).flatten(0, 1)
    write_png(image_grid(shown, choice.slots), picture)
    artifacts = {f"{context.config.method.name}/images": images}
    context.log_artifacts(artifacts)
    print_artifact(images, {"picture": f"{picture} ({choice.left_out})" if choice.left_out else str(picture)})
    return Made(artifacts=artifacts)
