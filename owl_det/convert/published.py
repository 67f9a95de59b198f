"""Published detectors: what they reach, where their weights are, how to convert them.

Average precision on LVIS v1.0 val, over all and over rare classes: `paper` is what the papers
report (arXiv 2205.06230, 2306.09683), `readme` what the authors' code does with the weights that
they published. None of it was measured with this code.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One line of the table; figures are (AP, AP of rare classes), None where none is given."""

    name: str
    image_size: int
    paper: tuple[float, float] | None
    readme: tuple[float, float] | None
    hub: str  # name on the Hugging Face hub

    @property
    def command(self) -> str:
        return f"owl-det convert {self.hub} models/{self.name} --from hf"


def _model(
    name: str,
    image_size: int,
    hub: str,
    paper: tuple[float, float] | None,
    readme: tuple[float, float] | None,
) -> PublishedModel:
    return PublishedModel(
        name=name, image_size=image_size, hub=f"google/{hub}", paper=paper, readme=readme
    )


MODELS = (
    _model("owlvit-b32", 768, "owlvit-base-patch32", (22.1, 18.9), (19.3, 16.9)),
    _model("owlvit-b16", 768, "owlvit-base-patch16", (27.2, 20.6), (20.8, 17.1)),
    _model("owlvit-l14", 840, "owlvit-large-patch14", (34.6, 31.2), (34.6, 31.2)),
    _model("owlv2-b16-st", 960, "owlv2-base-patch16", (27.0, 29.6), (26.5, 29.5)),
    _model("owlv2-b16-st-ft", 960, "owlv2-base-patch16-finetuned", (41.8, 36.2), (41.4, 36.2)),
    _model("owlv2-b16-ensemble", 960, "owlv2-base-patch16-ensemble", None, (43.9, 40.5)),
    _model("owlv2-l14-st", 1008, "owlv2-large-patch14", (33.5, 34.9), (32.8, 34.6)),
    _model("owlv2-l14-st-ft", 1008, "owlv2-large-patch14-finetuned", (49.4, 44.6), (48.8, 44.0)),
    _model("owlv2-l14-ensemble", 1008, "owlv2-large-patch14-ensemble", None, (44.6, 42.6)),
)


def table_lines() -> list[str]:
    """The table for people, then what the columns mean."""
    rows = [("name", "pixels", "paper AP/APr", "readme AP/APr", "convert with")]
    rows += [
        (m.name, str(m.image_size), _pair(m.paper), _pair(m.readme), m.command) for m in MODELS
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [
        *lines,
        "",
        "LVIS v1.0 val, all and rare classes; as published, not measured with this code.",
        "The authors' own files (links in the README of google-research/scenic, projects/owl_vit)",
        "convert with: owl-det convert FILE models/NAME --from scenic",
    ]


def json_lines() -> Iterator[str]:
    """One JSON object a model."""
    for model in MODELS:
        yield json.dumps({**dataclasses.asdict(model), "command": model.command})


def _pair(figures: tuple[float, float] | None) -> str:
    return "–" if figures is None else f"{figures[0]:.1f} / {figures[1]:.1f}"
