"""What `owl-det evaluate` does: opens the data sets of a benchmark, measures a checkpoint on them.

A benchmark is one data set, or a folder of many (ODinW) whose mean AP counts.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax

from data_pipelines.open_source import open_source
from data_pipelines.source import Source
from owl_det import config as config_lib
from owl_det import files, sharding
from owl_det.config import EvaluationConfig, MeshConfig, Protocol
from owl_det.errors import DataError, UserError, in_flags
from owl_det.evaluation import by_category, data_check
from owl_det.evaluation.evaluate import DetectionEvaluator, DetectionMeasurement, pairs_kept
from owl_det.evaluation.evaluator import summary
from owl_det.inference import ranking
from owl_det.modeling.build import detector_of
from owl_det.types import LoadedModel

KINDS = ("coco", "lvis", "ov_coco", "odinw", "voc", "yolo", "shapes_world")
SPLITS = {"valid": ("valid", "val", "mini_val"), "test": ("test",)}  # names of ODinW's folders
# The first is ODinW's; it lacks the unused first category of the second, Roboflow's.
_ANNOTATIONS = ("annotations_without_background.json", "_annotations.coco.json")
_MEANS = ("AP", "AP50", "AP75")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkLocation:
    """Where a data set lies; what a kind does not need is empty."""

    kind: str  # of KINDS
    # JSON file; folder of XML (voc) or txt files (yolo); yolo: data.yaml, or the folder it lies in
    annotations: str = ""
    images: str = ""  # folder; of odinw: the folder of data sets; yolo: may be left out
    split_list: str = ""  # voc: text file of stems
    split: str = ""  # odinw: valid (the default) or test; yolo: also train


def settings(
    kind: str,
    *,
    protocol: Protocol | None = None,
    top_k: int = 0,
    batch_size: int = 8,
    max_images: int = 0,
    num_pictures: int = 0,
) -> EvaluationConfig:
    """How a benchmark is measured. By default LVIS has its own protocol, the others COCO's.

    Raises `UserError` on numbers that are out of range.
    """
    for name, value, least in (
        ("top_k", top_k, 0),
        ("batch_size", batch_size, 1),
        ("max_images", max_images, 0),
    ):
        if value < least:
            raise UserError(f"--{name}: must be at least {least}, got {value}")
    chosen: Protocol = protocol or ("lvis" if kind == "lvis" else "coco")
    return EvaluationConfig(
        protocol=chosen,
        top_k=top_k,
        batch_size=batch_size,
        max_images=max_images,
        num_pictures=num_pictures,
    )


@in_flags()
def open_sources(location: BenchmarkLocation) -> dict[str, Source]:
    """The data sets of a benchmark by name.

    Raises `UserError` naming the flag that is missing or does not apply, and `DataError` where
    files are missing, malformed or empty.
    """
    _check(location)
    if location.kind != "odinw":
        source = open_source(_entry(location), "")
        _require_federated(location, source)
        return {location.kind: source}
    folders = _odinw_folders(Path(location.images), "test" if location.split == "test" else "valid")
    return {
        name: open_source(config_lib.CocoSource(annotations=str(file), images=str(file.parent)), "")
        for name, file in folders.items()
    }


@in_flags()
def run(
    model: LoadedModel,
    sources: Mapping[str, Source],
    settings: EvaluationConfig,
    *,
    prompts: str = "",
    results: str | os.PathLike[str] | None = None,
    pictures: str | os.PathLike[str] | None = None,
    functions: ranking.DetectorFunctions | None = None,
) -> dict[str, Any]:
    """Measures a model on every data set; the summary is like that of training, and by category.

    `prompts` "" takes those of the checkpoint. `results` is a file for the detections in COCO's
    results format, `pictures` a folder for the pictures that a training draws; `functions` are
    those of an export. With several data sets the metrics at the top are means over them. Raises
    `DataError` if a data set has no usable box, or more than 1 % of its images cannot be read.
    """
    if results is not None and len(sources) > 1:
        raise UserError("--results: is one file; evaluate the data sets one by one")
    for source in sources.values():
        data_check.require_boxes(source)
    # An export is a program for one device.
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1] if functions else None)
    detector = detector_of(model.config, model.preprocess)
    params = jax.device_put(model.params, sharding.replicated(mesh))
    prompts = prompts or model.eval_prompts
    summaries = {}
    for name, source in sources.items():
        started = time.time()
        evaluator = DetectionEvaluator(
            detector,
            source,
            mesh,
            name,
            settings=settings,
            eval_prompts=prompts,
            tokenizer_file=model.tokenizer,
            functions=functions,
        )
        result = evaluator(params)
        by_name = by_category.content(result.metrics)
        if results is not None:
            result.evaluator.write_results(results)
        measured = summary(evaluator, result, model.step, time.time() - started)
        summaries[name] = {**measured, **by_name}
        if pictures is not None:
            _draw(Path(pictures), name, result)
    return {
        **_overall(list(summaries.values())),
        "protocol": settings.protocol,
        "prompts": prompts,
        "top_k": pairs_kept(settings),
        "max_images": settings.max_images,
        "datasets": summaries,
    }


def _draw(folder: Path, name: str, result: DetectionMeasurement) -> None:
    from owl_det.evaluation import pictures

    pictures.write(folder, name, result.pictures, result.evaluator, result.metrics)


def write_summary(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes JSON; the file appears once it is complete."""
    files.write_atomic(path, json.dumps(content, indent=2) + "\n")


def table(content: Mapping[str, Any]) -> str:
    """The summary as text, metrics in percent: a line a metric and category, or a data set."""
    sets: Mapping[str, Mapping[str, Any]] = content["datasets"]
    if len(sets) == 1:
        ((name, values),) = sets.items()
        scalars = [key for key in values if key.startswith("AP") and "_by_" not in key]
        rows = [(key, f"{100 * values[key]:.2f}") for key in scalars]
        rows += [
            (key, str(values[key]))
            for key in ("num_images", "num_instances", "unreadable_images", "seconds")
        ]
        totals = columns([(name, f"% ({content['protocol']})"), *rows])
        return f"{totals}\n\n{columns(by_category.rows(values))}"
    header = ("data set", *_MEANS, "images", "unreadable")
    rows = [
        (name, *_percent(values), str(values["num_images"]), str(values["unreadable_images"]))
        for name, values in sets.items()
    ]
    return columns([header, *rows, (f"mean of {len(sets)}", *_percent(content), "", "")])


def _percent(values: Mapping[str, Any]) -> list[str]:
    return [f"{100 * values[key]:.2f}" for key in _MEANS]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _overall(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(summaries) == 1:
        return dict(summaries[0])
    means = {key: sum(s[key] for s in summaries) / len(summaries) for key in _MEANS}
    totals = {
        key: sum(s[key] for s in summaries)
        for key in ("num_images", "num_instances", "unreadable_images")
    }
    return {
        "step": summaries[0]["step"],
        "num_datasets": len(summaries),
        **{key: round(value, 6) for key, value in means.items()},
        **totals,
        "seconds": round(sum(s["seconds"] for s in summaries), 1),
    }


def _check(location: BenchmarkLocation) -> None:
    needs = {
        "odinw": ("images",),
        "shapes_world": (),
        "yolo": ("annotations",),
    }.get(location.kind, ("annotations", "images"))
    for name in ("annotations", "images"):
        if name in needs and not getattr(location, name):
            raise UserError(f"--{name}: --dataset {location.kind} needs it")
        if name not in needs and getattr(location, name) and location.kind != "yolo":
            raise UserError(f"--{name}: --dataset {location.kind} has none; leave it out")
    if location.split_list and location.kind != "voc":
        raise UserError(f"--split_list: is for --dataset voc, not {location.kind}")
    if location.split and location.kind not in ("odinw", "yolo"):
        raise UserError(f"--split: is for --dataset odinw and yolo, not {location.kind}")
    if location.split == "train" and location.kind == "odinw":
        raise UserError("--split: --dataset odinw has valid and test, not train")
    if location.kind == "yolo":
        _check_yolo(location)


def _require_federated(location: BenchmarkLocation, source: Source) -> None:
    """Names that an image of LVIS lacks may still be in it; other files say nothing of that."""
    counts = data_check.counts_of(source)
    if location.kind == "lvis" and counts is not None and not counts.is_federated:
        raise DataError(
            f"{location.annotations}: is no file of LVIS: no image says which names are absent "
            "(neg_category_ids); take LVIS's own file or, if every image is fully annotated, "
            "--dataset coco"
        )


def _check_yolo(location: BenchmarkLocation) -> None:
    """A file tells all folders; a folder of labels needs one of images."""
    if os.path.isfile(location.annotations) and location.images:
        raise UserError(
            f"--images: {location.annotations} says where the images are; leave it out, or give a "
            "folder of txt files to --annotations"
        )
    if not location.images and not os.path.exists(location.annotations):
        raise UserError(f"--annotations: {location.annotations}: no such file or folder")


def _entry(location: BenchmarkLocation) -> config_lib.SourceConfig:
    annotations, images = location.annotations, location.images
    if location.kind == "shapes_world":
        return config_lib.ShapesWorldSource(split="test", num_images=1024)
    if location.kind == "voc":
        return config_lib.VocSource(
            annotations=annotations, images=images, split_list=_split_list(location)
        )
    if location.kind == "yolo":
        return _yolo_entry(location)
    subset = "ov_coco" if location.kind == "ov_coco" else "all"
    return config_lib.CocoSource(annotations=annotations, images=images, subset=subset)


def _split_list(location: BenchmarkLocation) -> str:
    """The file of `--split_list`: a path, or the name of a list of the data set, such as `val`."""
    given = location.split_list
    root = Path(location.annotations).parent
    places = [Path(given), root / given, root / "ImageSets/Main" / given]
    found = (place for place in (*places, places[2].with_name(f"{places[2].name}.txt")))
    file = next((place for place in found if os.path.isfile(place)), None)
    if given and file is None:
        raise UserError(f"--split_list: {given}: no such file, nor is there {places[2]}.txt")
    return str(file) if given else ""


def _yolo_entry(location: BenchmarkLocation) -> config_lib.YoloSource:
    split = cast(Any, location.split)
    if not location.images:
        return config_lib.YoloSource(path=os.path.abspath(location.annotations), split=split)
    # Class names are in data.yaml or classes.txt of the folder that holds both.
    folders = [os.path.abspath(location.annotations), os.path.abspath(location.images)]
    return config_lib.YoloSource(
        path=os.path.commonpath(folders), labels=folders[0], images=folders[1], split=split
    )


def _odinw_folders(root: Path, split: str) -> dict[str, Path]:
    """Name of each data set → its annotation file, which lies among its images.

    A data set may be some folders deep; it is named by its path below the root.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --images is the folder of data sets")
    found: dict[str, Path] = {}
    for folder in sorted(path for path in root.rglob("*") if path.name in SPLITS[split]):
        files = [folder / name for name in _ANNOTATIONS if (folder / name).is_file()]
        if files:
            found[folder.parent.relative_to(root).as_posix()] = files[0]
    covered = {name.split("/")[0] for name in found}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name not in covered:
            raise UserError(
                f"{folder}: holds no {' or '.join(SPLITS[split])} folder with "
                f"{' or '.join(_ANNOTATIONS)}; remove it or choose another --split"
            )
    if not found:
        raise UserError(f"{root}: holds no data sets; see docs/evaluate.md for the layout")
    return found
