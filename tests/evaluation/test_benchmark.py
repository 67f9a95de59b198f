"""`owl-det evaluate` and the data sets that it opens."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipelines import ov_coco
from owl_det import cli, sharding
from owl_det.config import MeshConfig, PreprocessConfig
from owl_det.errors import DataError, UserError
from owl_det.evaluation import benchmark, by_category
from owl_det.evaluation.benchmark import BenchmarkLocation
from owl_det.evaluation.evaluate import pairs_kept
from owl_det.evaluation.loader import Loader
from owl_det.inference.export import export
from owl_det.inference.predictor import Predictor
from owl_det.types import LoadedModel

NAMES = ("cat", "dog")


@pytest.fixture(scope="module")
def dataset(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO files whose true boxes are what the model finds best, so that AP is far from 0."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 48, 3), np.uint8) for _ in range(7)]
    found = Predictor(tiny_model).detect(images, NAMES, threshold=0)
    annotations = []
    for image_id, (pixels, result) in enumerate(zip(images, found, strict=True), start=1):
        Image.fromarray(pixels).save(folder / f"{image_id}.png")
        for (x0, y0, x1, y1), label in zip(result.boxes[:12].tolist(), result.labels, strict=False):
            # An IoU of 0.87 for every second one: no threshold is near, as results are rounded.
            shift = 0.13 * (x1 - x0) * (len(annotations) % 2)
            bbox = [x0 + shift, y0, x1 - x0 - shift, y1 - y0]
            row = {"image_id": image_id, "category_id": 3 + 4 * int(label), "bbox": bbox}
            row |= {"id": len(annotations) + 1, "area": bbox[2] * bbox[3], "iscrowd": 0}
            annotations.append(row)
    write_coco(folder / "instances.json", annotations, len(images))
    return folder


def write_coco(file: Path, annotations: list[dict[str, Any]], num_images: int) -> None:
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 48, "width": 48}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": annotations,
    }
    file.write_text(json.dumps(content))


def evaluate(tiny_checkpoint: Path, *flags: str) -> int:
    return cli.main(["evaluate", "--checkpoint", str(tiny_checkpoint), "--batch_size", "4", *flags])


def test_metrics_are_those_of_the_results_file(tiny_checkpoint, dataset, tmp_path, capsys):
    annotations = dataset / "instances.json"
    out, results = tmp_path / "metrics.json", tmp_path / "results.json"
    flags = ["--dataset", "coco", "--annotations", str(annotations), "--images", str(dataset)]
    assert evaluate(tiny_checkpoint, *flags, "--out", str(out), "--results", str(results)) == 0
    metrics = json.loads(out.read_text())
    table = capsys.readouterr().out
    assert f"{100 * metrics['AP']:.2f}" in table and "num_images" in table
    truth: Any = COCO(str(annotations))
    run = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert 0.2 < metrics["AP"] < 1
    expected = run.stats.tolist()  # the results are rounded, so the last digits may differ
    for index, key in enumerate(["AP", "AP50", "AP75"]):
        assert metrics[key] == pytest.approx(expected[index], abs=5e-3), key
    assert (metrics["num_images"], metrics["unreadable_images"], metrics["step"]) == (7, 0, 5)
    assert metrics["protocol"] == "coco" and metrics["prompts"] == "none"
    assert metrics["checkpoint"] == str(tiny_checkpoint)


def test_every_class_has_its_ap_and_instances(tiny_checkpoint, dataset, tmp_path, capsys):
    annotations = dataset / "instances.json"
    out, results = tmp_path / "metrics.json", tmp_path / "results.json"
    flags = ["--dataset", "coco", "--annotations", str(annotations), "--images", str(dataset)]
    assert evaluate(tiny_checkpoint, *flags, "--out", str(out), "--results", str(results)) == 0
    metrics = json.loads(out.read_text())
    truth: Any = COCO(str(annotations))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["class", "AP", "AP50", "instances"] in lines
    for category_id, name in ((3, "cat"), (7, "dog")):
        run = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        run.params.catIds = [category_id]
        run.evaluate()
        run.accumulate()
        run.summarize()
        assert metrics["AP_by_category"][name] == pytest.approx(run.stats[0], abs=5e-3)
        assert metrics["AP50_by_category"][name] == pytest.approx(run.stats[1], abs=5e-3)
        instances = len(truth.getAnnIds(catIds=[category_id]))
        assert metrics["instances_by_category"][name] == instances
        ap, ap50 = (100 * metrics[f"{key}_by_category"][name] for key in ("AP", "AP50"))
        assert [name, f"{ap:.2f}", f"{ap50:.2f}", str(instances)] in lines
    assert np.mean(list(metrics["AP_by_category"].values())) == pytest.approx(
        metrics["AP"], abs=1e-5
    )


def test_of_many_classes_the_best_and_the_worst_are_printed():
    names = [f"name {i}" for i in range(60)]
    values = {name: i / 100 for i, name in enumerate(names)}
    summary = {"AP_by_category": values, "AP50_by_category": values}
    rows = by_category.rows({**summary, "instances_by_category": dict.fromkeys(names, 1200)})
    assert rows[1] == ("name 59", "59.00", "59.00", "1,200")
    assert rows[11][0] == "… 40 more" and rows[-1][0] == "name 0" and len(rows) == 22
    few = {key: dict(list(table.items())[:40]) for key, table in summary.items()}
    rows = by_category.rows({**few, "instances_by_category": dict.fromkeys(names, 1)})
    assert [row[0] for row in rows[1:]] == names[:40], "in order"


def test_pictures_are_those_of_a_training(tiny_checkpoint, dataset, tmp_path, capsys):
    flags = ["--dataset", "coco", "--annotations", str(dataset / "instances.json")]
    flags += ["--images", str(dataset), "--pictures", str(tmp_path / "drawn")]
    assert evaluate(tiny_checkpoint, *flags) == 0
    capsys.readouterr()
    files = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert files == {"coco.png", "precision_recall_coco.png", "confusion_matrix_coco.png"}
    for name in files:
        with Image.open(tmp_path / "drawn" / name) as picture:
            assert 200 < picture.width <= 1600
    with Image.open(tmp_path / "drawn" / "coco.png") as picture:
        assert picture.height > 4 * 386, "seven images, two a row"


@pytest.mark.slow
def test_an_export_is_measured_like_its_checkpoint(tiny_checkpoint, dataset, tmp_path, capsys):
    export(tiny_checkpoint, tmp_path / "export")
    flags = ["--dataset", "coco", "--annotations", str(dataset / "instances.json")]
    metrics = []
    for path in (tiny_checkpoint, tmp_path / "export"):
        out = tmp_path / f"{len(metrics)}.json"
        assert evaluate(path, *flags, "--images", str(dataset), "--out", str(out)) == 0
        content = json.loads(out.read_text())
        # Not AP: some boxes overlap by 0.85, a threshold, up to rounding.
        metrics.append({key: content[key] for key in ("AP50", "AP75", "num_images")})
    capsys.readouterr()
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)


def test_unreadable_images_are_counted_and_too_many_are_an_error(
    tiny_checkpoint, dataset, tmp_path, capsys
):
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    (folder / "2.png").write_bytes(b"\x89PNG....")
    flags = ["--dataset", "coco", "--annotations", str(folder / "instances.json")]
    flags += ["--images", str(folder), "--out", str(tmp_path / "metrics.json")]
    assert evaluate(tiny_checkpoint, *flags) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["num_images"], metrics["unreadable_images"]) == (6, 1)
    (folder / "5.png").unlink()
    assert evaluate(tiny_checkpoint, *flags) == 2
    assert "2 of 7 images cannot be read" in capsys.readouterr().err


def test_mean_over_a_folder_of_data_sets(tiny_checkpoint, dataset, tmp_path, capsys):
    root, out = tmp_path / "odinw", tmp_path / "metrics.json"
    for name in ("birds/raw/valid", "mushrooms/valid", "mushrooms/test"):
        shutil.copytree(dataset, root / name)
        (root / name / "instances.json").rename(root / name / "_annotations.coco.json")
    file = root / "mushrooms/valid/_annotations.coco.json"
    content = json.loads(file.read_text())
    for row in content["annotations"]:
        row["bbox"][2] /= 2
    file.write_text(json.dumps(content))
    flags = ["--dataset", "odinw", "--images", str(root), "--max_images", "4"]
    assert evaluate(tiny_checkpoint, *flags, "--out", str(out)) == 0
    metrics = json.loads(out.read_text())
    birds, mushrooms = metrics["datasets"]["birds/raw"], metrics["datasets"]["mushrooms"]
    assert birds["AP"] > mushrooms["AP"] and set(metrics["datasets"]) == {"birds/raw", "mushrooms"}
    assert metrics["AP"] == pytest.approx((birds["AP"] + mushrooms["AP"]) / 2, abs=1e-6)
    assert (metrics["num_datasets"], metrics["num_images"], birds["num_images"]) == (2, 8, 4)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:4] == ["mean", "of", "2", f"{100 * metrics['AP']:.2f}"]


def test_sets_without_the_split_are_an_error(dataset, tmp_path):
    root = tmp_path / "odinw"
    shutil.copytree(dataset, root / "birds/test")
    (root / "birds/test/instances.json").rename(root / "birds/test/_annotations.coco.json")
    assert list(
        benchmark.open_sources(BenchmarkLocation(kind="odinw", images=str(root), split="test"))
    )
    with pytest.raises(UserError, match="birds: holds no valid or val.*another --split"):
        benchmark.open_sources(BenchmarkLocation(kind="odinw", images=str(root)))
    with pytest.raises(UserError, match="no such folder"):
        benchmark.open_sources(BenchmarkLocation(kind="odinw", images=str(root / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data sets"):
        benchmark.open_sources(BenchmarkLocation(kind="odinw", images=str(tmp_path / "empty")))


def test_annotations_without_background_win_over_those_with_it(dataset, tmp_path):
    folder = tmp_path / "odinw/birds/valid"
    shutil.copytree(dataset, folder)
    shutil.copy(folder / "instances.json", folder / "_annotations.coco.json")
    (folder / "instances.json").rename(folder / "annotations_without_background.json")
    (source,) = benchmark.open_sources(
        BenchmarkLocation(kind="odinw", images=str(tmp_path / "odinw"))
    ).values()
    assert source.name == "annotations_without_background"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "coco", "--images", "x"], "--annotations: --dataset coco needs it"),
        (["--dataset", "shapes_world", "--images", "x"], "--images: .* leave it out"),
        (["--dataset", "odinw", "--images", "x", "--split_list", "y"], "--split_list: is for"),
        (["--dataset", "shapes_world", "--split", "test"], "--split: is for --dataset odinw"),
        (["--dataset", "odinw", "--images", "x", "--split", "train"], "--split: .*not train"),
        (["--dataset", "yolo", "--images", "x"], "--annotations: --dataset yolo needs it"),
        (["--dataset", "shapes_world", "--top_k", "-1"], "--top_k: must be at least 0, got -1"),
        (["--dataset", "coco", "--images", "x", "--annotations", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags_are_one_clear_error(flags, message, capsys):
    assert evaluate(Path("nowhere"), *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("owl-det: ")
    assert re.search(message, line)


def test_several_sets_have_no_single_results_file(tiny_model):
    with pytest.raises(UserError, match="--results: is one file"):
        sources: Any = {"a": None, "b": None}
        benchmark.run(tiny_model, sources, benchmark.settings("odinw"), results="x.json")


def test_protocols_and_their_defaults():
    assert benchmark.settings("lvis").protocol == "lvis"
    assert benchmark.settings("ov_coco").protocol == "coco"
    fixed = benchmark.settings("lvis", protocol="fixed")
    assert (fixed.protocol, pairs_kept(fixed)) == ("fixed", 3000)
    assert pairs_kept(benchmark.settings("coco")) == 300
    assert pairs_kept(benchmark.settings("lvis", protocol="fixed", top_k=50)) == 50


def test_images_that_are_not_there_are_named_before_any_is_measured(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("cat\n")
    for index in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"images/{index}.png")
        (tmp_path / f"labels/{index}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    location = BenchmarkLocation(
        kind="yolo", annotations=str(tmp_path / "labels"), images=str(tmp_path / "images")
    )
    source = benchmark.open_sources(location)["yolo"]

    def load(max_images: int = 0) -> Loader:
        return Loader(
            source,
            sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
            image_size=16,
            preprocess=PreprocessConfig(),
            batch_size=2,
            max_images=max_images,
        )

    assert load().num_images == 4
    for index in (2, 3):
        (tmp_path / f"images/{index}.png").unlink()
    assert load(max_images=2).num_images == 2
    with pytest.raises(DataError, match=r"2 of 4 images are not there, such as .*2\.png"):
        load()


def test_yolo_and_voc_folders_open(tmp_path):
    for name in ("images", "labels", "xml"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images/a.png")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    (tmp_path / "xml/a.xml").write_text(
        f"<annotation><object><name>cat</name>{box}</object></annotation>"
    )
    for kind, labels in (("yolo", "labels"), ("voc", "xml")):
        location = BenchmarkLocation(
            kind=kind, annotations=str(tmp_path / labels), images=str(tmp_path / "images")
        )
        source = benchmark.open_sources(location)[kind]
        assert [c.name for c in source.categories] == ["cat"] and len(source[0].boxes_xyxy) == 1


def yolo_root(root: Path) -> Path:
    """Two splits of one image each: val has 2 boxes, test 1."""
    for split, boxes in (("val", 2), ("test", 1)):
        for place in ("images", "labels"):
            (root / place / split).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(root / f"images/{split}/{split}1.png")
        (root / f"labels/{split}/{split}1.txt").write_text("0 0.5 0.5 0.5 0.5\n" * boxes)
    (root / "data.yaml").write_text("val: images/val\ntest: images/test\nnames: [cat]\n")
    return root


def open_yolo(annotations: Path, images: Path | str = "", split: str = "") -> Any:
    location = BenchmarkLocation(
        kind="yolo", annotations=str(annotations), images=str(images), split=split
    )
    return benchmark.open_sources(location)["yolo"]


def test_a_yolo_data_set_is_told_by_its_yaml_file(tmp_path):
    root = yolo_root(tmp_path)
    for annotations in (root / "data.yaml", root):
        for split, number in (("val", 2), ("valid", 2), ("test", 1)):
            source = open_yolo(annotations, split=split)
            assert (len(source), source.counts.num_boxes) == (1, number)
    assert open_yolo(root / "labels", root / "images", "val").counts.num_boxes == 2
    assert open_yolo(root / "labels/val", root / "images/val").counts.num_boxes == 2


@pytest.mark.parametrize(
    ("annotations", "images", "split", "message"),
    [
        ("data.yaml", "", "", "several splits: val .*, test .*name one, such as --split val"),
        ("labels", "images", "", "images: holds several splits.*--split val"),
        ("data.yaml", "", "train", "has no split train; it has val, test; correct --split"),
        ("data.yaml", "images", "val", "^--images: .*data.yaml says where the images are"),
        ("gone.yaml", "", "val", "^--annotations: .*gone.yaml: no such file or folder"),
        ("labels/val", "", "", "no images itself; correct --annotations, or .* with --images"),
        ("labels/gone", "images/val", "", "gone: no such folder; correct --annotations$"),
        ("labels/val", "gone", "", "gone: no such folder; correct --images$"),
        ("images/val", "images/test", "", "holds no label file .*; correct --annotations$"),
        ("labels/val", "labels/test", "", "holds no image; correct --images$"),
    ],
)
def test_messages_of_the_command_name_flags_not_keys(tmp_path, annotations, images, split, message):
    root = yolo_root(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_yolo(root / annotations, root / images if images else "", split)
    assert "the key" not in str(error.value)


def test_yolo_labels_without_names_say_where_to_write_them(tmp_path):
    root = yolo_root(tmp_path)
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match="neither data.yaml nor classes.txt.*write one there"):
        open_yolo(root / "labels/val", root / "images/val")
    (root / "classes.txt").write_text("")
    with pytest.raises(UserError, match="classes.txt: holds no names"):
        open_yolo(root / "labels/val", root / "images/val")


def test_a_voc_split_list_is_a_path_or_a_name(tmp_path, monkeypatch):
    root = tmp_path / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for stem in ("a", "b"):
        Image.new("RGB", (60, 40)).save(root / f"JPEGImages/{stem}.png")
        (root / f"Annotations/{stem}.xml").write_text("<annotation/>")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    monkeypatch.chdir(tmp_path)

    def open_voc(split_list: str, images: str = "JPEGImages") -> Any:
        location = BenchmarkLocation(
            kind="voc",
            annotations="VOC2007/Annotations",
            images=f"VOC2007/{images}",
            split_list=split_list,
        )
        return benchmark.open_sources(location)["voc"]

    for given in ("VOC2007/ImageSets/Main/val.txt", "ImageSets/Main/val.txt", "val.txt", "val"):
        assert len(open_voc(given)) == 1
    with pytest.raises(UserError, match="^--split_list: test: no such file, nor is there .*test"):
        open_voc("test")
    with pytest.raises(UserError, match="gone: no such folder; correct --images$"):
        open_voc("val", images="gone")
    (root / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(UserError, match="names no image; correct --split_list$"):
        open_voc("val")


def test_ov_coco_has_48_base_and_17_novel_categories(tmp_path):
    assert (len(set(ov_coco.BASE)), len(set(ov_coco.NOVEL))) == (48, 17)
    assert not set(ov_coco.BASE) & set(ov_coco.NOVEL)
    names = sorted(ov_coco.GROUPS) + ["parking meter", "toothpick"]
    content: dict[str, Any] = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "images": [
            {"id": i, "file_name": "a.png", "height": 9, "width": 9} for i in range(len(names))
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i, "bbox": [1, 1, 5, 5]}
            for i in range(len(names))
        ],
    }
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    location = BenchmarkLocation(kind="ov_coco", annotations=str(file), images=str(tmp_path))
    (source,) = benchmark.open_sources(location).values()
    assert len(source.categories) == len(source) == 65  # images of other categories are left out
    groups = [category.groups for category in source.categories]
    assert (groups.count(("base",)), groups.count(("novel",))) == (48, 17)
    content["categories"][0]["name"] = "aeroplane"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="'airplane' is missing"):
        benchmark.open_sources(location)


def labelled(folder: Path, boxes: list[dict[str, Any]]) -> BenchmarkLocation:
    """A COCO file of one image with these boxes."""
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 16}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1} | b for i, b in enumerate(boxes)
        ],
    }
    (folder / "labels.json").write_text(json.dumps(content))
    return BenchmarkLocation(
        kind="coco", annotations=str(folder / "labels.json"), images=str(folder)
    )


@pytest.mark.parametrize(
    "boxes, told",
    [
        ([], "no box in the files"),
        ([{"bbox": [1, 1, 5, 5], "iscrowd": 1}], "1 crowd regions"),
        ([{"bbox": [1, 1, 0, 5]}, {}], "2 of 2 boxes dropped: 1 without a bbox, 1 without area"),
    ],
)
def test_nothing_is_measured_without_a_usable_box(tiny_model, tmp_path, boxes, told):
    sources = benchmark.open_sources(labelled(tmp_path, boxes))
    with pytest.raises(DataError, match=f"no usable box to measure against: 1 images, {told}"):
        benchmark.run(tiny_model, sources, benchmark.settings("coco"))


def test_a_file_of_coco_is_none_of_lvis(tmp_path):
    location = labelled(tmp_path, [{"bbox": [1, 1, 5, 5]}])
    assert len(benchmark.open_sources(location)["coco"]) == 1
    with pytest.raises(DataError, match=r"labels\.json: is no file of LVIS: .* --dataset coco"):
        benchmark.open_sources(dataclasses.replace(location, kind="lvis"))
