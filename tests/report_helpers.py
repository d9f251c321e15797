"""Made-up artefacts of the kinds that a page reads, and a reader of pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cvdd.artifact import Artifact, Store
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.chain.labels import Labels
from cvdd.chain.priors import Priors
from cvdd.composition.surroundings import FULL_DATA_ROW
from cvdd.report.page import render_page
from cvdd.schema import RunConfig

HOSTILE = "<script>alert('x')</script> & co"
CLASSES = ("zero", HOSTILE, "two")
MEMBERS = ("resnet18", "resnet50")
LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"}


@dataclass
class Maker:
    """Makes artefacts of the kinds that a page reads, without training anything."""

    config: RunConfig
    store: Store
    classes: Sequence[str] = CLASSES
    size: int = 8
    made: dict[str, Artifact] = field(default_factory=dict)

    @property
    def context(self) -> Context:
        return Context(self.config, self.store, torch.device("cpu"))

    def member(self, name: str) -> Artifact:
        metrics = {"test_top1": 91.25, "parameters": 12345, "batchnorm_layers": 9}

        def build(work: Path) -> dict[str, Any]:
            (work / "curve.json").write_text("[]")
            return metrics

        return self.store.make("members", f"made-up-{name}", {"name": name}, [], build)

    def patches(self) -> Artifact:
        def build(work: Path) -> dict[str, Any]:
            shape = (len(self.classes), 12, 3, self.size, self.size)
            save_file({"images": torch.full(shape, 200, dtype=torch.uint8)}, work / "patches.safetensors")
            return {}

        return self.store.make("patches", "made-up", {"size": self.size, "classes": list(self.classes)}, [], build)

    def images(
        self, row: str, init: str, iterations: int, ipc: int = 2, per_unit: int = 1000, factor: int = 1
    ) -> Artifact:
        members = [self.member(name) for name in MEMBERS] if iterations else []
        parents = members + ([self.patches()] if init == "patches" else [])
        method = {"init": init, "iterations": iterations} | ({"factor": factor} if factor > 1 else {})
        identity = {"classes": list(self.classes), "ipc": ipc, "method": method, "row": row}

        def build(work: Path) -> dict[str, Any]:
            (work / "units").mkdir()
            for slot in range(ipc):
                for block, first in enumerate(range(0, len(self.classes), per_unit)):
                    labels = torch.arange(first, min(first + per_unit, len(self.classes)))
                    pixels = (labels * 10 + slot).to(torch.uint8)[:, None, None, None]
                    tensors = {
                        "images": pixels.expand(-1, 3, self.size, self.size).contiguous(),
                        "labels": labels,
                    }
                    history = json.dumps(self.history(iterations))
                    name = f"slot{slot:04d}_block{block:04d}.safetensors"
                    save_file(tensors, work / "units" / name, metadata={"history": history})
            return {"images": ipc * len(self.classes), "units": ipc, "stacks": 1}

        return self.store.make("images", f"made-up-{row}", identity, parents, build)

    @staticmethod
    def history(iterations: int) -> dict[str, Any]:
        if not iterations:
            return {"weights": {}, "rows": []}
        rows = [
            {
                "iteration": iteration,
                "loss": 1.0,
                "ce": dict.fromkeys(MEMBERS, 1.0 / iteration),
                "bn": {"resnet18": 50.0, "resnet50": 150.0},
                "lr": 0.1,
            }
            for iteration in range(25, iterations + 1, 25)
        ]
        return {"weights": dict.fromkeys(MEMBERS, 0.5), "rows": rows}

    def distilled(
        self, row: str, init: str, iterations: int, *, stored: bool = True, ipc: int = 2, factor: int = 1
    ) -> Distilled:
        images = self.images(row, init, iterations, ipc, factor=factor)
        artifact = None
        if stored:

            def build(work: Path) -> dict[str, Any]:
                (work / "logits.bin").write_bytes(bytes(1234))
                return {}

            artifact = self.store.make("labels", f"made-up-{row}", {"row": row}, [images], build)
        recipe = {"epochs": 4} | ({"factor": factor} if factor > 1 else {})
        labels = Labels({"label": recipe}, [images], artifact, self.context, images, [1.0], {})
        return Distilled(self.context, row, Priors({}), images, labels)

    def result(self, made: Distilled | None, values: Sequence[float], student: str = "small") -> Result:
        row = FULL_DATA_ROW if made is None else made.row
        students = []
        for seed, value in enumerate(values):
            rows = [{"epoch": e, "train_loss": 1 / e, **({"top1": value} if e % 2 == 0 else {})} for e in range(1, 5)]

            def build(work: Path, rows: Any = rows, value: float = value) -> dict[str, Any]:
                (work / "curve.json").write_text(json.dumps(rows))
                return {"top1": value, "top5": 99.0, "loss": 0.5, "best_top1": value + 1, "best_epoch": 4}

            name = f"made-up-{row}-{student}-seed{seed}"
            students.append(self.store.make("students", name, {"of": name, "top1": value}, [], build))
        images, labels = (None, None) if made is None else (made.images, made.labels)
        return Result(row, student, "short", tuple(range(len(values))), tuple(students), images, labels)

    def summary(self, distilled: Sequence[Distilled], results: Sequence[Result]) -> dict[str, Any]:
        votes = [
            {
                "unit": f"slot{slot:04d}_block0000",
                **(dict.fromkeys(MEMBERS, 0.5) if self.config.method.iterations else {}),
            }
            for slot in range(2)
        ]
        return {
            "commands": ["python evaluate.py seed=0"],
            "code": {"cvdd": "0.1.0", "python": "3", "torch": "2", "commit": "abcdef0123456789", "changed": None},
            "dataset": {"test": {"images": 1000, "evaluate_on": "test"}},
            "classes": list(self.classes),
            "results": [result.summary() for result in results],
            "members": {
                name: {
                    "metrics": dict(self.member(name).metrics),
                    "prior": None,
                    "label_weight": 0.25,
                    "seconds": 3.0,
                    "artifact": self.member(name).path.name,
                }
                for name in MEMBERS
            },
            "votes": votes,
            "config": self.config.model_dump(mode="json"),
        }

    def page(self, distilled: Sequence[Distilled], results: Sequence[Result]) -> Page:
        return Page(render_page(self.context, self.summary(distilled, results), distilled, results))


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\n", " ")

    def handle_endtag(self, tag: str) -> None:
        self.text += "\n" if tag in ("tr", "p", "h1", "h2") else " "

    def images(self) -> list[str]:
        return [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]

    def loaded(self) -> Iterator[str]:
        for _, attributes in self.tags:
            yield from (str(value) for name, value in attributes.items() if name in LOADING)


def pair(maker: Maker, ours: Sequence[float], theirs: Sequence[float]) -> list[Result]:
    main, real = maker.distilled("cvdd", "patches", 100), maker.distilled("random_real", "real", 0)
    return [maker.result(main, ours), maker.result(real, theirs)]
