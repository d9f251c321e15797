"""``distill``: synthetic images."""

from __future__ import annotations

from torchvision.io import write_png

from cvdd.chain.images import load_images
from cvdd.chain.own_engines import make_distilled
from cvdd.chain.priors import find_priors
from cvdd.context import Context
from cvdd.grids import image_grid
from cvdd.report.tables import print_artifact


def distill(context: Context, commands: list[str]) -> float | None:
    """Make the images and save a picture of them, one class a row."""
    images = make_distilled(context, find_priors(context).values)
    pixels, _ = load_images(images)
    picture = context.config.paths.output / "images.png"
    write_png(image_grid(pixels, context.config.ipc.images_per_class), str(picture))
    context.log_artifacts({f"{context.config.method.name}/images": images})
    print_artifact(images, {"picture": str(picture)})
    return None
