"""Pictures and plots: what is drawn where, sizes, and files that are complete or absent."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from data_pipelines.features import Category
from owl_det import viz
from owl_det.errors import DataError
from owl_det.evaluation import pictures
from owl_det.evaluation.coco import CocoEvaluator
from owl_det.evaluation.confusion import confusion_matrix
from owl_det.viz import colors, detections, fonts, labels, plots
from owl_det.viz.detections import choose, draw_best, draw_detections
from owl_det.viz.features import draw_clusters, draw_heat
from owl_det.viz.pictures import PAIR_SIDE, pair, picture_grid, save_png

BOX = np.array([[16, 16, 48, 48]], np.float32)


def gray(height, width):
    return np.full((height, width, 3), 90, np.uint8)


def changed(before, after):
    return np.abs(after.astype(int) - before.astype(int)).sum(-1) > 60


def test_tiny_image_is_enlarged_and_the_box_is_drawn_on_its_border():
    picture = draw_detections(gray(64, 48), BOX, ["red fox"], np.array([0.5]))
    assert picture.shape == (512, 384, 3) and picture.dtype == np.uint8
    drawn = changed(gray(512, 384), picture)
    border = 128  # 16 pixels, eight times enlarged
    assert drawn[200:350, border - 2 : border + 2].any(axis=1).all()
    assert not drawn[200:350, border + 10 : 370].any()  # the object itself stays visible
    assert drawn[112:124, 128:190].mean() > 0.5  # the label above the box


def test_large_image_keeps_its_size_and_gets_thicker_lines():
    def line_width(side):
        box = BOX / 64 * side
        picture = draw_detections(gray(side, side), box, ["x"])
        middle = changed(gray(side, side), picture)[side // 2]
        return np.count_nonzero(middle[: side // 2])

    assert draw_detections(gray(900, 600), BOX, ["x"]).shape == (900, 600, 3)
    assert line_width(3000) > 2 * line_width(500)


@pytest.mark.parametrize(
    "shape, expected",
    [((64, 48), (192, 144)), ((300, 600), (100, 200)), ((3000, 2), (200, 1)), ((200, 200), None)],
)
def test_pictures_of_a_sheet_fit_into_a_side(shape, expected):
    picture = draw_detections(gray(*shape), BOX, ["x"], side=200)
    assert picture.shape[:2] == (expected or shape)


def sizes_of(names, size=16):
    return [(fonts.plain(size).getlength(name), 20.0) for name in names]


def test_no_label_covers_another_or_is_cut():
    rng = np.random.default_rng(3)
    corners = rng.uniform(-30, 400, (30, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 250, (30, 2))], axis=1)
    boxes[:4] = [[0, 0, 40, 30], [600, 0, 640, 9], [0, 470, 9, 480], [639, 479, 640, 480]]
    sizes = sizes_of([f"a name {i}" for i in range(30)])
    places = labels.place(boxes, sizes, (640, 480))
    found = [(*p, p[0] + s[0], p[1] + s[1]) for p, s in zip(places, sizes, strict=True) if p]
    assert len(found) >= 28
    for x0, y0, x1, y1 in found:
        assert x0 >= 0 and y0 >= 0 and x1 <= 640 and y1 <= 480
    for a, b in combinations(found, 2):
        overlap = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        assert (overlap <= 1e-6).any(), (a, b)


def test_a_label_touches_its_box():
    boxes = np.array([[100, 100, 180, 160], [110, 105, 190, 165], [120, 95, 200, 150]], float)
    sizes = sizes_of(["first", "second", "third"])
    for box, place, size in zip(boxes, labels.place(boxes, sizes, (640, 480)), sizes, strict=True):
        assert place is not None
        gap = np.maximum(box[:2] - np.add(place, size), place - box[2:])
        assert gap.max() <= 1e-6


def test_a_label_without_room_is_left_out_and_the_box_stays():
    places = labels.place(np.array([[0, 0, 20, 20.0]]), [(50.0, 20.0)], (40, 40))
    assert places == [None]
    crowd = np.tile([[0.0, 0, 40, 40]], (9, 1))
    places = labels.place(crowd, [(40.0, 20.0)] * 9, (40, 40))
    assert len([place for place in places if place]) == 2


def test_labels_at_the_edge_stay_inside_the_picture():
    box = np.array([[300, 0, 400, 60]], np.float32)
    with_label = draw_detections(gray(500, 500), box, ["a long label"])
    without = draw_detections(gray(500, 500), box, [""])
    # A label cut off at the top or right would hide most of its text.
    assert np.count_nonzero(changed(without, with_label)) > 800


def test_a_box_of_a_pixel_and_boxes_beyond_the_image_are_seen():
    for box in ([50, 50, 51, 51], [499, 0, 500, 500], [-90, -90, 900, 900], [0, 499.5, 1, 500]):
        picture = draw_detections(gray(500, 500), np.array([box], float), ["x"])
        without = draw_detections(gray(500, 500), np.array([box], float), ["x"], classes=[3])
        # Another class has another colour: of the label, and of lines on all four sides.
        assert np.count_nonzero(changed(picture, without)) > 100, box


def test_a_class_has_one_colour_and_neighbours_differ():
    boxes = np.concatenate([BOX, BOX + 8])
    first = draw_detections(gray(64, 64), boxes[:1], ["cat"])
    alone = draw_detections(gray(64, 64), boxes, ["cat", "cat"])
    side = slice(200, 300), slice(125, 132)
    np.testing.assert_array_equal(first[side], alone[side])
    named = draw_detections(gray(64, 64), BOX, ["x"], np.ones(1), classes=[5])
    truth = draw_detections(gray(64, 64), BOX, ["another"], classes=[5])
    np.testing.assert_array_equal(named[side], truth[side])
    values = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in colors.BOXES]
    for a, b in pairwise([*values, values[0]]):
        assert np.abs(a - b).sum() > 100
    assert len(set(colors.BOXES)) == len(colors.BOXES)


def test_text_can_be_read_on_every_colour():
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for color in colors.BOXES:
        ink = 0.0 if colors.contrast(color) == "black" else 1.0
        light, dark = sorted((ink, luminance(color)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, color


def test_of_overlapping_boxes_the_best_is_chosen_whatever_its_name():
    boxes = np.concatenate([BOX, BOX + 1, BOX + 2, BOX + 40])
    scores = np.array([0.5, 0.9, 0.6, 0.3])
    assert choose(boxes, scores).tolist() == [1, 3]


def test_few_boxes_are_chosen_and_the_picture_says_how_many():
    corners = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2) * 40.0
    boxes = np.concatenate([corners, corners + 30], axis=1)
    scores = np.linspace(0.05, 0.95, len(boxes))
    kept = choose(boxes, scores)
    assert kept.tolist() == list(range(143, 113, -1)), "the 30 best"
    text = detections.note(kept, scores)
    assert text.startswith("30 of 144 boxes drawn") and "0.2" in text
    assert detections.note(np.arange(144), scores) == ""
    picture = draw_best(gray(500, 500), boxes, ["x"] * 144, scores)
    assert picture.shape[0] > 500, "a line below"
    few = draw_best(gray(500, 500), boxes[kept[:3]], ["x"] * 3, scores[kept[:3]])
    assert few.shape == (500, 500, 3)


def test_weak_scores_are_drawn_where_there_are_no_better_ones():
    boxes = np.concatenate([BOX, BOX + 40, BOX + 90])
    assert choose(boxes, np.array([0.12, 0.07, 0.05])).tolist() == [0, 1]
    assert choose(boxes, np.array([0.9, 0.21, 0.19])).tolist() == [0, 1]
    assert choose(boxes, np.array([0.9, 0.21, 0.1]), lowest=0.1).tolist() == [0, 1, 2]
    assert choose(np.zeros((0, 4)), np.zeros(0)).tolist() == []


def test_boxes_without_area_are_no_objects():
    boxes = np.array([[10, 480, 90, 480], [10, 10, 90, 90.0]])
    assert choose(boxes, np.array([0.9, 0.8])).tolist() == [1]


def test_a_name_that_no_font_has_is_a_number(monkeypatch):
    def nowhere(text, size):
        return None if not text.isascii() else fonts.plain(size)

    monkeypatch.setattr(fonts, "font", nowhere)
    cat = draw_detections(gray(500, 500), BOX, ["猫"], classes=[7])
    number = draw_detections(gray(500, 500), BOX, ["class 7"], classes=[7])
    np.testing.assert_array_equal(cat, number)


def test_fonts_have_what_they_are_asked_for():
    for text in ("red fox 95%", "собака", "ψάρι", "كلب", "été"):
        font = fonts.font(text, 20)
        assert font is not None and "DejaVuSans" in str(font.path)
    assert fonts.font("\U0010fffd", 20) is None, "a character of nobody's"


def test_long_names_are_cut_to_the_picture_and_the_score_stays(monkeypatch):
    seen = []
    original = labels.place
    monkeypatch.setattr(labels, "place", lambda *a: seen.append(a) or original(*a))
    draw_detections(gray(100, 200), BOX, ["a very long name " * 9], np.ones(1), side=200)
    ((_, ((width, _),), canvas),) = seen
    assert 150 < width <= canvas[0] == 200


def test_no_boxes_leave_the_picture_and_the_input_is_not_written_to():
    image = gray(64, 64)
    draw_detections(image, BOX, ["x"])
    np.testing.assert_array_equal(image, gray(64, 64))
    empty = draw_detections(image, np.zeros((0, 4)), [], np.zeros(0))
    np.testing.assert_array_equal(empty, gray(512, 512))


def test_numbers_of_boxes_and_labels_must_agree():
    with pytest.raises(ValueError, match="one label"):
        draw_detections(gray(64, 64), BOX, ["x", "y"])
    with pytest.raises(ValueError, match="one score"):
        draw_detections(gray(64, 64), BOX, ["x"], np.zeros(2))


def test_a_row_is_as_high_as_its_own_pictures():
    pictures = [np.full((40 + 10 * i, 60, 3), 10 * i, np.uint8) for i in range(5)]
    grid = picture_grid(pictures)
    for index, picture in enumerate(pictures):
        pixels = np.count_nonzero((grid == 10 * index).all(-1))
        assert pixels == picture.shape[0] * picture.shape[1]
    wide = [np.full((20, 100, 3), 1, np.uint8)] * 2 + [np.full((300, 100, 3), 2, np.uint8)]
    sheet = picture_grid(wide, columns=2)
    assert sheet.shape[0] < 20 + 300 + 40
    with pytest.raises(ValueError, match="at least one"):
        picture_grid([])


def test_sheets_are_at_most_1600_pixels_wide():
    sheet = picture_grid([gray(3000, 4000), gray(500, 400)], columns=2)
    assert sheet.shape[1] <= 1600
    pairs = [
        pair(picture, picture, title="a name " * 40)
        for side in (64, 70, 4000)
        for picture in [draw_detections(gray(side, side), BOX, ["x"], side=PAIR_SIDE)]
    ]
    assert picture_grid(pairs, columns=2).shape[1] <= 1600
    assert all(2 * pair.shape[1] + 24 <= 1600 for pair in pairs), "none was shrunk"


def test_a_pair_shows_both_pictures_under_title_and_captions():
    shown = pair(gray(100, 200), np.full((100, 200, 3), 30, np.uint8), title="image 7")
    assert np.count_nonzero((shown == 30).all(-1)) >= 100 * 200
    middle = shown.shape[1] // 2
    top = shown[:-100] < 200
    assert top[:30].any() and top[30:, :middle].any() and top[30:, middle:].any()
    narrow = pair(gray(300, 20), gray(300, 20), title="a file name")
    assert narrow.shape[1] == PAIR_SIDE, "room for the title"


def test_names_of_the_package_are_those_of_its_modules():
    assert viz.draw_detections is draw_detections
    assert all(callable(getattr(viz, name)) for name in viz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'draw_nothing'"):
        viz.draw_nothing  # noqa: B018


def test_png_round_trips_and_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pictures" / "a.png"
    save_png(path, gray(8, 9))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), gray(8, 9))

    def interrupted(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, gray(4, 4))
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
    pictures.write_plots(tmp_path, "x", small_evaluator(), metrics)
    lines = {line.get_label(): line.get_ydata() for line in figures[0].axes[0].lines}
    assert list(lines) == ["base  (AP50 1.000)", "novel  (AP50 0.000)", "all  (AP50 0.500)"]
    np.testing.assert_array_equal(lines["all  (AP50 0.500)"], metrics.precision)
    assert min(size_of(tmp_path / "precision_recall_x.png")) > 400


RULE = {"score": 0.3, "iou": 0.5}


def test_confusion_plot_writes_counts_and_names(tmp_path, figures):
    matrix = confusion_matrix(small_evaluator())
    plots.plot_confusion_matrix(tmp_path / "c.png", matrix, ["cat", "dog"], **RULE)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "background"]
    assert "0.3" in axes.get_title() and "IoU 0.5" in axes.get_title()
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "1", (2, 1): "1"}  # (column, row): a cat found, a dog missed
    with pytest.raises(ValueError, match="3 names need a 4 x 4 matrix"):
        plots.plot_confusion_matrix(tmp_path / "c.png", matrix, ["a", "b", "c"], **RULE)


def test_confusion_plot_of_many_classes_separates_the_names(tmp_path, figures):
    names = [f"name {i}" for i in range(100)]
    plots.plot_confusion_matrix(tmp_path / "c.png", np.eye(101, dtype=int), names, **RULE)
    figure = figures[0]
    labels = figure.axes[0].get_yticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes))
    assert labels[0].get_fontsize() * 120 / 72 >= 8  # pixels in the file
    assert 1200 < size_of(tmp_path / "c.png")[0] <= 1600


def test_of_a_thousand_classes_those_with_most_mistakes_are_drawn(tmp_path, figures):
    matrix = 5 * np.eye(1001, dtype=int)
    matrix[700, 20] = 9
    names = [f"name {i}" for i in range(1000)]
    plots.plot_confusion_matrix(tmp_path / "c.png", matrix, names, **RULE)
    axes = figures[0].axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert {"name 20", "name 700", "background"} <= set(shown) and len(shown) == 121
    assert "120 of 1,000 classes" in axes.get_title()


def test_a_small_confusion_plot_has_no_empty_bands(tmp_path):
    plots.plot_confusion_matrix(tmp_path / "c.png", np.ones((4, 4), int), list("abc"), **RULE)
    with Image.open(tmp_path / "c.png") as image:
        ink = (np.asarray(image.convert("L")) < 250).nonzero()
        for axis, size in ((0, image.height), (1, image.width)):
            assert ink[axis].min() < 20 and ink[axis].max() > size - 20


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
    plots.plot_training_curve(tmp_path / "curve.png", source)
    losses, scores = figures[0].axes
    assert {line.get_label(): list(line.get_ydata()) for line in losses.lines} == {
        "loss": [3.0, 2.0],
        "loss giou": [1.0],
    }
    assert [line.get_label() for line in scores.lines] == ["AP50", "AP50 novel"]
    assert min(size_of(tmp_path / "curve.png")) > 400


def test_a_run_that_logged_once_shows_its_loss(tmp_path, figures):
    source = write_lines(tmp_path / "m.jsonl", {"step": 20, "train/loss": 2.4})
    plots.plot_training_curve(tmp_path / "c.png", source)
    (line,) = figures[0].axes[0].lines
    assert line.get_marker() == "o"


def test_the_highest_marker_is_inside_the_axes(tmp_path, figures):
    rows = [{"step": s, "train/loss": 1.0, "eval/x/AP50": v} for s, v in ((500, 0.1), (7000, 0.5))]
    plots.plot_training_curve(tmp_path / "c.png", write_lines(tmp_path / "m.jsonl", *rows))
    losses, scores = figures[0].axes
    (line,) = scores.lines
    _, top = scores.transData.transform((7000, 0.5))
    assert top + line.get_markersize() * figures[0].dpi / 72 / 2 < scores.bbox.y1
    assert scores.get_legend() is None and scores.get_title() == "x/AP50", "one line needs none"
    steps = [int(tick) for tick in scores.get_xticks()]
    assert set(np.diff(steps)) == {1000}


@pytest.mark.parametrize("values", [(2.4, 0.33), (1.8, 0.7), (1.1, 0.9), (300.0, 0.002), (3, 2.9)])
def test_the_axis_of_losses_has_two_labels_or_more(values, tmp_path, figures):
    rows = [{"step": i, "train/loss": value} for i, value in enumerate(values)]
    plots.plot_training_curve(tmp_path / "c.png", write_lines(tmp_path / "m.jsonl", *rows))
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    shown = [label.get_text() for tick, label in ticks if low <= tick <= high]
    assert 2 <= len([text for text in shown if text]) <= 20
    assert_apart(figures[0], axes.get_yticklabels(), axes)


def assert_apart(figure, texts, axes=None):
    """No text lies on another, and none outside the figure that is saved."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    low, high = axes.get_ylim() if axes else (0, 0)
    texts = [
        t for t in texts if t.get_text() and (axes is None or low <= t.get_position()[1] <= high)
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    for (a, first), (b, second) in combinations(zip(extents, texts, strict=True), 2):
        assert not a.overlaps(b), (first.get_text(), second.get_text())
    for extent in extents:
        assert extent.x0 >= -1 and extent.y0 >= -1
        assert extent.x1 <= figure.bbox.x1 + 1 and extent.y1 <= figure.bbox.y1 + 1


def test_labels_of_points_lie_apart_and_axes_are_named_in_short(tmp_path, figures):
    points = [(f"{i / 10:g}", 0.49 + 1e-5 * i, 0.7 - 1e-5 * i) for i in range(6)]
    points += [("0", 0.3, 0.5)]
    where = "kind=coco,path=/data/coco/annotations/instances_val2017.json,group=base"
    plots.plot_trade_off(tmp_path / "t.png", points, f"AP out: {where}", f"AP in: {where}")
    (axes,) = figures[0].axes
    assert_apart(figures[0], axes.texts)
    assert [text.get_text() for text in axes.texts] == [label for label, *_ in points]
    for label in (axes.xaxis.label, axes.yaxis.label):
        assert_apart(figures[0], [label])
        assert "instances_val2017.json" in label.get_text() and "/data" not in label.get_text()
        extent = label.get_window_extent()
        assert max(extent.width, extent.height) <= 0.9 * axes.bbox.width


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
        plots.plot_training_curve(tmp_path / "curve.png", source)
    assert not (tmp_path / "curve.png").exists()


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        plots.plot_training_curve(tmp_path / "curve.png", tmp_path / "absent.jsonl")


def test_a_heat_map_is_bright_where_values_are_high():
    values = np.zeros((4, 4))
    values[0, 3] = 1.0
    picture = draw_heat(gray(64, 64), values, (64, 64), "red fox")
    heat = picture[-384 - 24 : -24].astype(int).sum(-1)  # below the title, above the bar
    assert heat[40:60, 330:350].mean() > heat[40:60, 40:60].mean() + 150
    np.testing.assert_array_equal(heat[200, 40:60], heat[200, 40])  # grey is grey everywhere
    flat = draw_heat(gray(64, 64), np.full((4, 4), 0.3), (64, 64), "x")
    assert flat.shape == picture.shape


def test_a_cluster_has_one_colour_in_all_images():
    first = draw_clusters(gray(64, 64), np.array([[1, 1], [1, 1]]), (64, 64), 3)
    second = draw_clusters(gray(64, 64), np.array([[1, 2], [0, 1]]), (64, 64), 3)
    assert tuple(first[5, 5]) == tuple(second[5, 5])


def test_a_grid_may_fall_short_of_the_image_by_rounding():
    # 640 x 427 at 960 / 16: the shorter side is 640.5 pixels of the square, rounded to 40 patches.
    values = np.linspace(0, 1, 2400).reshape(40, 60)
    picture = draw_heat(gray(427, 640), values, (640 * 640 / 960, 640), "x")
    assert picture.shape[1] == 640


def test_clusters_have_their_own_colours_and_the_grid_may_exceed_the_image():
    labels = np.array([[0, 0, 1], [2, 2, 1]])
    picture = draw_clusters(gray(40, 64), labels, (64, 96), 3)  # tokens of 32 pixels
    assert picture.shape == (240, 384, 3)
    colours = {tuple(picture[y, x]) for y in (10, 100) for x in (10, 180, 200, 370)}
    assert len(colours) == 1, "the first row of the first two tokens is one cluster"
    assert tuple(picture[230, 10]) not in colours, "beyond 32 of 40 rows the second row begins"
