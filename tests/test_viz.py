"""Pictures and plots: what is drawn where, sizes, and files that are complete or absent."""

import json
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from data_pipelines.features import Category
from owl_det import viz
from owl_det.errors import DataError
from owl_det.evaluation.coco import CocoEvaluator, confusion_matrix

BOX = np.array([[16, 16, 48, 48]], np.float32)


def gray(height, width):
    return np.full((height, width, 3), 90, np.uint8)


def changed(before, after):
    return np.abs(after.astype(int) - before.astype(int)).sum(-1) > 60


def test_tiny_image_is_enlarged_and_the_box_is_drawn_on_its_border():
    picture = viz.draw_detections(gray(64, 48), BOX, ["red fox"], np.array([0.5]))
    assert picture.shape == (384, 288, 3) and picture.dtype == np.uint8
    drawn = changed(gray(384, 288), picture)
    border = 96  # 16 pixels, six times enlarged
    assert drawn[150:250, border - 2 : border + 2].any(axis=1).all()
    assert not drawn[150:250, border + 10 : 270].any()  # the object itself stays visible
    assert drawn[82:94, 96:160].mean() > 0.5  # the label above the box


def test_large_image_keeps_its_size_and_gets_thicker_lines():
    def line_width(side):
        box = BOX / 64 * side
        picture = viz.draw_detections(gray(side, side), box, ["x"])
        middle = changed(gray(side, side), picture)[side // 2]
        return np.count_nonzero(middle[: side // 2])

    assert viz.draw_detections(gray(900, 600), BOX, ["x"]).shape == (900, 600, 3)
    assert line_width(1500) > 1.5 * line_width(500)


def test_labels_at_the_edge_stay_inside_the_picture():
    box = np.array([[300, 0, 400, 60]], np.float32)
    with_label = viz.draw_detections(
        gray(400, 400),
        box,
        [
            "a long label",
        ],
    )
    without = viz.draw_detections(gray(400, 400), box, [""])
    # A label cut off at the top or right would hide most of its text.
    assert np.count_nonzero(changed(without, with_label)) > 800


def test_color_depends_on_the_label_alone():
    boxes = np.concatenate([BOX, BOX + 8])
    first = viz.draw_detections(gray(64, 64), boxes[:1], ["cat"])
    alone = viz.draw_detections(gray(64, 64), boxes, ["cat", "cat"])
    side = slice(150, 250), slice(93, 100)
    np.testing.assert_array_equal(first[side], alone[side])


def test_no_boxes_leave_the_picture_and_the_input_is_not_written_to():
    image = gray(64, 64)
    viz.draw_detections(image, BOX, ["x"])
    np.testing.assert_array_equal(image, gray(64, 64))
    empty = viz.draw_detections(image, np.zeros((0, 4)), [], np.zeros(0))
    np.testing.assert_array_equal(empty, gray(384, 384))


def test_numbers_of_boxes_and_labels_must_agree():
    with pytest.raises(ValueError, match="one label"):
        viz.draw_detections(gray(64, 64), BOX, ["x", "y"])
    with pytest.raises(ValueError, match="one score"):
        viz.draw_detections(gray(64, 64), BOX, ["x"], np.zeros(2))


def test_grid_and_side_by_side_hold_every_picture():
    pictures = [np.full((40 + 10 * i, 60, 3), 10 * i, np.uint8) for i in range(5)]
    grid = viz.picture_grid(pictures)
    for index, picture in enumerate(pictures):
        pixels = np.count_nonzero((grid == 10 * index).all(-1))
        assert pixels == picture.shape[0] * picture.shape[1]
    pair = viz.side_by_side(gray(100, 200), np.full((100, 200, 3), 30, np.uint8))
    assert pair.shape[1] > 400 and pair.shape[0] > 110
    assert np.count_nonzero((pair == 30).all(-1)) >= 100 * 200
    titles = pair[:30] < 128
    assert titles[:, : pair.shape[1] // 2].any() and titles[:, pair.shape[1] // 2 :].any()
    with pytest.raises(ValueError, match="at least one"):
        viz.picture_grid([])


def test_png_round_trips_and_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pictures" / "a.png"
    viz.save_png(path, gray(8, 9))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), gray(8, 9))

    def interrupted(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        viz.save_png(path, gray(4, 4))
    with Image.open(path) as image:
        assert image.size == (9, 8)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, so that tests can look at their content."""
    saved = []
    original = Figure.savefig

    def record(self, *args, **options):
        saved.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def small_evaluator():
    categories = [
        Category(id=1, name="cat", groups=("base",)),
        Category(id=2, name="dog", groups=("novel",)),
    ]
    evaluator = CocoEvaluator(categories)
    truth = (np.concatenate([BOX, BOX + 50]), np.array([1, 2]), np.zeros(2, bool))
    evaluator.add(1, (100, 100), truth, (BOX, np.array([0.9]), np.array([1])))
    return evaluator


def test_precision_recall_plot_has_a_line_per_group(tmp_path, figures):
    metrics = small_evaluator().compute()
    viz.plot_precision_recall(tmp_path / "pr.png", metrics)
    lines = {line.get_label(): line.get_ydata() for line in figures[0].axes[0].lines}
    assert list(lines) == ["base  (AP50 1.000)", "novel  (AP50 0.000)", "all  (AP50 0.500)"]
    np.testing.assert_array_equal(lines["all  (AP50 0.500)"], metrics.precision)
    assert min(size_of(tmp_path / "pr.png")) > 400


def test_confusion_plot_writes_counts_and_names(tmp_path, figures):
    matrix = confusion_matrix(small_evaluator())
    viz.plot_confusion_matrix(tmp_path / "c.png", matrix, ["cat", "dog"])
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "background"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "1", (2, 1): "1"}  # (column, row): a cat found, a dog missed
    with pytest.raises(ValueError, match="3 names need a 4 x 4 matrix"):
        viz.plot_confusion_matrix(tmp_path / "c.png", matrix, ["a", "b", "c"])


def test_confusion_plot_of_many_classes_separates_the_names(tmp_path, figures):
    viz.plot_confusion_matrix(
        tmp_path / "c.png", np.eye(101, dtype=int), [f"name {i}" for i in range(100)]
    )
    figure = figures[0]
    labels = figure.axes[0].get_yticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes))
    assert labels[0].get_fontsize() * 150 / 72 >= 8  # pixels in the file
    assert min(size_of(tmp_path / "c.png")) > 2000


def size_of(path):
    with Image.open(path) as image:
        return image.size


def write_lines(path, *rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def test_training_curve_takes_the_later_of_two_lines_of_a_step(tmp_path, figures):
    source = write_lines(
        tmp_path / "metrics.jsonl",
        {"step": 0, "train/loss": 3.0, "train/loss_giou": 1.0, "train/grad_norm": 9.0},
        {"step": 10, "train/loss": 7.0},
        {"step": 10, "train/loss": 2.0, "note": "restarted"},
        {"step": 10, "eval/shapes/AP50": 0.25, "eval/shapes/AP50_novel": 0.1},
    )
    viz.plot_training_curve(tmp_path / "curve.png", source)
    losses, scores = figures[0].axes
    assert {line.get_label(): list(line.get_ydata()) for line in losses.lines} == {
        "loss": [3.0, 2.0],
        "loss_giou": [1.0],
    }
    assert [line.get_label() for line in scores.lines] == ["shapes/AP50"]
    assert min(size_of(tmp_path / "curve.png")) > 400


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"step": 1, "train/loss": 1.0}, '{"step": 2, "tra'], "line 2: no JSON"),
        ([{"train/loss": 1.0}], "line 1: `step` is missing"),
        ([{"step": 1, "eval/AP50": 1.0}], "no line holds a loss"),
    ],
)
def test_bad_metrics_are_one_clear_error_and_no_picture(tmp_path, rows, message):
    source = write_lines(tmp_path / "metrics.jsonl", *rows)
    with pytest.raises(DataError, match=f"metrics.jsonl.*{message}"):
        viz.plot_training_curve(tmp_path / "curve.png", source)
    assert not (tmp_path / "curve.png").exists()


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        viz.plot_training_curve(tmp_path / "curve.png", tmp_path / "absent.jsonl")


def test_a_heat_map_is_bright_where_values_are_high():
    values = np.zeros((4, 4))
    values[0, 3] = 1.0
    picture = viz.draw_heat(gray(64, 64), values, (64, 64), "red fox")
    heat = picture[-384:].astype(int).sum(-1)  # below the title
    assert heat[40:60, 330:350].mean() > heat[40:60, 40:60].mean() + 150
    np.testing.assert_array_equal(heat[200, 40:60], heat[200, 40])  # grey is grey everywhere
    flat = viz.draw_heat(gray(64, 64), np.full((4, 4), 0.3), (64, 64), "x")
    assert flat.shape == picture.shape


def test_a_cluster_has_one_colour_in_all_images():
    first = viz.draw_clusters(gray(64, 64), np.array([[1, 1], [1, 1]]), (64, 64), 3)
    second = viz.draw_clusters(gray(64, 64), np.array([[1, 2], [0, 1]]), (64, 64), 3)
    assert tuple(first[5, 5]) == tuple(second[5, 5])


def test_a_grid_may_fall_short_of_the_image_by_rounding():
    # 640 x 427 at 960 / 16: the shorter side is 640.5 pixels of the square, rounded to 40 patches.
    values = np.linspace(0, 1, 2400).reshape(40, 60)
    picture = viz.draw_heat(gray(427, 640), values, (640 * 640 / 960, 640), "x")
    assert picture.shape[1] == 640


def test_clusters_have_their_own_colours_and_the_grid_may_exceed_the_image():
    labels = np.array([[0, 0, 1], [2, 2, 1]])
    picture = viz.draw_clusters(gray(40, 64), labels, (64, 96), 3)  # tokens of 32 pixels
    assert picture.shape == (240, 384, 3)
    colours = {tuple(picture[y, x]) for y in (10, 100) for x in (10, 180, 200, 370)}
    assert len(colours) == 1, "the first row of the first two tokens is one cluster"
    assert tuple(picture[230, 10]) not in colours, "beyond 32 of 40 rows the second row begins"
