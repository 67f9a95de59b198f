"""The tensors of transformers' OWL classes: names, shapes, and where each goes."""

import numpy as np

from owl_det.config import ModelConfig, TextTowerConfig, VitConfig
from owl_det.convert import rules
from owl_det.convert.rules import ALL, LAYER, Ignored, Layout, Rule, Table

LOGIT_SCALE = 2.6592  # initial value of CLIP's ln(1 / temperature)


def table(kind: str, is_contrastive: bool = False) -> Table:
    """Where each tensor of "owlvit" or "owlv2" goes.

    `is_contrastive`: with the scale and the projection that only contrastive training uses.
    """
    vision, text = f"{kind}.vision_model", f"{kind}.text_model"
    entries: list[Rule] = [
        Rule(f"{vision}.embeddings.class_embedding", "image/class_embedding"),
        Rule(f"{vision}.embeddings.patch_embedding.weight", "image/patch_kernel", layout="conv"),
        Rule(f"{vision}.embeddings.position_embedding.weight", "image/position_embedding"),
        *_norm(f"{vision}.pre_layernorm", "image/norm_pre"),
        *_blocks(vision, "image"),
        *_norm(f"{vision}.post_layernorm", "image/norm_post"),
        Rule(f"{text}.embeddings.token_embedding.weight", "text/token_embedding"),
        Rule(f"{text}.embeddings.position_embedding.weight", "text/position_embedding"),
        *_blocks(text, "text"),
        *_norm(f"{text}.final_layer_norm", "text/norm_final"),
        Rule(f"{kind}.text_projection.weight", "text/projection/kernel", layout="linear"),
        *_norm("layer_norm", "merge_norm"),
        *_linear("class_head.dense0", "class_head/embedding"),
        *_linear("class_head.logit_shift", "class_head/logit_shift"),
        *_linear("class_head.logit_scale", "class_head/logit_scale"),
    ]
    heads = ("box_head", "objectness_head") if kind == "owlv2" else ("box_head",)
    for head in heads:
        for i in range(3):
            entries += _linear(f"{head}.dense{i}", f"{head}/dense_{i}")
    if is_contrastive:
        projection = f"{kind}.visual_projection.weight"
        entries += [
            Rule(projection, "image/visual_projection/kernel", layout="linear"),
            Rule(f"{kind}.logit_scale", "logit_scale"),
        ]
    return Table(
        rules=tuple(entries),
        ignored=(
            Ignored(
                rf"{kind}\.(visual_projection\.weight|logit_scale)",
                "for contrastive training, and incomplete or never trained",
            ),
            Ignored(r".*\.position_ids|box_bias", "constants that older versions saved"),
        ),
    )


def _norm(theirs: str, ours: str, index: rules.Index = ()) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/norm/scale", index),
        Rule(f"{theirs}.bias", f"{ours}/norm/bias", index),
    ]


def _linear(theirs: str, ours: str, index: rules.Index = ()) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", index, "linear"),
        Rule(f"{theirs}.bias", f"{ours}/bias", index),
    ]


def _blocks(theirs: str, ours: str) -> list[Rule]:
    layer, blocks = f"{theirs}.encoder.layers.{LAYER}", f"{ours}/transformer/blocks"
    entries: list[Rule] = []
    for i, name in enumerate("qkv"):
        attention: list[tuple[str, str, rules.Index, Layout]] = [
            ("weight", "kernel", (LAYER, ALL, i), "linear"),
            ("bias", "bias", (LAYER, i), "flat"),
        ]
        entries += [
            Rule(f"{layer}.self_attn.{name}_proj.{theirs}", f"{blocks}/qkv/{ours}", index, layout)
            for theirs, ours, index, layout in attention
        ]
    return [
        *_norm(f"{layer}.layer_norm1", f"{blocks}/norm_1", (LAYER,)),
        *entries,
        *_linear(f"{layer}.self_attn.out_proj", f"{blocks}/out", (LAYER,)),
        *_norm(f"{layer}.layer_norm2", f"{blocks}/norm_2", (LAYER,)),
        *_linear(f"{layer}.mlp.fc1", f"{blocks}/mlp_in", (LAYER,)),
        *_linear(f"{layer}.mlp.fc2", f"{blocks}/mlp_out", (LAYER,)),
    ]


def tensor_shapes(kind: str, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the class of `kind` has."""
    image, text = model.vit, model.text
    vision_model, text_model = f"{kind}.vision_model", f"{kind}.text_model"
    patch, num_patches = image.patch_size, model.grid_side**2
    return {
        f"{vision_model}.embeddings.class_embedding": (image.width,),
        f"{vision_model}.embeddings.patch_embedding.weight": (image.width, 3, patch, patch),
        f"{vision_model}.embeddings.position_embedding.weight": (1 + num_patches, image.width),
        f"{text_model}.embeddings.token_embedding.weight": (text.vocabulary_size, text.width),
        f"{text_model}.embeddings.position_embedding.weight": (text.num_positions, text.width),
        f"{kind}.text_projection.weight": (model.embedding_dim, text.width),
        f"{kind}.visual_projection.weight": (model.embedding_dim, image.width),
        f"{kind}.logit_scale": (),
        **_with_bias(f"{vision_model}.pre_layernorm", image.width),
        **_layer_shapes(f"{vision_model}.encoder.layers", image),
        **_with_bias(f"{vision_model}.post_layernorm", image.width),
        **_layer_shapes(f"{text_model}.encoder.layers", text),
        **_with_bias(f"{text_model}.final_layer_norm", text.width),
        **_with_bias("layer_norm", image.width),
        **_head_shapes(model),
    }


def _layer_shapes(layers: str, tower: VitConfig | TextTowerConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(tower.num_layers):
        layer = f"{layers}.{i}"
        shapes |= _with_bias(f"{layer}.layer_norm1", tower.width)
        shapes |= _with_bias(f"{layer}.layer_norm2", tower.width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _with_bias(f"{layer}.self_attn.{part}", tower.width, tower.width)
        shapes |= _with_bias(f"{layer}.mlp.fc1", tower.mlp_width, tower.width)
        shapes |= _with_bias(f"{layer}.mlp.fc2", tower.width, tower.mlp_width)
    return shapes


def _head_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = model.image.width
    shapes = {
        **_with_bias("class_head.dense0", model.embedding_dim, width),
        **_with_bias("class_head.logit_shift", 1, width),
        **_with_bias("class_head.logit_scale", 1, width),
    }
    outputs = {"box_head": 4, "objectness_head": 1}
    if not model.has_objectness_head:
        del outputs["objectness_head"]
    for head, num_outputs in outputs.items():
        for i, rows in enumerate((width, width, num_outputs)):
            shapes |= _with_bias(f"{head}.dense{i}", rows, width)
    return shapes


def _with_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A matrix with one bias a row, or the scales and biases of a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def initial_contrastive(kind: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What only contrastive training uses, as their class initialises it; always the same.

    `shape` is the projection's: [embedding_dim, image.width].
    """
    values = np.random.default_rng(0).normal(scale=max(shape[1], 1) ** -0.5, size=shape)
    return {
        f"{kind}.visual_projection.weight": values.astype(np.float32),
        f"{kind}.logit_scale": np.array(LOGIT_SCALE, np.float32),
    }
