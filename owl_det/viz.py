"""Pictures of detections (supervision, Pillow) and plots of metrics (Matplotlib).

Import it where pictures are made, not at the top of a command: the libraries take a second. Plots
use Matplotlib's object interface, so no global state changes and no display is needed.
"""

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from owl_det.errors import DataError
from owl_det.evaluation.coco import Metrics

with warnings.catch_warnings():
    # OpenCV is no dependency: supervision says at import that it draws with NumPy instead.
    warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
    import supervision as sv

_FONT = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")  # covers many scripts
_MIN_SIDE = 384  # pixels; below it, text as large as the boxes it names would be needed
_MAX_LABEL = 32  # characters

# Dark enough for white text, vivid enough for photographs.
_COLORS = (
    *("#0066ff", "#cc4400", "#008545", "#a100c2", "#d8114f"),
    *("#007a99", "#7a6a00", "#5533ff", "#b0006d", "#1b5e20"),
)
_PALETTE = sv.ColorPalette.from_hex(list(_COLORS))
_GRID = "#dddddd"

# --- pictures ------------------------------------------------------------------------------------


def draw_detections(
    image: UInt8[np.ndarray, "h w 3"],
    boxes_xyxy: Float[np.ndarray, "n 4"],
    labels: Sequence[str],
    scores: Float[np.ndarray, " n"] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws boxes (pixels of `image`) with their labels, and scores in percent where given.

    The picture is enlarged by a whole factor until its longer side has 384 pixels; lines and text
    grow with larger images. The best box is drawn last, on top; a label has the same colour in all
    pictures. Raises `ValueError` if boxes, labels and scores differ in number.
    """
    if len(labels) != len(boxes_xyxy) or (scores is not None and len(scores) != len(labels)):
        raise ValueError("draw_detections: needs one label, and one score if any, for each box")
    scale = _enlargement(image)
    canvas = Image.fromarray(image).resize(
        (image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.NEAREST
    )
    if len(boxes_xyxy) == 0:
        return np.array(canvas)
    values = np.ones(len(labels)) if scores is None else np.asarray(scores)
    order = np.argsort(values, kind="stable")
    names = [labels[int(index)] for index in order]
    texts = [_shorten(name) for name in names]
    if scores is not None:
        texts = [f"{text} {value:.0%}" for text, value in zip(texts, values[order], strict=True)]
    detections = sv.Detections(
        xyxy=np.asarray(boxes_xyxy, np.float64)[order] * scale,
        # supervision takes the colour by class; the checksum is the same in every process.
        class_id=np.array([zlib.crc32(name.encode()) % len(_COLORS) for name in names]),
    )
    side = max(canvas.size)
    line = max(2, round(side / 300))
    # The white rim keeps a box visible on an object of its own colour.
    canvas = sv.BoxAnnotator(sv.Color.WHITE, thickness=line + 2).annotate(canvas, detections)
    canvas = sv.BoxAnnotator(_PALETTE, thickness=line).annotate(canvas, detections)
    text = sv.RichLabelAnnotator(
        color=_PALETTE,
        font_path=_FONT,
        font_size=_font_size(side),
        text_padding=max(2, round(side / 250)),
        smart_position=True,  # keeps labels inside the picture and apart
    )
    return np.array(text.annotate(canvas, detections, texts))


def side_by_side(
    prediction: UInt8[np.ndarray, "h w 3"], ground_truth: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Two pictures of one image under the titles "prediction" and "ground truth"."""
    pictures = [titled(prediction, "prediction"), titled(ground_truth, "ground truth")]
    return picture_grid(pictures, columns=2)


def picture_grid(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]], columns: int = 0
) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures of any size in rows on white, each centred in a cell that fits the largest.

    `columns` 0 takes about as many columns as rows. Raises `ValueError` without pictures.
    """
    if not pictures:
        raise ValueError("picture_grid: needs at least one picture")
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(4, max(height, width) // 64)
    shape = rows * (height + gap) + gap, columns * (width + gap) + gap, 3
    grid = np.full(shape, 255, np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top = gap + row * (height + gap) + (height - picture.shape[0]) // 2
        left = gap + column * (width + gap) + (width - picture.shape[1]) // 2
        grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return grid


def draw_clusters(
    image: UInt8[np.ndarray, "h w 3"],
    labels: Int[np.ndarray, "r c"],
    extent: tuple[float, float],
    num_clusters: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """An image under a token grid, each token in the colour of its cluster, of so many in all.

    `extent` is the height and width of the grid in pixels of `image`, which it may exceed.
    """
    hues = matplotlib.colormaps["hsv"](np.arange(num_clusters) / num_clusters)
    colours = np.round(hues[labels][..., :3] * 255).astype(np.uint8)
    return _overlaid(image, colours, extent, Image.Resampling.NEAREST)


def draw_heat(
    image: UInt8[np.ndarray, "h w 3"],
    values: Float[np.ndarray, "r c"],
    extent: tuple[float, float],
    title: str,
) -> UInt8[np.ndarray, "H W 3"]:
    """An image under a heat map of a token grid, from the lowest value (dark) to the highest.

    The title is followed by these two. `extent` as in `draw_clusters`.
    """
    low, high = float(values.min()), float(values.max())
    share = (values - low) / max(high - low, 1e-12)
    colours = np.round(matplotlib.colormaps["inferno"](share)[..., :3] * 255).astype(np.uint8)
    picture = _overlaid(image, colours, extent, Image.Resampling.BILINEAR)
    return titled(picture, f"{_shorten(title)}  {low:.2f} … {high:.2f}")


def _overlaid(
    image: UInt8[np.ndarray, "h w 3"],
    colours: UInt8[np.ndarray, "r c 3"],
    extent: tuple[float, float],
    kernel: Image.Resampling,
) -> UInt8[np.ndarray, "H W 3"]:
    scale = _enlargement(image)
    size = image.shape[1] * scale, image.shape[0] * scale
    # In grey, so that every colour is the map's.
    below = Image.fromarray(image).convert("L").convert("RGB")
    below = below.resize(size, Image.Resampling.NEAREST)
    rows, columns = colours.shape[:2]
    # The part of the grid that the image covers: all of it, where sizes were rounded down.
    across, down = image.shape[1] / extent[1], image.shape[0] / extent[0]
    box = (0, 0, columns * min(1.0, across), rows * min(1.0, down))
    above = Image.fromarray(colours).resize(size, kernel, box=box)
    return np.asarray(Image.blend(below, above, 0.6))


def save_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a PNG, folders included; the file appears once it is complete."""
    with _complete(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")


def _enlargement(image: UInt8[np.ndarray, "h w 3"]) -> int:
    return max(1, -(-_MIN_SIDE // max(image.shape[:2])))


def _font_size(side: int) -> int:
    return max(12, round(side / 45))


def _shorten(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…"


def titled(picture: UInt8[np.ndarray, "h w 3"], title: str) -> UInt8[np.ndarray, "H w 3"]:
    """A picture under a line of text; small ones are enlarged first, by a whole factor."""
    picture = np.kron(picture, np.ones((_enlargement(picture),) * 2 + (1,), np.uint8))
    height, width = picture.shape[:2]
    size = round(1.3 * _font_size(max(height, width)))
    bar = 2 * size
    canvas = Image.new("RGB", (width, height + bar), "white")
    canvas.paste(Image.fromarray(picture), (0, bar))
    font = ImageFont.truetype(_FONT, size)
    ImageDraw.Draw(canvas).text((width / 2, bar / 2), title, "black", font, anchor="mm")
    return np.array(canvas)


@contextmanager
def _complete(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; it takes the place of `path` when nothing went wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- plots ---------------------------------------------------------------------------------------


def plot_precision_recall(path: str | os.PathLike[str], metrics: Metrics) -> None:
    """Precision over recall at IoU 0.5: the mean over all categories, and one line a group."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, (name, group) in enumerate(metrics.groups.items()):
        label = f"{name}  (AP50 {group.AP50:.3f})"
        color = _COLORS[index % len(_COLORS)]
        axes.plot(metrics.recall, group.precision, label=label, linewidth=1.5, color=color)
    label = f"all  (AP50 {metrics.AP50:.3f})"
    axes.plot(metrics.recall, metrics.precision, label=label, linewidth=3, color="black")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    num = f"{metrics.num_images:,} images, {metrics.num_instances:,} instances"
    axes.set_title(f"Precision and recall at IoU 0.5\n{num}", fontsize=11)
    _tidy(axes)
    # Beside the axes where many lines would cover the curves.
    if len(metrics.groups) > 5:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    else:
        axes.legend(loc="best", fontsize=9)
    _save(figure, path)


def plot_confusion_matrix(
    path: str | os.PathLike[str], matrix: Int[np.ndarray, "d d"], names: Sequence[str]
) -> None:
    """Colours are shares of each true category (row); counts are written in where they fit.

    `matrix` is that of `confusion_matrix`: its last row and column are background and missed, so
    it is one larger than `names`. Raises `ValueError` if it is not.
    """
    size = len(names) + 1
    if matrix.shape != (size, size):
        raise ValueError(
            f"plot_confusion_matrix: {len(names)} names need a {size} x {size} matrix, "
            f"got {matrix.shape}"
        )
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    inches = float(np.clip(0.55 * size, 4, 16))
    figure = Figure(figsize=(inches + 1.5, inches), layout="constrained")
    axes = figure.subplots()
    # The root makes rare confusions visible: with many categories most shares are a few percent.
    picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    # One cell in points, and a font that leaves neighbouring names apart.
    font = float(np.clip(0.55 * 72 * 0.78 * inches / size, 3.5, 10))
    short = [_shorten(name) for name in names]
    axes.set_xticks(range(size), [*short, "missed"], rotation=90, fontsize=font)
    axes.set_yticks(range(size), [*short, "background"], fontsize=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=_GRID, linewidth=0.3)
    axes.tick_params(which="both", length=0)
    # The corner between background and missed holds nothing.
    axes.axhline(size - 1.5, color="#666666", linewidth=0.8)
    axes.axvline(size - 1.5, color="#666666", linewidth=0.8)
    if size <= 25:
        _write_counts(axes, matrix, share, font)
    figure.colorbar(picture, ax=axes, shrink=0.6, label="share of the row")
    _save(figure, path, dpi=120 if size <= 25 else 150)


def plot_training_curve(
    path: str | os.PathLike[str], metrics_jsonl_path: str | os.PathLike[str]
) -> None:
    """Losses (every `train/…loss…`) above AP50 (every `eval…/AP50`), over the steps.

    The file holds one JSON object a line, each with `step`; where a step occurs twice (after a
    restart), the later line counts. Raises `DataError` on a malformed line or if no loss is there.
    """
    curves = _read_curves(Path(metrics_jsonl_path))
    losses = {key: curve for key, curve in curves.items() if _is_loss(key)}
    scores = {key: curve for key, curve in curves.items() if _is_ap50(key)}
    if not losses:
        raise DataError(
            f"{metrics_jsonl_path}: no line holds a loss (a key such as train/loss); "
            "let the training log once before it is plotted"
        )
    rows = 2 if scores else 1
    figure = Figure(figsize=(7.2, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    _plot_curves(axes[0], losses, ylabel="loss", marker="")
    if all(value > 0 for curve in losses.values() for value in curve.values()):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    if scores:
        _plot_curves(axes[1], scores, ylabel="AP50", marker="o")
        axes[1].set_ylim(0, None)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def plot_score_histogram(
    path: str | os.PathLike[str], counts: Mapping[str, Sequence[int]], threshold: float
) -> None:
    """Numbers of boxes by score, one line for each entry; bins are equal parts of [0, 1]."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(counts.items()):
        if not any(values):
            continue
        edges = np.linspace(0, 1, len(values) + 1)
        label = f"{name} ({sum(values):,})"
        axes.stairs(values, edges, label=label, color=_COLORS[index % len(_COLORS)], linewidth=1.5)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes.set(xlim=(0, 1), xlabel="score", ylabel="boxes")
    axes.set_yscale("symlog", linthresh=1)
    _tidy(axes)
    axes.legend(fontsize=9)
    _save(figure, path)


def plot_trade_off(
    path: str | os.PathLike[str],
    points: Sequence[tuple[str, float, float]],
    xlabel: str,
    ylabel: str,
) -> None:
    """Points (label, x, y) on a line in their order; filled where no other beats them on both."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    x, y = ([point[axis] for point in points] for axis in (1, 2))
    axes.plot(x, y, color="#999999", linewidth=1, zorder=1)
    for index, (label, px, py) in enumerate(points):
        is_beaten = any(
            qx >= px and qy >= py and (qx > px or qy > py)
            for other, (_, qx, qy) in enumerate(points)
            if other != index
        )
        axes.scatter(
            px,
            py,
            s=50,
            zorder=2,
            edgecolors=_COLORS[0],
            linewidths=1.5,
            facecolors="white" if is_beaten else _COLORS[0],
        )
        axes.annotate(label, (px, py), textcoords="offset points", xytext=(7, 5), fontsize=9)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title("Filled: no other weight is better on both", fontsize=11)
    _tidy(axes)
    _save(figure, path)


def _read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Per key, the value at each step."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the metrics that a training run wrote")
    curves: dict[str, dict[int, float]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            step, values = _parse_line(line, f"{path}, line {number}")
            for key, value in values.items():
                curves.setdefault(key, {})[step] = value
    return curves


def _parse_line(line: str, where: str) -> tuple[int, dict[str, float]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}); remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{where}: `step` is missing or no whole number; remove the line")
    numbers = {k: float(value) for k, value in row.items() if isinstance(value, int | float)}
    return row["step"], numbers


def _is_loss(key: str) -> bool:
    return key.startswith("train/") and "loss" in key


def _is_ap50(key: str) -> bool:
    return key.startswith("eval") and key.endswith("/AP50")


def _plot_curves(
    axes: Axes, curves: Mapping[str, Mapping[int, float]], ylabel: str, marker: str
) -> None:
    for index, (key, curve) in enumerate(curves.items()):
        steps = sorted(curve)
        is_total = key == "train/loss"
        axes.plot(
            steps,
            [curve[step] for step in steps],
            label=key.removeprefix("train/").removeprefix("eval/"),
            color="black" if is_total else _COLORS[index % len(_COLORS)],
            linewidth=2.5 if is_total else 1.5,
            marker=marker,
            markersize=4,
        )
    axes.set_ylabel(ylabel)
    _tidy(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)


def _write_counts(
    axes: Axes, matrix: Int[np.ndarray, "d d"], share: Float[np.ndarray, "d d"], font: float
) -> None:
    for row, column in np.argwhere(matrix):
        color = "white" if share[row, column] > 0.4 else "black"
        text = f"{matrix[row, column]}"
        # Long counts shrink to stay in their cell.
        size = font * min(1.0, 5 / len(text))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


def _tidy(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    with _complete(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)
