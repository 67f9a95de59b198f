import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_ops, transforms
from data_pipelines.features import Record
from data_pipelines.image_ops import UnreadableImage
from owl_det.config import AugmentConfig, PreprocessConfig

PREPROCESS = PreprocessConfig()
PAD = 128
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


def record(
    size=(60, 90), boxes=((20, 10, 70, 50),), names=None, *, colour=(255, 0, 0), image_id=1, **more
) -> Record:
    """Filled rectangles on black, as an array."""
    pixels = np.zeros((*size, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = colour
    values = {
        "image": pixels,
        "image_id": image_id,
        "boxes_xyxy": np.array(boxes, np.float32).reshape(-1, 4),
        "names": tuple(names or (("thing",),) * len(boxes)),
        "is_crowd": np.zeros(len(boxes), bool),
        "scores": np.ones(len(boxes), np.float32),
    }
    return Record(**(values | more))


def as_jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def train(records, *, grid=1, image_size=96, seed=0, **augment):
    return transforms.train_example(
        records,
        grid=grid,
        augment=AugmentConfig(**augment),
        image_size=image_size,
        preprocess=PREPROCESS,
        rng=np.random.default_rng(seed),
    )


def corners(boxes_cxcywh: np.ndarray, side: int) -> np.ndarray:
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1) * side


def painted(image: np.ndarray, colour) -> np.ndarray:
    """Corners of the area that is nearer to `colour` than to black."""
    shown = np.array(colour) > 0
    distance = np.abs(image.astype(int) - np.array(colour)).max(axis=-1)
    rows, columns = np.nonzero((distance < 127) & (image[..., shown] > 127).all(axis=-1))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


# --- geometry, checked on pixels -----------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["array", "jpeg"])
@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_boxes_lie_on_what_they_box(grid, seed, encoding):
    rng = np.random.default_rng(seed)
    records = []
    for index in range(grid * grid):
        height, width = rng.integers(150, 400, 2)
        x0, y0 = (rng.uniform(0.1, 0.4, 2) * [width, height]).astype(int)
        x1, y1 = (rng.uniform(0.6, 0.9, 2) * [width, height]).astype(int)
        colour = COLOURS[index % len(COLOURS)]
        made = record((height, width), [(x0, y0, x1, y1)], colour=colour, image_id=10 + index)
        image = as_jpeg(made.image) if encoding == "jpeg" else made.image
        records.append(
            record((height, width), [(x0, y0, x1, y1)], image_id=10 + index, image=image)
        )
    example = train(
        records,
        grid=grid,
        image_size=193,
        seed=seed,
        crop_probability=0.7,
        crop_keep=0.0,
        flip=True,
        tile_scale_min=0.5,
    )
    assert example.image.shape == (193, 193, 3)
    np.testing.assert_array_equal(example.tile_image_id, np.arange(grid * grid) + 10)
    boxes = corners(example.boxes_cxcywh, 193)
    tiles = corners(example.tile_boxes_cxcywh, 193).round().astype(int)
    assert len(boxes) == grid * grid
    is_padding = np.ones((193, 193), bool)
    for box, tile in zip(boxes, example.tile_of_instance, strict=True):
        x0, y0, x1, y1 = tiles[tile]
        is_padding[y0:y1, x0:x1] = False
        row, column = divmod(int(tile), grid)
        assert (y0, x0) == (row * 193 // grid, column * 193 // grid)
        shown = painted(example.image[y0:y1, x0:x1], COLOURS[tile % len(COLOURS)])
        np.testing.assert_allclose(box, shown + [x0, y0, x0, y0], atol=1.1)
    assert (example.image[is_padding] == PAD).all()


def test_crop_and_flip_act_on_pixels_and_boxes_alike():
    seen = set()
    for seed in range(30):
        example = train([record()], seed=seed, crop_probability=1, crop_keep=0, flip=True)
        box = corners(example.boxes_cxcywh, 96)[0]
        np.testing.assert_allclose(box, painted(example.image, (255, 0, 0)), atol=1.1)
        seen.add(example.original_size)
    assert len(seen) > 20  # crops differ
    assert all(h <= 60 and w <= 90 and h * w >= 0.32 * 60 * 90 for h, w in seen)


def test_golden_evaluation_example():
    example = transforms.eval_example(
        record((20, 40), [(10, 5, 20, 15), (0, 0, 1, 1)], image_id=7),
        image_size=20,
        preprocess=PREPROCESS,
    )
    assert example.image_id == 7 and example.original_size == (20, 40)
    np.testing.assert_allclose(
        example.boxes_cxcywh, [[0.375, 0.25, 0.25, 0.25], [0.0125, 0.0125, 0.025, 0.025]]
    )
    np.testing.assert_allclose(example.tile_boxes_cxcywh, [[0.5, 0.25, 1, 0.5]])
    np.testing.assert_array_equal(example.tile_image_id, [7])
    assert (example.image[10:] == PAD).all()
    assert (example.image[4:6, 6:9] == (255, 0, 0)).all()
    assert (example.image[8:10] == 0).all()


def test_without_augmentation_training_sees_what_evaluation_sees():
    one = record(negatives=("cat",))
    expected = transforms.eval_example(one, image_size=96, preprocess=PREPROCESS)
    example = train([one])
    np.testing.assert_array_equal(example.image, expected.image)
    np.testing.assert_array_equal(example.boxes_cxcywh, expected.boxes_cxcywh)
    assert example.original_size == expected.original_size == (60, 90)
    assert example.negatives == expected.negatives == ("cat",)


def test_cells_cover_a_canvas_that_the_grid_does_not_divide():
    white = record((50, 50), [], image=np.full((50, 50, 3), 255, np.uint8))
    example = train([white] * 9, grid=3, image_size=64)
    tiles = corners(example.tile_boxes_cxcywh, 64).round().astype(int)
    np.testing.assert_array_equal(tiles[:, 0], [0, 21, 42] * 3)
    np.testing.assert_array_equal(tiles[:, 1], np.repeat([0, 21, 42], 3))
    assert (tiles[:, 2:] - tiles[:, :2] >= 21).all() and tiles.max() >= 63
    assert example.original_size == (64, 64) and example.image_id == -1


def test_tiles_are_scaled_within_their_cell():
    sides = []
    for seed in range(40):
        example = train([record((80, 40), [])], image_size=100, seed=seed, tile_scale_min=0.5)
        sides.append(example.tile_boxes_cxcywh[0, 3])
    assert 0.495 <= min(sides) < 0.6 and 0.9 < max(sides) <= 1


def test_random_crop_area_and_aspect():
    rng = np.random.default_rng(0)
    for height, width in [(100, 100), (300, 400), (100, 900), (1, 7)]:
        for _ in range(200):
            x0, y0, x1, y1 = transforms.random_crop(height, width, 0.33, rng)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            area, aspect = (x1 - x0) * (y1 - y0), (x1 - x0) / (y1 - y0)
            if height > 1:
                assert 0.32 * height * width <= area <= height * width
            if y1 - y0 < height and x1 - x0 < width:
                assert 0.74 < aspect < 1.35


def test_draft_decoding_changes_little(monkeypatch):
    scales = []

    def spy(*arguments):
        scales.append(draft_scale(*arguments))
        return scales[-1]

    draft_scale = image_ops.draft_scale
    monkeypatch.setattr(image_ops, "draft_scale", spy)
    smooth = np.linspace(0, 255, 1001 * 803).reshape(1001, 803)
    pixels = np.stack([smooth, smooth.T[:803].reshape(1001, 803), smooth[::-1]], -1)
    pixels[200:700, 300:600] = 200
    file = as_jpeg(pixels.astype(np.uint8))
    small = record((1001, 803), [], image=file)
    drafted = train([small], image_size=90)
    full = transforms.eval_example(small, image_size=90, preprocess=PREPROCESS)
    assert scales == [8]
    difference = np.abs(drafted.image.astype(int) - full.image)[2:-2, 2:-2]
    assert difference.mean() < 1.5 and np.percentile(difference, 99) < 25


def test_pure_in_records_and_generator():
    settings = {"crop_probability": 0.5, "flip": True, "photometric": 0.3, "tile_scale_min": 0.5}
    records = [record(image_id=i) for i in range(4)]
    one, same, other = (train(records, grid=2, seed=s, **settings) for s in (5, 5, 6))
    np.testing.assert_array_equal(one.image, same.image)
    np.testing.assert_array_equal(one.boxes_cxcywh, same.boxes_cxcywh)
    assert not np.array_equal(one.image, other.image)


# --- labels --------------------------------------------------------------------------------------


def test_negatives_of_a_mosaic():
    example = train(
        [
            record(names=[("cat",)], negatives=("dog", "cow", "emu")),
            record(names=[("dog",)], negatives=("cow", "cat", "fox")),
            record(names=[("owl",)], not_exhaustive=("emu",)),
            None,
        ],
        grid=2,
    )
    assert example.negatives == ("cow", "fox")
    assert example.names == (("cat",), ("dog",), ("owl",))
    np.testing.assert_array_equal(example.tile_of_instance, [0, 1, 2])


def test_tiny_boxes_are_dropped_and_never_negatives():
    far = record((1000, 1000), [(0, 0, 10, 500), (0, 0, 500, 500)], [("ant",), ("hill",)])
    example = train([far, record(negatives=("ant", "bee")), None, None], grid=2, image_size=128)
    assert example.names == (("hill",), ("thing",))
    assert example.counts["tiny_boxes"] == 1
    assert example.negatives == ("bee",)


def test_names_cut_off_by_the_crop_are_never_negatives():
    wide = record((60, 90), [(0, 0, 90, 60)], [("cat",)])
    other = record(negatives=("cat",))
    example = train(
        [wide, other, None, None], grid=2, crop_probability=1, crop_keep=1.0, crop_min_area=0.3
    )
    assert ("cat",) not in example.names
    assert example.negatives == ()


def test_boxes_outside_the_image_as_it_is():
    wrong = record(
        (20, 20),
        [(5, 5, 15, 15), (30, 30, 40, 40)],
        [("cat",), ("dog",)],
        negatives=("dog",),
    )
    for example in (
        train([wrong]),
        transforms.eval_example(wrong, image_size=40, preprocess=PREPROCESS),
    ):
        assert example.names == (("cat",),)
        assert example.counts["degenerate_boxes"] == 1
        assert example.negatives == ()


def test_merging_is_part_of_training():
    twice = record(boxes=[(20, 10, 70, 50), (20, 10, 70, 50)], names=[("cat",), ("pet",)])
    assert train([twice], merge_iou=0.9).names == (("cat", "pet"),)
    assert train([twice]).names == (("cat",), ("pet",))


def test_crowds_and_scores_travel_with_their_boxes():
    crowd = record(
        boxes=[(0, 0, 30, 30), (40, 20, 80, 50)],
        is_crowd=np.array([True, False]),
        scores=np.array([1, 0.25], np.float32),
    )
    example = train([crowd, None, None, crowd], grid=2)
    np.testing.assert_array_equal(example.is_crowd, [True, False, True, False])
    np.testing.assert_array_equal(example.scores, np.float32([1, 0.25, 1, 0.25]))
    np.testing.assert_array_equal(example.tile_of_instance, [0, 0, 3, 3])


# --- unreadable images ---------------------------------------------------------------------------


def test_unreadable_tiles_stay_padding():
    broken = record(image=b"broken", source="a.jpg", negatives=("cat",))
    example = train([None, record(image_id=5), broken, None], grid=2)
    np.testing.assert_array_equal(example.tile_image_id, [-1, 5, -1, -1])
    assert example.counts["unreadable_images"] == 1  # None was counted by whoever made it
    assert (example.image[48:] == PAD).all() and (example.image[:, :48] == PAD).all()
    assert (example.tile_boxes_cxcywh[[0, 2, 3]] == 0).all()
    assert example.negatives == () and len(example.boxes_cxcywh) == 1


def test_unreadable_single_image():
    example = train([record(image=b"broken")])
    np.testing.assert_array_equal(example.tile_image_id, [-1])
    assert example.image_id == -1 and (example.image == PAD).all()
    assert example.boxes_cxcywh.shape == (0, 4)
    with pytest.raises(UnreadableImage):
        transforms.eval_example(record(image=b"broken"), image_size=9, preprocess=PREPROCESS)


def test_the_grid_must_be_full():
    with pytest.raises(ValueError, match="2 x 2 takes 4 records, not 3"):
        train([None] * 3, grid=2)


# --- photometric ---------------------------------------------------------------------------------


def test_jitter():
    pixels = np.random.default_rng(0).integers(60, 160, (30, 30, 3), np.uint8)
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(transforms.jitter(pixels, 0.0, rng), pixels)
    means = [transforms.jitter(pixels, 0.2, rng).mean() / pixels.mean() for _ in range(50)]
    assert 0.79 < min(means) < 0.9 and 1.1 < max(means) < 1.21
    contrasts = [transforms.jitter(pixels, 0.2, rng).std() / pixels.std() for _ in range(50)]
    assert min(contrasts) < 0.8 and max(contrasts) > 1.2


def test_jitter_leaves_the_padding_alone():
    example = train([record((40, 80), [])], photometric=0.5)
    assert (example.image[48:] == PAD).all()


RED = (255, 0, 0)


@pytest.mark.parametrize("resize", ["bilinear", "gaussian"])
@pytest.mark.parametrize("geometry", ["pad", "stretch"])
def test_boxes_follow_the_pixels_in_every_geometry(geometry, resize):
    settings = PreprocessConfig(geometry=geometry, resize=resize, pad_value=0)
    pixels = np.zeros((60, 140, 3), np.uint8)
    pixels[12:36, 28:84] = RED
    one = record((60, 140), [[28, 12, 84, 36]], image=pixels)
    example = transforms.eval_example(one, image_size=96, preprocess=settings)
    shown = painted(example.image, RED)
    np.testing.assert_allclose(corners(example.boxes_cxcywh, 96)[0], shown, atol=1.5)
    trained = transforms.train_example(
        [one],
        grid=1,
        augment=AugmentConfig(),
        image_size=96,
        preprocess=settings,
        rng=np.random.default_rng(0),
    )
    np.testing.assert_array_equal(trained.image, example.image)
    np.testing.assert_allclose(trained.boxes_cxcywh, example.boxes_cxcywh, atol=1e-6)
    np.testing.assert_allclose(trained.tile_boxes_cxcywh, example.tile_boxes_cxcywh)
    mosaic = transforms.train_example(
        [one, None, None, one],
        grid=2,
        augment=AugmentConfig(flip=True),
        image_size=96,
        preprocess=settings,
        rng=np.random.default_rng(3),
    )
    height = 48 if geometry == "stretch" else round(48 * 60 / 140)
    tile = corners(mosaic.tile_boxes_cxcywh[3:], 96)[0]
    np.testing.assert_allclose(tile, [48, 48, 96, 48 + height], atol=1e-4)
    cell = mosaic.image[48:, 48:]
    found = painted(cell, RED)
    np.testing.assert_allclose(corners(mosaic.boxes_cxcywh[1:], 96)[0] - 48, found, atol=1.5)
