"""What we write opens in transformers' own pipeline and finds there what `Predictor` finds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import optimize

from owl_det import path_rules
from owl_det.checkpoints.load import save_model
from owl_det.config import PreprocessConfig
from owl_det.convert import formats, models
from owl_det.inference.predictor import Detections, Predictor
from owl_det.types import LoadedModel
from tests import tiny

pytest.importorskip("torch", reason="parity needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra [parity]")

# transformers and torch warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

QUERIES = ["red circle", "a cat's paw", "Über 84!"]


def random_model(
    preprocess: PreprocessConfig, *, has_objectness_head: bool, image_size: int = 64
) -> LoadedModel:
    """Of the quickstart's size, with weights that give scores of all heights."""
    config = tiny.config(
        model__image_size=image_size, model__has_objectness_head=has_objectness_head
    )
    rng = np.random.default_rng(0)
    values = {}
    for name, shape in models.parameter_shapes(config.model, config.preprocess).items():
        is_matrix = "kernel" in name
        spread = np.prod(shape[:-1]) ** -0.5 if is_matrix else 0.3
        if "blocks" in name and is_matrix:
            spread *= shape[0] ** 0.5  # the first axis is the layer
        values[name] = rng.normal(0.4 if name.endswith("scale") else 0, spread, shape)
    params = path_rules.unflatten({n: v.astype(np.float32) for n, v in values.items()})
    return LoadedModel(
        params=params, config=config.model, preprocess=preprocess, eval_prompts="none", step=0
    )


def images() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    sizes = [(64, 64), (90, 150), (40, 31)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), np.uint8)) for s in sizes]


def assert_found_alike(
    folder: Path, predictor: Predictor, pictures: list[Image.Image], queries: list[str]
) -> None:
    """Boxes within half a pixel and scores within 1e-3, one for one."""
    pipeline = transformers.pipeline("zero-shot-object-detection", model=str(folder))
    threshold = 1e-3
    for picture in pictures:
        theirs = pipeline(picture, candidate_labels=queries, threshold=threshold)
        # They return boxes in the padding as well; ours are those that show some of the image.
        sides = {"xmin": picture.width, "ymin": picture.height}
        theirs = [d for d in theirs if all(d["box"][key] < side for key, side in sides.items())]
        (ours,) = predictor.detect(
            [picture], queries, threshold=threshold, top_k=10**6, prompt_mode="none"
        )
        assert len(theirs) == len(ours) > 0.5 * len(queries) * 16
        spread = [np.ptp(ours.scores[ours.labels == i]) for i in range(len(queries))]
        assert max(spread) > 0.01, "the scores say nothing"
        assert not _unmatched(theirs, ours, picture, queries)


def _unmatched(
    theirs: list[dict], ours: Detections, picture: Image.Image, queries: list[str]
) -> list[int]:
    sides = np.array([picture.width, picture.height] * 2)
    boxes = np.array([[d["box"][k] for k in ("xmin", "ymin", "xmax", "ymax")] for d in theirs])
    boxes = np.clip(boxes, 0, sides)
    scores = np.array([d["score"] for d in theirs])
    labels = np.array([queries.index(d["label"]) for d in theirs])
    # Theirs are cut to whole pixels: ours lie up to one above, and half of one either way.
    ours_of = ours.boxes[:, None]
    fits = ((ours_of >= boxes - 0.5) & (ours_of <= boxes + 1.5)).all(-1)
    fits &= np.abs(ours.scores[:, None] - scores) <= 1e-3
    fits &= ours.labels[:, None] == labels
    # Boxes of equal score may lie close together: one for one, as well as it can be done.
    rows, columns = optimize.linear_sum_assignment(~fits)
    return sorted(set(range(len(ours))) - set(rows[fits[rows, columns]].tolist()))


@pytest.mark.parametrize("has_objectness_head", [True, False])
@pytest.mark.parametrize("geometry", ["pad", "stretch"])
def test_pipeline_finds_what_the_predictor_finds(
    geometry: str, has_objectness_head: bool, tmp_path: Path
) -> None:
    preprocess = {
        "pad": PreprocessConfig(geometry="pad", resize="gaussian", pad_value=0.0),
        "stretch": PreprocessConfig(geometry="stretch", resize="bilinear"),
    }[geometry]
    model = random_model(preprocess, has_objectness_head=has_objectness_head)
    save_model(tmp_path / "ours", model)
    formats.convert(str(tmp_path / "ours"), tmp_path / "hf", "owl_det", "hf")
    predictor = Predictor.load(tmp_path / "ours")
    assert_found_alike(tmp_path / "hf", predictor, images(), QUERIES)


def test_tokeniser_files_give_our_ids(tmp_path: Path) -> None:
    from data_pipelines.tokenizer import ClipTokenizer
    from owl_det.convert import clip_vocabulary

    (tmp_path / "config.json").write_text('{"model_type": "owlv2"}')
    clip_vocabulary.write(tmp_path, max_length=16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*QUERIES, "", "don't stop", "naïve café", "猫 🐈", "word " * 40, "tab\tand\nline"]
    ids = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    for theirs_of_text, ours in zip(ids, ClipTokenizer(16).encode_all(texts), strict=True):
        padded = np.where(np.arange(16) > ours.argmax(), clip_vocabulary.END, ours)
        np.testing.assert_array_equal(theirs_of_text, padded)
