"""Hugging Face's detectors against ours: numbers, round trips, mutations, the pipeline."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.tokenizer import ClipTokenizer
from owl_det import path_rules
from owl_det.checkpoints.load import load_model
from owl_det.config import PreprocessConfig
from owl_det.convert import formats, huggingface, huggingface_parameters, rules
from owl_det.errors import CheckpointError
from owl_det.modeling.owl import OwlDetector
from owl_det.types import LoadedModel
from tests import tiny

torch = pytest.importorskip("torch", reason="parity needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra [parity]")

# transformers and torch warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

CLASSES = {
    "owlvit": (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection),
    "owlv2": (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection),
}
TEXTS = ["cat", "a photo of a dog", "red circle"]


def randomise(model: Any, seed: int = 0) -> None:
    """Every tensor from a distribution of its own, none of them degenerate."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        shape = tuple(parameter.shape)
        fan_in = shape[-1] if len(shape) > 1 else 4
        scale = rng.uniform(0.7, 1.4) / np.sqrt(fan_in) if len(shape) > 1 else 0.3
        values = rng.normal(rng.uniform(-0.05, 0.05), scale, shape) + (len(shape) == 1) * 0.5
        with torch.no_grad():
            parameter.copy_(torch.tensor(values.astype(np.float32)))


def make_theirs(kind: str, **vision: Any) -> Any:
    config_class, model_class = CLASSES[kind]
    text = dict(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    image = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config = config_class(text_config=text, vision_config=image | vision, projection_dim=16)
    model = model_class(config).eval()
    randomise(model)
    return model


def save(model: Any, folder: Path, kind: str, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    name = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[kind]
    processor = getattr(transformers, f"{name}ImageProcessorPil")
    side = model.config.vision_config.image_size
    processor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, their model, its folder)"""
    model = make_theirs(request.param)
    folder = save(model, tmp_path_factory.mktemp("hf") / request.param, request.param)
    return request.param, model, folder


def inputs(side: int, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(1).integers(0, 256, (1, side, side, 3), np.uint8)
    return pixels, ClipTokenizer(num_positions).encode_all(TEXTS)


def their_outputs(model: Any, pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    mean, std = np.array(PreprocessConfig().mean), np.array(PreprocessConfig().std)
    values = ((pixels / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    ids = torch.tensor(tokens.astype(np.int64))
    # The attention mask ends after the end token, as their tokeniser makes it.
    length = tokens.argmax(-1)[:, None]
    mask = torch.tensor((np.arange(tokens.shape[1])[None] <= length).astype(np.int64))
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=torch.tensor(values))
        tower = getattr(model, model.config.model_type)
        text = tower.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    found = {
        "class_logits": out.logits,
        "boxes": out.pred_boxes,
        "features": out.image_embeds.flatten(1, 2),
        "text": text,
    }
    if model.config.model_type == "owlv2":
        found["objectness_logits"] = out.objectness_logits
    return {name: value.numpy() for name, value in found.items()}


def our_outputs(model: LoadedModel, pixels: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    return jax.tree.map(np.asarray, _forward(model)(model.params, pixels, tokens))


_COMPILED: dict[Any, Any] = {}


def _forward(model: LoadedModel) -> Any:
    """Compiled once for each architecture."""
    key = (model.config, model.preprocess)
    if key not in _COMPILED:
        detector = OwlDetector(model.config, model.preprocess)

        def forward(params: Any, pixels: Any, tokens: Any) -> dict[str, Any]:
            variables = {"params": params}
            text = detector.apply(variables, tokens, method="encode_text")
            features: Any = detector.apply(variables, pixels, method="encode_image")
            is_query = jnp.ones((1, len(TEXTS)), bool)
            out: Any = detector.apply(
                variables, features, jnp.asarray(text)[None], is_query, method="predict"
            )
            return {
                "class_logits": out.class_logits,
                "boxes": out.boxes,
                "objectness_logits": out.objectness_logits,
                "features": features.tokens,
                "text": text,
            }

        _COMPILED[key] = jax.jit(forward)
    return _COMPILED[key]


def differences(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.abs(value - ours[name]).max()) for name, value in theirs.items()}


LIMITS = {
    "class_logits": 2e-4,
    "boxes": 1e-5,
    "objectness_logits": 2e-4,
    "features": 2e-4,
    "text": 2e-4,
}


def test_numbers_agree(pair: Any) -> None:
    kind, theirs, folder = pair
    ours = huggingface.read(str(folder))
    pixels, tokens = inputs(32, 8)
    expected = their_outputs(theirs, pixels, tokens)
    assert ("objectness_logits" in expected) == (kind == "owlv2")
    for name, difference in differences(expected, our_outputs(ours, pixels, tokens)).items():
        assert difference <= LIMITS[name], name
        assert np.ptp(expected[name]) > 100 * LIMITS[name], f"{name} says nothing"


@pytest.mark.parametrize("place", ["image", "text", "heads"])
def test_swapped_tensors_are_found(pair: Any, place: str) -> None:
    """Any two tensors of the same shape, swapped within a layer, a tower or the heads, show."""
    kind, theirs, folder = pair
    ours = huggingface.read(str(folder))
    pixels, tokens = inputs(32, 8)
    expected = their_outputs(theirs, pixels, tokens)
    parameters = path_rules.flatten(ours.params)
    shapes = huggingface_parameters.tensor_shapes(kind, ours.config)
    table = huggingface_parameters.table(kind, is_contrastive=True)
    tensors = rules.to_theirs(table, parameters, shapes)
    chosen = [name for name in sorted(tensors) if _place(name) == place]
    swapped = [
        (a, b) for a, b in itertools.combinations(chosen, 2) if tensors[a].shape == tensors[b].shape
    ]
    assert len(swapped) >= 9
    for a, b in swapped:
        mutated = {**tensors, a: tensors[b], b: tensors[a]}
        weights = rules.Weights(
            "mutated",
            {name: value.shape for name, value in mutated.items()},
            dict.fromkeys(mutated, "float32"),
            mutated.__getitem__,
        )
        params = path_rules.unflatten(
            rules.to_ours(table, weights, {n: v.shape for n, v in parameters.items()})
        )
        found = our_outputs(dataclasses.replace(ours, params=params), pixels, tokens)
        apart = differences(expected, found)
        assert any(apart[name] > 2 * LIMITS[name] for name in apart), (a, b)


def _place(name: str) -> str:
    if "vision_model" in name:
        # One layer and what surrounds the layers.
        return "image" if "layers." not in name or "layers.1." in name else "other"
    if "text_model" in name or "text_projection" in name:
        return "text" if "layers." not in name or "layers.1." in name else "other"
    return "heads"


def test_round_trip_is_exact(pair: Any, tmp_path: Path) -> None:
    kind, theirs, folder = pair
    there = tmp_path / "ours"
    formats.convert(str(folder), there, "hf", "owl_det")
    formats.convert(str(there), tmp_path / "back", "owl_det", "hf")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert set(before) == set(after)
    for name, value in before.items():
        assert after[name].dtype == np.float32 and after[name].shape == value.shape
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    reloaded = CLASSES[kind][1].from_pretrained(tmp_path / "back").eval()
    pixels, tokens = inputs(32, 8)
    expected = their_outputs(theirs, pixels, tokens)
    for name, difference in differences(expected, their_outputs(reloaded, pixels, tokens)).items():
        assert difference <= 1e-6, name
    run = json.loads((there / "run" / "metadata").read_text())
    assert run["origin"] == {"format": "hf", "source": str(folder)}
    loaded = load_model(there)
    geometry = "stretch" if kind == "owlvit" else "pad"
    assert loaded.preprocess.geometry == geometry
    assert loaded.config.has_objectness_head == (kind == "owlv2")


def test_shards_and_half_precision(pair: Any, tmp_path: Path) -> None:
    kind, theirs, folder = pair
    save(theirs, tmp_path / "shards", kind, max_shard_size="200KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    whole = path_rules.flatten(huggingface.read(str(folder)).params)
    from_shards = huggingface.read(str(tmp_path / "shards")).params
    for name, value in path_rules.flatten(from_shards).items():
        np.testing.assert_array_equal(value, whole[name])
    half = save(theirs, tmp_path / "half", kind)
    tensors = load_file(half / "model.safetensors")
    save_file({n: v.astype(np.float16) for n, v in tensors.items()}, half / "model.safetensors")
    for name, value in path_rules.flatten(huggingface.read(str(half)).params).items():
        np.testing.assert_array_equal(value, whole[name].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "clip"}, "model_type 'clip' is not one of owlvit, owlv2"),
        ("config.json", {"vision_config": {"num_channels": 1}}, "num_channels is 1"),
        ("config.json", {"vision_config": {"hidden_act": "relu"}}, "hidden_act"),
        ("config.json", {"text_config": {"layer_norm_eps": 1e-3}}, "layer_norm_eps of text_config"),
        ("config.json", {"vision_config": {"patch_size": 16}}, "does not fit image/p"),
        ("config.json", {"vision_config": {"image_size": 33}}, "not a multiple of the patch size"),
        ("config.json", {"vision_config": {"hidden_size": "big"}}, "expected int, got str 'big'"),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**6}}, "layers are described"),
        ("config.json", {"vision_config": {"num_hidden_layers": 2}}, "unknown tensor .*layers.2"),
        ("config.json", {"vision_config": {"num_attention_heads": 0}}, "must be positive"),
        ("config.json", {"vision_config": {"patch_size": -8}}, "must be positive"),
        ("config.json", {"vision_config": {"image_size": 8 * 10**7}}, "absurdly large"),
        ("config.json", {"text_config": {"hidden_size": 2**40}}, "absurdly large"),
        ("config.json", {"text_config": {"hidden_size": 2**20}}, "does not fit"),
        ("preprocessor_config.json", {"size": {"height": 31, "width": 32}}, "size .* 32 pixels"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale must be true"),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, "is not 1/255"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean: expected three numbers"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    pair: Any, file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for path in pair[2].iterdir():
        (tmp_path / path.name).symlink_to(path)
    values = json.loads((pair[2] / file).read_text())
    for key, value in change.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        huggingface.read(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__box_bias": "location"}, "model.box_bias: location"),
        ({"model__image__last_block": "values"}, "model.image.last_block: values"),
    ],
)
def test_what_transformers_cannot_be_is_not_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tiny.config(**changes)
    model = LoadedModel(
        params={},
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=0,
    )
    with pytest.raises(CheckpointError, match=message):
        huggingface.write(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
