"""CLIP's towers against transformers, its ResNet-50 against a PyTorch module written here."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det import cli
from owl_det.checkpoints.load import load_detector, load_model, save_model
from owl_det.convert import clip
from owl_det.errors import CheckpointError
from owl_det.evaluation import ensemble
from owl_det.modeling.owl import OwlDetector
from owl_det.modeling.resnet import ClipResNet
from owl_det.types import LoadedModel
from tests.convert import arrays

torch = pytest.importorskip("torch", reason="needs the extra parity")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS = np.array([[91, 5, 7, 98, 98, 98], [91, 3, 98, 0, 0, 0], [91, 4, 6, 8, 9, 98]])


@pytest.fixture(scope="module")
def reference() -> Any:
    """A tiny `CLIPModel`; the end token is the highest id, as in CLIP's vocabulary."""
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.CLIPConfig(
        text_config=size
        | dict(
            hidden_size=16,
            num_attention_heads=2,
            vocab_size=99,
            max_position_embeddings=6,
            bos_token_id=91,
            eos_token_id=98,
            pad_token_id=98,
        ),
        vision_config=size | dict(image_size=24, patch_size=8),
        projection_dim=12,
    )
    return transformers.CLIPModel(config)


@pytest.fixture(scope="module")
def towers(reference: Any) -> LoadedModel:
    tensors = arrays.randomised(reference)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": 3}
    return clip.load(arrays.weights(tensors), reference.config.to_dict(), processor)


def test_embeddings_and_logits_equal_those_of_transformers(
    reference: Any, towers: LoadedModel
) -> None:
    pixels = arrays.image(24)
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.from_numpy(TOKENS),
            pixel_values=torch.from_numpy(arrays.normalised(pixels, towers.preprocess)),
        )
    detector = OwlDetector(towers.config, towers.preprocess)

    @jax.jit
    def ours(params: Any) -> Any:
        variables = {"params": params}
        image = detector.apply(variables, jnp.asarray(pixels), method="embed_image")
        text = detector.apply(variables, jnp.asarray(TOKENS), method="encode_text")
        return image, text, detector.apply(variables, image, text, method="similarity")

    image, text, logits = ours(towers.params)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    assert arrays.difference(unit(image), theirs.image_embeds) < arrays.TOLERANCE
    assert arrays.difference(unit(text), theirs.text_embeds) < arrays.TOLERANCE
    assert arrays.difference(logits, theirs.logits_per_image) < arrays.TOLERANCE
    assert np.ptp(theirs.logits_per_image.numpy()) > 0.1, "a comparison of constants shows nothing"


def test_sizes_and_preprocessing_are_read(towers: LoadedModel) -> None:
    model = towers.config
    assert (model.image_size, model.image.patch_size, model.embedding_dim) == (24, 8, 12)
    assert (model.text.num_positions, model.text.num_heads, model.image.num_heads) == (6, 2, 4)
    assert towers.preprocess.resize == "bicubic"
    assert towers.preprocess.mean == (0.4, 0.5, 0.6)
    assert towers.kind == "towers"


def test_a_checkpoint_of_towers_keeps_every_bit(towers: LoadedModel, tmp_path: Path) -> None:
    save_model(tmp_path / "clip", towers)
    loaded = load_model(tmp_path / "clip")
    assert loaded.kind == "towers" and loaded.config == towers.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, towers.params)
    with pytest.raises(CheckpointError, match="no detection heads"):
        load_detector(tmp_path / "clip")


def test_a_folder_becomes_a_checkpoint_by_the_command(
    reference: Any,
    towers: LoadedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    arguments = [str(tmp_path / "hf"), str(tmp_path / "ours"), "--from", "clip"]
    assert cli.main(["convert", *arguments]) == 0, capsys.readouterr().err
    loaded = load_model(tmp_path / "ours")
    assert loaded.kind == "towers" and loaded.config == towers.config
    assert loaded.preprocess.mean == (0.1, 0.2, 0.3)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, towers.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("text_model.final_layer_norm.bias"), "text_model.final_layer_norm.bias"),
        (lambda t: t.update(surplus=np.zeros(3)), "unknown tensor surplus"),
        (
            lambda t: t.update({"vision_model.post_layernorm.bias": np.zeros(7)}),
            r"vision_model.post_layernorm.bias has shape \(7,\)",
        ),
        (
            lambda t: t.update(
                {"vision_model.embeddings.position_embedding.weight": np.zeros((9, 32))}
            ),
            "no square",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(reference: Any, change: Any, message: str) -> None:
    tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        clip.load(arrays.weights(tensors), reference.config.to_dict(), {})


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ({"hidden_act": "relu"}, None, "hidden_act"),
        ({"num_attention_heads": "4"}, None, "num_attention_heads"),
        ({"num_attention_heads": 5}, None, "num_heads"),
    ],
)
def test_settings_that_cannot_be_are_named(
    reference: Any, section: dict, value: None, message: str
) -> None:
    tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
    config = reference.config.to_dict()
    config = {key: config[key] | section for key in ("text_config", "vision_config")}
    with pytest.raises(CheckpointError, match=message):
        clip.load(arrays.weights(tensors), config, {})


# --- ResNet --------------------------------------------------------------------------------------


class _Block(torch.nn.Module):
    """One bottleneck of CLIP's ResNet, from the paper's description, by OpenAI's names."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        nn = torch.nn
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = (
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.stride = stride
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Any) -> Any:
        pool = torch.nn.functional.avg_pool2d
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(pool(y, self.stride)))
        short = self.downsample(pool(x, self.stride)) if hasattr(self, "downsample") else x
        return torch.relu(y + short)


class _AttentionPool(torch.nn.Module):
    def __init__(self, positions: int, width: int, num_heads: int, outputs: int):
        super().__init__()
        nn = torch.nn
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, outputs)
        self.num_heads = num_heads

    def forward(self, x: Any) -> Any:
        """Through PyTorch's own multi-head attention, all queries, the first kept."""
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        out, _ = torch.nn.functional.multi_head_attention_forward(
            x,
            x,
            x,
            x.shape[-1],
            self.num_heads,
            None,
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            None,
            None,
            False,
            0.0,
            self.c_proj.weight,
            self.c_proj.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            need_weights=False,
        )
        return out[0]


class _ResNet(torch.nn.Module):
    def __init__(self, width: int, blocks: tuple[int, ...], num_heads: int, outputs: int):
        super().__init__()
        nn, half = torch.nn, width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(half), nn.BatchNorm2d(half)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for stage, number in enumerate(blocks):
            layers = []
            for block in range(number):
                layers.append(_Block(inputs, width * 2**stage, 2 if stage and not block else 1))
                inputs = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.attnpool = _AttentionPool(1 + 2 * 2, inputs, num_heads, outputs)

    def feature_map(self, x: Any) -> Any:
        for i in (1, 2, 3):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = torch.nn.functional.avg_pool2d(x, 2)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        return x


class _Clip(torch.nn.Module):
    """CLIP with a ResNet, by the names of OpenAI's state dict."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.visual = _ResNet(4, (1, 2, 1, 1), num_heads=2, outputs=10)
        layer = nn.Module
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList()
        for _ in range(2):
            block = layer()
            block.attn = nn.MultiheadAttention(64, 1)
            block.ln_1, block.ln_2 = nn.LayerNorm(64), nn.LayerNorm(64)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(64, 80), nn.Linear(80, 64)
            self.transformer.resblocks.append(block)
        self.token_embedding = nn.Embedding(99, 64)
        self.positional_embedding = nn.Parameter(torch.zeros(6, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.zeros(64, 10))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def text(self, tokens: Any) -> Any:
        x = (self.token_embedding(tokens) + self.positional_embedding).transpose(0, 1)
        mask = torch.full((6, 6), float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
            y = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
        x = self.ln_final(x.transpose(0, 1))
        return x[torch.arange(len(tokens)), tokens.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def resnet() -> tuple[Any, LoadedModel]:
    module = _Clip()
    return module, clip.load_resnet(arrays.weights(arrays.randomised(module)))


def test_resnet_equals_pytorch(resnet: tuple[Any, LoadedModel]) -> None:
    module, loaded = resnet
    model = ClipResNet(loaded.config, loaded.preprocess)
    pixels, larger = arrays.image(64), arrays.image(96, 1)
    with torch.no_grad():
        grids = [
            module.visual.feature_map(torch.from_numpy(arrays.normalised(x, loaded.preprocess)))
            for x in (pixels, larger)
        ]
        pool = module.visual.attnpool
        image = pool(grids[0])
        # Values only: what one position gives if it attends to itself alone.
        learned = pool.positional_embedding[1:].T.reshape(1, -1, *grids[0].shape[2:])
        positions = torch.nn.functional.interpolate(
            learned, grids[1].shape[2:], mode="bilinear", align_corners=False
        )
        dense = pool.c_proj(pool.v_proj((grids[1] + positions).permute(0, 2, 3, 1)))
        dense = dense.flatten(1, 2)
        text = module.text(torch.from_numpy(TOKENS))
        unit = torch.nn.functional.normalize
        logits = module.logit_scale.exp() * unit(image) @ unit(text).T

    @jax.jit
    def ours(params: Any) -> Any:
        variables = {"params": params}
        return (
            model.apply(variables, jnp.asarray(pixels), method="embed_image"),
            model.apply(variables, jnp.asarray(larger), method="patch_features").tokens,
            model.apply(variables, jnp.asarray(TOKENS), method="encode_text"),
            model.apply(variables, jnp.asarray(pixels), jnp.asarray(TOKENS)),
        )

    for mine, theirs in zip(ours(loaded.params), (image, dense, text, logits), strict=True):
        assert mine.shape == tuple(theirs.shape)
        assert float(theirs.std()) > 0.01
        assert arrays.difference(mine, theirs) < arrays.TOLERANCE


def test_resnet_travels_as_a_checkpoint(resnet: tuple[Any, LoadedModel], tmp_path: Path) -> None:
    _, model = resnet
    save_model(tmp_path / "rn", model)
    loaded = load_model(tmp_path / "rn")
    assert loaded.is_resnet and loaded.config == model.config
    with pytest.raises(CheckpointError, match="no detection heads; a ResNet teaches"):
        load_detector(tmp_path / "rn")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_a_resnet_is_no_start_for_a_detector(
    resnet: tuple[Any, LoadedModel], tmp_path: Path
) -> None:
    save_model(tmp_path / "rn", resnet[1])
    with pytest.raises(CheckpointError, match="no detection heads"):
        load_detector(tmp_path / "rn")


def test_a_resnet_is_no_part_of_an_ensemble(
    resnet: tuple[Any, LoadedModel], towers: LoadedModel, tmp_path: Path
) -> None:
    save_model(tmp_path / "rn", resnet[1])
    save_model(tmp_path / "towers", towers)
    with pytest.raises(CheckpointError, match="rn: a ResNet is a teacher, no part"):
        ensemble.save(tmp_path / "towers", tmp_path / "rn", 0.5, tmp_path / "mixed")
