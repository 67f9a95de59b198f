"""A folder as transformers writes detectors, with drawn weights; needs no transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, TEXT_WIDTH, SIDE, PATCH, POSITIONS, LAYERS = 32, 16, 32, 8, 8, 2


def tensors(kind: str = "owlv2", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of `OwlViTForObjectDetection` or `Owlv2ForObjectDetection`, by name."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        found[name] = rng.normal(scale=0.3, size=shape).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    for tower, width in (("vision", WIDTH), ("text", TEXT_WIDTH)):
        for i in range(LAYERS):
            layer = f"{kind}.{tower}_model.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.self_attn.{name}", width, width)
            linear(f"{layer}.mlp.fc1", 2 * width, width)
            linear(f"{layer}.mlp.fc2", width, 2 * width)
            norm(f"{layer}.layer_norm1", width)
            norm(f"{layer}.layer_norm2", width)
    vision, text = f"{kind}.vision_model", f"{kind}.text_model"
    add(f"{vision}.embeddings.class_embedding", WIDTH)
    add(f"{vision}.embeddings.patch_embedding.weight", WIDTH, 3, PATCH, PATCH)
    add(f"{vision}.embeddings.position_embedding.weight", 1 + (SIDE // PATCH) ** 2, WIDTH)
    norm(f"{vision}.pre_layernorm", WIDTH)
    norm(f"{vision}.post_layernorm", WIDTH)
    add(f"{text}.embeddings.token_embedding.weight", 49408, TEXT_WIDTH)
    add(f"{text}.embeddings.position_embedding.weight", POSITIONS, TEXT_WIDTH)
    norm(f"{text}.final_layer_norm", TEXT_WIDTH)
    add(f"{kind}.text_projection.weight", TEXT_WIDTH, TEXT_WIDTH)
    add(f"{kind}.visual_projection.weight", TEXT_WIDTH, WIDTH)
    add(f"{kind}.logit_scale")
    norm("layer_norm", WIDTH)
    linear("class_head.dense0", TEXT_WIDTH, WIDTH)
    linear("class_head.logit_shift", 1, WIDTH)
    linear("class_head.logit_scale", 1, WIDTH)
    for head, outputs in (("box_head", 4), ("objectness_head", 1)):
        if head == "box_head" or kind == "owlv2":
            for i, rows in enumerate((WIDTH, WIDTH, outputs)):
                linear(f"{head}.dense{i}", rows, WIDTH)
    return {name: np.asarray(value) for name, value in found.items()}


def config(kind: str = "owlv2") -> dict[str, Any]:
    """Its config.json."""
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_attention_heads": 2,
    }
    return {
        "model_type": kind,
        "projection_dim": TEXT_WIDTH,
        "vision_config": {
            **vision,
            "num_hidden_layers": LAYERS,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        "text_config": {
            **text,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": POSITIONS,
        },
    }


def processor(kind: str = "owlv2") -> dict[str, Any]:
    """Its preprocessor_config.json."""
    name = {"owlvit": "OwlViTImageProcessor", "owlv2": "Owlv2ImageProcessor"}[kind]
    return {"image_processor_type": name, "size": {"height": SIDE, "width": SIDE}}


def write(
    folder: Path,
    kind: str = "owlv2",
    weights: dict[str, np.ndarray] | None = None,
    *,
    changed: dict[str, Any] | None = None,
    changed_processor: dict[str, Any] | None = None,
) -> Path:
    """Writes the folder, with these weights and changed keys of the two configs."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(kind) if weights is None else weights, folder / "model.safetensors")
    described = config(kind) | (changed or {})
    (folder / "config.json").write_text(json.dumps(described))
    pixels = processor(kind) | (changed_processor or {})
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder
