"""How far our numbers are from transformers' for a detector of full size, in float32.

    python -m benchmarks.parity                          # OWLv2 B/16 at 960 pixels, random weights
    python -m benchmarks.parity --folder DIR             # a downloaded model
    python -m benchmarks.parity --image_size 480 --kind owlvit

Prints one JSON object with the largest absolute difference of each output. Needs the extra
[parity]. Without a folder every tensor is random, none of them zero or one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from data_pipelines.tokenizer import ClipTokenizer
from owl_det.convert import huggingface
from owl_det.errors import ConfigError
from owl_det.modeling.build import call, detector_of
from owl_det.types import Features, Predictions

TEXTS = ["cat", "a photo of a dog", "red circle", "the left wheel of a bicycle"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the differences. Returns 2, with one line on stderr, if nothing can be compared."""
    parser = command.parser(__doc__)
    parser.add_argument("--folder", default="", help="a model of transformers; default: random")
    parser.add_argument(
        "--kind", choices=("owlvit", "owlv2"), default="owlv2", help="of the random model"
    )
    parser.add_argument("--image_size", type=int, default=960, help="of the random model, pixels")
    parser.add_argument("--patch_size", type=int, default=16, help="of the random model, pixels")
    arguments = parser.parse_args(argv)
    return command.exit_code("parity", lambda: print(json.dumps(run(arguments))))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `compare` finds. Raises `UserError` without the extra, or for sizes that cannot be."""
    command.require("parity", "torch", "transformers")
    if arguments.folder:
        return compare(Path(arguments.folder))
    size, patch = arguments.image_size, arguments.patch_size
    if min(size, patch) < 1 or size % patch:
        raise ConfigError(f"--image_size: {size} is no multiple of --patch_size {patch}")
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), arguments.kind, size, patch)
        return compare(Path(folder))


def save_random(folder: Path, kind: str, image_size: int, patch_size: int) -> None:
    """A base model whose tensors are all drawn from distributions of their own."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    name = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[kind]
    vision = {"image_size": image_size, "patch_size": patch_size}
    config = getattr(transformers, f"{name}Config")(vision_config=vision)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            is_matrix = parameter.ndim > 1
            spread = rng.uniform(0.7, 1.4) * (parameter[0].numel() ** -0.5 if is_matrix else 0.3)
            values = rng.standard_normal(tuple(parameter.shape), np.float32) * np.float32(spread)
            parameter.copy_(torch.from_numpy(np.asarray(values + (0 if is_matrix else 0.5))))
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    getattr(transformers, f"{name}ImageProcessorPil")(size=size).save_pretrained(folder)


def compare(folder: Path) -> dict[str, Any]:
    """Largest absolute differences, the spread of the outputs, and seconds of one image."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    ours = huggingface.read(str(folder))
    side = ours.config.image_size
    pixels = np.random.default_rng(1).integers(0, 256, (1, side, side, 3), np.uint8)
    tokens = ClipTokenizer(ours.config.text.num_positions).encode_all(TEXTS)
    start = time.monotonic()
    found = _ours(ours, pixels, tokens)
    our_seconds = time.monotonic() - start

    kind = "owlv2" if ours.config.has_objectness_head else "owlvit"
    name = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[kind]
    model = getattr(transformers, f"{name}ForObjectDetection").from_pretrained(folder).eval()
    mean, std = np.array(ours.preprocess.mean), np.array(ours.preprocess.std)
    values = torch.tensor(((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2))
    ids = torch.tensor(tokens.astype(np.int64))
    mask = torch.tensor((np.arange(tokens.shape[1]) <= tokens.argmax(-1)[:, None]).astype(np.int64))
    start = time.monotonic()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=values)
        text = getattr(model, kind).get_text_features(ids, attention_mask=mask).pooler_output
    seconds = time.monotonic() - start
    theirs = {
        "class_logits": out.logits,
        "boxes": out.pred_boxes,
        "image_features": out.image_embeds.flatten(1, 2),
        "text_embeddings": text,
    }
    if kind == "owlv2":
        theirs["objectness_logits"] = out.objectness_logits
    return {
        "model": name,
        "image_size": side,
        "patch_size": ours.config.vit.patch_size,
        "max_abs_difference": {
            key: float(np.abs(value.numpy() - found[key]).max()) for key, value in theirs.items()
        },
        "standard_deviation": {key: float(value.std()) for key, value in theirs.items()},
        "seconds": {"owl_det_with_compilation": our_seconds, "transformers": seconds},
    }


def _ours(model: Any, pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    detector = detector_of(model.config, model.preprocess)

    @jax.jit
    def forward(params: Any) -> tuple[Features, Any, Predictions]:
        text = call(detector.encode_text, params, jnp.asarray(tokens))
        features = call(detector.encode_image, params, jnp.asarray(pixels))
        is_query = jnp.ones((1, len(tokens)), bool)
        out = call(detector.predict, params, features, text[None], is_query)
        return features, text, out

    features, text, out = jax.tree.map(np.asarray, forward(model.params))
    return {
        "class_logits": out.class_logits,
        "boxes": out.boxes,
        "image_features": features.tokens,
        "text_embeddings": text,
        "objectness_logits": out.objectness_logits,
    }


if __name__ == "__main__":
    sys.exit(main())
