"""CLIP: Hugging Face's `CLIPModel` (vision transformers), and OpenAI's ResNet-50.

Both become checkpoints of their towers (docs/towers.md). OpenAI's own files are TorchScript
archives, which run code when they are read; `load_resnet` takes the same tensors, under the same
names, from a safetensors file.
"""

from collections.abc import Mapping
from typing import Any

from owl_det.convert import clip_vocabulary, towers
from owl_det.convert.hub import find_folder
from owl_det.convert.rules import ALL, LAYER, Ignored, Rule, Table
from owl_det.convert.weights import Weights, open_weights, read_json
from owl_det.types import LoadedModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESS = {"resize": "bicubic", "mean": MEAN, "std": STD}
_FILES = ["*.json", "model*.safetensors"]
_RESNET_STEM = 3  # convolutions

TABLE = Table(
    rules=(
        Rule("vision_model.embeddings.class_embedding", "image/class_embedding"),
        Rule(
            "vision_model.embeddings.patch_embedding.weight",
            "image/patch_kernel",
            layout="conv",
        ),
        Rule("vision_model.embeddings.position_embedding.weight", "image/position_embedding"),
        # The misspelling is theirs.
        *towers.norm("vision_model.pre_layrnorm", "image/norm_pre"),
        *towers.huggingface_layers("vision_model.encoder.layers", "image"),
        *towers.norm("vision_model.post_layernorm", "image/norm_post"),
        Rule("visual_projection.weight", "image/visual_projection/kernel", layout="linear"),
        Rule("text_model.embeddings.token_embedding.weight", "text/token_embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "text/position_embedding"),
        *towers.huggingface_layers("text_model.encoder.layers", "text"),
        *towers.norm("text_model.final_layer_norm", "text/norm_final"),
        Rule("text_projection.weight", "text/projection/kernel", layout="linear"),
        Rule("logit_scale", "logit_scale"),
    ),
    ignored=(Ignored(r".*\.position_ids", "numbers of the positions"),),
)


def read(source: str) -> LoadedModel:
    """Towers from a folder of Hugging Face's, or from the hub if `source` is `owner/name`.

    Raises `CheckpointError` as `load` and `open_weights` do.
    """
    folder = find_folder(source, _FILES)
    return load(
        open_weights(folder),
        read_json(folder / "config.json"),
        read_json(folder / "preprocessor_config.json"),
        clip_vocabulary.own_tokenizer(folder),
    )


def load(
    weights: Weights,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    tokenizer: str = "",
) -> LoadedModel:
    """Towers of a `CLIPModel`; `config` is its config.json, `processor` its preprocessor_config.

    `tokenizer` is its tokenizer.json; empty = the vocabulary that is built in. Raises
    `CheckpointError`, naming what is missing, unknown or does not fit.
    """
    model = towers.huggingface_model(
        weights,
        config,
        num_class_tokens=1,
        activation="quick_gelu",
        epsilon=1e-5,
        text_heads=8,
    )
    model |= {
        "embedding_dim": towers.shape_of(weights, "text_projection.weight", 2)[0],
        "contrastive": "softmax",
    }
    return towers.load(
        weights,
        TABLE,
        kind="towers",
        model=model,
        preprocess=towers.preprocess_of(weights.source, processor, PREPROCESS),
        tokenizer=tokenizer,
    )


# --- ResNet --------------------------------------------------------------------------------------


def read_resnet(source: str) -> LoadedModel:
    """CLIP's ResNet-50 from a safetensors file with OpenAI's names.

    Raises `CheckpointError` as `load_resnet` and `open_weights` do; OpenAI's own `.pt` is refused.
    """
    return load_resnet(open_weights(source))


def load_resnet(weights: Weights) -> LoadedModel:
    """OpenAI's CLIP ResNet-50 with its text tower, by the names of its state dict.

    The number of blocks of each stage is read off the names, so that RN101 fits too. Raises
    `CheckpointError`, naming what is missing, unknown or does not fit.
    """
    stages = [
        towers.num_layers(weights, f"visual.layer{stage}.{{i}}.conv1.weight")
        for stage in (1, 2, 3, 4)
    ]
    width = towers.shape_of(weights, "visual.layer1.0.conv1.weight", 4)[0]
    positions, _ = towers.shape_of(weights, "visual.attnpool.positional_embedding", 2)
    vocabulary, text_width = towers.shape_of(weights, "token_embedding.weight", 2)
    text_positions, _ = towers.shape_of(weights, "positional_embedding", 2)
    model = {
        "image_size": towers.grid_side(weights, positions, 1) * 32,
        "embedding_dim": towers.shape_of(weights, "text_projection", 2)[1],
        "contrastive": "softmax",
        # 64 channels a head, in both: the state dict does not hold their numbers.
        "image": {
            "kind": "resnet",
            "width": width,
            "num_blocks": stages,
            "num_heads": 32 * width // 64,
        },
        "text": {
            "vocabulary_size": vocabulary,
            "num_positions": text_positions,
            "width": text_width,
            "num_layers": towers.num_layers(weights, "transformer.resblocks.{i}.ln_1.weight"),
            "num_heads": text_width // 64,
            "mlp_width": towers.shape_of(weights, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        },
    }
    return towers.load(
        weights,
        _resnet_table(weights, stages),
        kind="towers",
        model=model,
        preprocess=PREPROCESS,
        tokenizer="",
    )


def _resnet_table(weights: Weights, stages: list[int]) -> Table:
    rules = []
    for i in range(_RESNET_STEM):
        rules += _conv_norm(f"visual.conv{i + 1}", f"visual.bn{i + 1}", f"image/stem_{i}")
    for stage, num_blocks in enumerate(stages):
        for block in range(num_blocks):
            theirs, ours = f"visual.layer{stage + 1}.{block}", f"image/blocks_{stage}_{block}"
            for i in (1, 2, 3):
                rules += _conv_norm(f"{theirs}.conv{i}", f"{theirs}.bn{i}", f"{ours}/conv_{i}")
            if f"{theirs}.downsample.0.weight" in weights.shapes:
                down = f"{theirs}.downsample"
                rules += _conv_norm(f"{down}.0", f"{down}.1", f"{ours}/shortcut")
    pool = "visual.attnpool"
    rules.append(Rule(f"{pool}.positional_embedding", "image/pool/position_embedding"))
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += [
            Rule(f"{pool}.{theirs}_proj.weight", f"image/pool/{ours}/kernel", layout="linear"),
            Rule(f"{pool}.{theirs}_proj.bias", f"image/pool/{ours}/bias", layout="flat"),
        ]
    rules += towers.linear(f"{pool}.c_proj", "image/pool/out")
    return Table(
        rules=(*rules, *_openai_text()),
        ignored=(
            Ignored(r".*\.num_batches_tracked", "counters of the batch norms"),
            Ignored(r"input_resolution|context_length|vocab_size", "sizes, known from the shapes"),
        ),
    )


def _conv_norm(conv: str, norm: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{conv}.weight", f"{ours}/conv/kernel", layout="conv"),
        Rule(f"{norm}.weight", f"{ours}/norm/scale"),
        Rule(f"{norm}.bias", f"{ours}/norm/bias"),
        Rule(f"{norm}.running_mean", f"{ours}/norm/mean"),
        Rule(f"{norm}.running_var", f"{ours}/norm/variance"),
    ]


def _openai_text() -> list[Rule]:
    theirs, blocks = f"transformer.resblocks.{LAYER}", "text/transformer/blocks"
    layer = (LAYER,)
    return [
        Rule("token_embedding.weight", "text/token_embedding"),
        Rule("positional_embedding", "text/position_embedding"),
        Rule(f"{theirs}.attn.in_proj_weight", f"{blocks}/qkv/kernel", (LAYER, ALL), "linear"),
        Rule(f"{theirs}.attn.in_proj_bias", f"{blocks}/qkv/bias", layer, "flat"),
        *towers.linear(f"{theirs}.attn.out_proj", f"{blocks}/out", layer),
        *towers.linear(f"{theirs}.mlp.c_fc", f"{blocks}/mlp_in", layer),
        *towers.linear(f"{theirs}.mlp.c_proj", f"{blocks}/mlp_out", layer),
        *towers.norm(f"{theirs}.ln_1", f"{blocks}/norm_1", layer),
        *towers.norm(f"{theirs}.ln_2", f"{blocks}/norm_2", layer),
        *towers.norm("ln_final", "text/norm_final"),
        Rule("text_projection", "text/projection/kernel"),
        Rule("logit_scale", "logit_scale"),
    ]
