"""Published models: what they reach, where their weights are, how to convert them.

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


@dataclass(frozen=True, kw_only=True)
class PublishedTowers:
    """A contrastive model that a detector can start from, or be taught by."""

    name: str
    image_size: int  # of contrastive training; a multiple of the patch size
    parameters: int  # millions, both towers
    tokenizer: str  # what its folder must hold
    source: str  # name on the Hugging Face hub, or the file's name
    from_format: str

    @property
    def command(self) -> str:
        return f"owl-det convert {self.source} models/{self.name} --from {self.from_format}"


def _clip(name: str, parameters: int, hub: str, image_size: int = 224) -> PublishedTowers:
    return PublishedTowers(
        name=name,
        image_size=image_size,
        parameters=parameters,
        tokenizer="built in",
        source=f"openai/{hub}",
        from_format="clip",
    )


def _siglip(name: str, parameters: int, image_size: int = 0) -> PublishedTowers:
    """`image_size` where it is not the last part of the name."""
    return PublishedTowers(
        name=name,
        image_size=image_size or int(name.rsplit("-", 1)[1]),
        parameters=parameters,
        tokenizer="tokenizer.json" if name.startswith("siglip2") else "spiece.model",
        source=f"google/{name}",
        from_format="siglip",
    )


TOWERS = (
    _clip("clip-b32", 151, "clip-vit-base-patch32"),
    _clip("clip-b16", 150, "clip-vit-base-patch16"),
    _clip("clip-l14", 428, "clip-vit-large-patch14"),
    _clip("clip-l14-336", 428, "clip-vit-large-patch14-336", 336),
    _siglip("siglip-base-patch16-224", 203),
    _siglip("siglip-base-patch16-256", 203),
    _siglip("siglip-base-patch16-384", 203),
    _siglip("siglip-base-patch16-512", 204),
    _siglip("siglip-large-patch16-256", 652),
    _siglip("siglip-large-patch16-384", 652),
    _siglip("siglip-so400m-patch14-224", 877),
    # 27 patches a side: the published model ignores the last six of its 384 pixels.
    _siglip("siglip-so400m-patch14-384", 878, 378),
    _siglip("siglip2-base-patch32-256", 377),
    _siglip("siglip2-base-patch16-224", 375),
    _siglip("siglip2-base-patch16-256", 375),
    _siglip("siglip2-base-patch16-384", 375),
    _siglip("siglip2-base-patch16-512", 376),
    _siglip("siglip2-large-patch16-256", 882),
    _siglip("siglip2-large-patch16-384", 882),
    _siglip("siglip2-large-patch16-512", 882),
    _siglip("siglip2-so400m-patch14-224", 1135),
    _siglip("siglip2-so400m-patch14-384", 1136, 378),
    _siglip("siglip2-so400m-patch16-256", 1136),
    _siglip("siglip2-so400m-patch16-384", 1136),
    _siglip("siglip2-so400m-patch16-512", 1137),
    _siglip("siglip2-giant-opt-patch16-256", 1871),
    _siglip("siglip2-giant-opt-patch16-384", 1872),
)


def table_lines() -> list[str]:
    """The table of detectors for people, what its columns mean, and the table of towers."""
    rows = [("name", "pixels", "paper AP/APr", "readme AP/APr", "convert with")]
    rows += [
        (m.name, str(m.image_size), _pair(m.paper), _pair(m.readme), m.command) for m in MODELS
    ]
    towers = [("name", "pixels", "million", "tokeniser", "convert with")]
    towers += [
        (t.name, str(t.image_size), str(t.parameters), t.tokenizer, t.command) for t in TOWERS
    ]
    return [
        *_aligned(rows),
        "",
        "LVIS v1.0 val, all and rare classes; as published, not measured with this code.",
        "The authors' own files (links in the README of google-research/scenic, projects/owl_vit)",
        "convert with: owl-det convert FILE models/NAME --from scenic",
        "",
        "Towers, which training starts from (config.checkpoint.init_from):",
        *_aligned(towers),
        "",
        "CLIP's ResNet-50, a teacher: OpenAI's tensors, saved as safetensors, convert with",
        "owl-det convert FILE models/clip-rn50 --from clip_resnet",
        "LiT and SigLIP of big_vision (text_transformer; spiece.model beside the file):",
        "owl-det convert FILE.npz models/NAME --from lit",
    ]


def json_lines() -> Iterator[str]:
    """One JSON object a model; `kind` is "detector" or "towers"."""
    for kind, models in (("detector", MODELS), ("towers", TOWERS)):
        for model in models:
            fields = {"kind": kind, **dataclasses.asdict(model), "command": model.command}
            yield json.dumps(fields)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _pair(figures: tuple[float, float] | None) -> str:
    return "–" if figures is None else f"{figures[0]:.1f} / {figures[1]:.1f}"
