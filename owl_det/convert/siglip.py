"""SigLIP, and SigLIP 2 of fixed resolution: Hugging Face's `SiglipModel`.

The NaFlex variants of SigLIP 2 (`Siglip2Model`, any aspect ratio) are another architecture and are
refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.tokenizer import FILES
from owl_det.convert import towers
from owl_det.convert.hub import find_folder
from owl_det.convert.rules import Ignored, Rule, Table
from owl_det.convert.weights import Weights, open_weights, read_json
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

PREPROCESS = {"resize": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_FILES = ["*.json", "spiece.model", "model*.safetensors"]
_HEAD, _MAP = "vision_model.head", "image/map_head"

TABLE = Table(
    rules=(
        Rule(
            "vision_model.embeddings.patch_embedding.weight",
            "image/patch_kernel",
            layout="conv",
        ),
        Rule("vision_model.embeddings.patch_embedding.bias", "image/patch_bias"),
        Rule("vision_model.embeddings.position_embedding.weight", "image/position_embedding"),
        *towers.huggingface_layers("vision_model.encoder.layers", "image"),
        *towers.norm("vision_model.post_layernorm", "image/norm_post"),
        Rule(f"{_HEAD}.probe", f"{_MAP}/probe"),
        Rule(f"{_HEAD}.attention.in_proj_weight", f"{_MAP}/qkv/kernel", layout="linear"),
        Rule(f"{_HEAD}.attention.in_proj_bias", f"{_MAP}/qkv/bias", layout="flat"),
        *towers.linear(f"{_HEAD}.attention.out_proj", f"{_MAP}/out"),
        *towers.norm(f"{_HEAD}.layernorm", f"{_MAP}/norm"),
        *towers.linear(f"{_HEAD}.mlp.fc1", f"{_MAP}/mlp_in"),
        *towers.linear(f"{_HEAD}.mlp.fc2", f"{_MAP}/mlp_out"),
        Rule("text_model.embeddings.token_embedding.weight", "text/token_embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "text/position_embedding"),
        *towers.huggingface_layers("text_model.encoder.layers", "text"),
        *towers.norm("text_model.final_layer_norm", "text/norm_final"),
        *towers.linear("text_model.head", "text/projection"),
        Rule("logit_scale", "logit_scale", layout="flat"),
        Rule("logit_bias", "logit_bias", layout="flat"),
    ),
    ignored=(Ignored(r".*\.position_ids", "numbers of the positions"),),
)


def read(source: str) -> LoadedModel:
    """Towers from a folder of Hugging Face's, or from the hub if `source` is `owner/name`.

    A spiece.model makes it a SigLIP, else a tokenizer.json a SigLIP 2. Raises `CheckpointError` as
    `load` and `open_weights` do.
    """
    folder = find_folder(source, _FILES)
    return load(
        open_weights(folder),
        read_json(folder / "config.json"),
        read_json(folder / "preprocessor_config.json"),
        towers.find_tokenizer(folder, FILES["siglip"], FILES["siglip2"]),
    )


def load(
    weights: Weights,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    tokenizer: str,
) -> LoadedModel:
    """Towers of a `SiglipModel`; `config` is its config.json, `processor` its preprocessor_config.

    `tokenizer` is its spiece.model (SigLIP) or tokenizer.json (SigLIP 2), which tells the two
    apart. Raises `CheckpointError`, naming what is missing, unknown or does not fit.
    """
    if config.get("model_type") != "siglip":
        raise CheckpointError(
            f"{weights.source}: model_type is {config.get('model_type')!r}, not 'siglip'; of "
            "SigLIP 2 only the models of fixed resolution are supported, not NaFlex"
        )
    model = towers.huggingface_model(
        weights,
        config,
        num_class_tokens=0,
        activation="gelu_pytorch_tanh",
        epsilon=1e-6,
        text_heads=12,
    )
    model |= {
        "embedding_dim": towers.shape_of(weights, "text_model.head.weight", 2)[0],
        "contrastive": "sigmoid",
    }
    model["image"] |= {
        "pooling": "map",
        "pre_norm": False,
        "patch_bias": True,
        "projection": "none",
    }
    model["text"] |= {
        "tokenizer": tokenizer_kind(tokenizer),
        "is_causal": False,
        "pooling": "last",
        "projection_bias": True,
    }
    return towers.load(
        weights,
        TABLE,
        kind="towers",
        model=model,
        preprocess=towers.preprocess_of(weights.source, processor, PREPROCESS),
        tokenizer=tokenizer,
    )


def tokenizer_kind(file: str) -> str:
    """ "siglip" or "siglip2" by the name of the file. Raises `CheckpointError` for another name."""
    for kind in ("siglip", "siglip2"):
        if Path(file).name == FILES[kind]:
            return kind
    raise CheckpointError(
        f"{file or 'tokenizer'}: SigLIP needs its {FILES['siglip']}, SigLIP 2 its "
        f"{FILES['siglip2']}"
    )
