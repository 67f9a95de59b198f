"""LiT and SigLIP as big_vision stores them: one `.npz` with the towers `img` and `txt`.

The text tower must be big_vision's `text_transformer` (LiT-L16S, LiT-L16Ti, SigLIP); those with a
BERT text tower (LiT-B16B, LiT-L16L) are another architecture and are refused.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines.tokenizer import FILES
from owl_det.convert import towers
from owl_det.convert.rules import ALL, LAYER, Index, Rule, Table
from owl_det.convert.siglip import PREPROCESS, tokenizer_kind
from owl_det.convert.weights import Weights, open_weights
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

_ATTENTION = "MultiHeadDotProductAttention_0"
# How older files call the image positions; the class token's is the first of them.
_OLD_POSITIONS = ("img/Transformer/posembed_input/pos_embedding", "img/Transformer/pos_embedding")


def read(source: str) -> LoadedModel:
    """Towers from an `.npz` of big_vision, with the tokeniser's file in the same folder.

    Raises `CheckpointError` as `load` and `open_weights` do.
    """
    folder = Path(source).parent
    return load(
        open_weights(source), towers.find_tokenizer(folder, FILES["siglip"], FILES["siglip2"])
    )


def load(weights: Weights, tokenizer: str) -> LoadedModel:
    """Towers of a file of big_vision; `tokenizer` is the spiece.model of its text tower.

    Names may begin with `params/`. Everything but the tokeniser is read off the tensors. Raises
    `CheckpointError`, naming what is missing, unknown or does not fit.
    """
    weights = _normalised(weights)
    if any(name.startswith("txt/") and "Bert" in name for name in weights.shapes):
        raise CheckpointError(f"{weights.source}: a BERT text tower is not supported")
    shapes = weights.shapes
    has_class_token = "img/cls" in shapes
    has_head, has_bias = "img/head/kernel" in shapes, "b" in shapes
    patch, _, _, width = towers.shape_of(weights, "img/embedding/kernel", 4)
    positions = towers.shape_of(weights, "img/pos_embedding", 2)[0]
    vocabulary, text_width = towers.shape_of(weights, "txt/Embed_0/embedding", 2)
    model = {
        "image_size": towers.grid_side(weights, positions, has_class_token) * patch,
        "embedding_dim": towers.shape_of(weights, "txt/head/kernel", 2)[1],
        "contrastive": "sigmoid" if has_bias else "softmax",
        "activation": "gelu_tanh",
        "norm_epsilon": 1e-6,
        "image": {
            "patch_size": patch,
            "width": width,
            "pooling": "class_token" if has_class_token else "map",
            "pre_norm": False,
            "patch_bias": True,
            "projection": "affine" if has_head else "none",
            **_layers(weights, "img/Transformer"),
        },
        "text": {
            "tokenizer": tokenizer_kind(tokenizer),
            "vocabulary_size": vocabulary,
            "num_positions": towers.shape_of(weights, "txt/pos_embedding", 2)[0],
            "width": text_width,
            "is_causal": False,
            "pooling": "last",
            "projection_bias": True,
            **_layers(weights, "txt/Encoder_0"),
        },
    }
    return towers.load(
        weights,
        _table(weights, has_class_token, has_head, has_bias),
        kind="towers",
        model=model,
        # LiT was trained with bilinear resizing to [-1, 1].
        preprocess=PREPROCESS | {"resize": "bilinear"},
        tokenizer=tokenizer,
    )


def _layers(weights: Weights, encoder: str) -> dict[str, int]:
    block, layer = _block(weights, encoder)
    is_stacked = layer == (ALL,)
    first = block.replace(LAYER, "0")
    query, fc1 = f"{first}/{_ATTENTION}/query/kernel", f"{first}/MlpBlock_0/Dense_0/kernel"
    query_shape = towers.shape_of(weights, query, 3 + is_stacked)
    return {
        "num_layers": (
            query_shape[0]
            if is_stacked
            else towers.num_layers(weights, query.replace(first, block))
        ),
        "num_heads": query_shape[-2],
        "mlp_width": towers.shape_of(weights, fc1, 2 + is_stacked)[-1],
    }


def _block(weights: Weights, encoder: str) -> tuple[str, Index]:
    """Name and index of the layers: one tensor each, or all stacked in one, as ours are."""
    if any(name.startswith(f"{encoder}/encoderblock/") for name in weights.shapes):
        return f"{encoder}/encoderblock", (ALL,)
    return f"{encoder}/encoderblock_{LAYER}", (LAYER,)


def _table(weights: Weights, has_class_token: bool, has_head: bool, has_bias: bool) -> Table:
    rules = [
        Rule("img/embedding/kernel", "image/patch_kernel"),
        Rule("img/embedding/bias", "image/patch_bias"),
        Rule("img/pos_embedding", "image/position_embedding"),
        *_encoder(weights, "img/Transformer", "image"),
        *_norm("img/Transformer/encoder_norm", "image/norm_post"),
        Rule("txt/Embed_0/embedding", "text/token_embedding"),
        Rule("txt/pos_embedding", "text/position_embedding"),
        *_encoder(weights, "txt/Encoder_0", "text"),
        *_norm("txt/Encoder_0/encoder_norm", "text/norm_final"),
        *_dense("txt/head", "text/projection"),
        Rule("t", "logit_scale", layout="flat"),
    ]
    if has_class_token:
        rules.append(Rule("img/cls", "image/class_embedding"))
    else:
        rules += _map_head()
    if has_head:
        rules += _dense("img/head", "image/visual_projection")
    if has_bias:
        rules.append(Rule("b", "logit_bias", layout="flat"))
    return Table(tuple(rules))


def _encoder(weights: Weights, theirs: str, ours: str) -> list[Rule]:
    block, layer = _block(weights, theirs)
    blocks = f"{ours}/transformer/blocks"
    return [
        *_attention(f"{block}/{_ATTENTION}", blocks, layer),
        *_norm(f"{block}/LayerNorm_0", f"{blocks}/norm_1", layer),
        *_norm(f"{block}/LayerNorm_1", f"{blocks}/norm_2", layer),
        *_dense(f"{block}/MlpBlock_0/Dense_0", f"{blocks}/mlp_in", layer),
        *_dense(f"{block}/MlpBlock_0/Dense_1", f"{blocks}/mlp_out", layer),
    ]


def _map_head() -> list[Rule]:
    theirs, ours = "img/MAPHead_0", "image/map_head"
    return [
        Rule(f"{theirs}/probe", f"{ours}/probe"),
        *_attention(f"{theirs}/{_ATTENTION}", ours, ()),
        *_norm(f"{theirs}/LayerNorm_0", f"{ours}/norm"),
        *_dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}/mlp_in"),
        *_dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}/mlp_out"),
    ]


def _attention(theirs: str, ours: str, layer: Index) -> list[Rule]:
    rules = _dense(f"{theirs}/out", f"{ours}/out", layer)
    for number, name in enumerate(("query", "key", "value")):
        rules += [
            Rule(f"{theirs}/{name}/kernel", f"{ours}/qkv/kernel", (*layer, ALL, number)),
            Rule(f"{theirs}/{name}/bias", f"{ours}/qkv/bias", (*layer, number)),
        ]
    return rules


def _dense(theirs: str, ours: str, layer: Index = ()) -> list[Rule]:
    return [Rule(f"{theirs}/{name}", f"{ours}/{name}", layer) for name in ("kernel", "bias")]


def _norm(theirs: str, ours: str, layer: Index = ()) -> list[Rule]:
    return [Rule(f"{theirs}/{name}", f"{ours}/norm/{name}", layer) for name in ("scale", "bias")]


# --- one form for the files there are ------------------------------------------------------------


def _normalised(weights: Weights) -> Weights:
    """The tensors under today's names; class token and positions without axes of size 1.

    Positions of an image tower with a class token get one for it in front: zeros, unless the file
    holds one.
    """
    weights = weights.renamed(_todays_name)
    shapes = {name: _squeezed(name, shape) for name, shape in weights.shapes.items()}
    positions = shapes.get("img/pos_embedding", ())
    lacks_first = "img/cls" in shapes and len(positions) == 2 and _is_square(positions[0])
    if lacks_first:
        shapes["img/pos_embedding"] = (positions[0] + 1, positions[1])

    def read(name: str) -> np.ndarray:
        values = weights.read(name)
        if name == "img/pos_embedding" and lacks_first:
            first = np.zeros((1, positions[1]), np.float32)
            values = np.concatenate([first, values.reshape(positions)])
        return values.reshape(shapes[name])

    return replace(weights, shapes=shapes, read=read)


def _todays_name(name: str) -> str:
    name = name.removeprefix("params/")
    return "img/pos_embedding" if name in _OLD_POSITIONS else name


def _squeezed(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name in ("img/cls", "img/pos_embedding", "txt/pos_embedding"):
        return tuple(size for size in shape if size != 1)
    return shape


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number
