"""SigLIP's towers against transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.convert import siglip
from owl_det.errors import CheckpointError
from owl_det.modeling.owl import OwlDetector
from owl_det.types import LoadedModel
from tests.convert import arrays

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS = np.array([[5, 7, 1, 1, 1, 1], [3, 1, 1, 1, 1, 1], [4, 6, 8, 9, 12, 1]])


@pytest.fixture(scope="module")
def reference() -> Any:
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.SiglipConfig(
        text_config=size
        | dict(
            vocab_size=99,
            max_position_embeddings=6,
            bos_token_id=0,
            eos_token_id=1,
            num_attention_heads=2,
        ),
        # 27 pixels: three patches and three pixels that no patch covers, as in So400m/14 at 384.
        vision_config=size | dict(image_size=27, patch_size=8),
    )
    return transformers.SiglipModel(config)


@pytest.fixture(scope="module")
def towers(reference: Any) -> LoadedModel:
    tensors = arrays.randomised(reference)
    return siglip.load(arrays.weights(tensors), reference.config.to_dict(), {}, "spiece.model")


def test_embeddings_and_logits_equal_those_of_transformers(
    reference: Any, towers: LoadedModel
) -> None:
    pixels = arrays.image(27)
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.from_numpy(TOKENS),
            pixel_values=torch.from_numpy(arrays.normalised(pixels, towers.preprocess)),
        )
    detector = OwlDetector(towers.config, towers.preprocess)

    @jax.jit
    def ours(params: Any) -> Any:
        variables = {"params": params}
        image = detector.apply(variables, jnp.asarray(pixels[:, :24, :24]), method="embed_image")
        text = detector.apply(variables, jnp.asarray(TOKENS), method="encode_text")
        return image, text, detector.apply(variables, image, text, method="similarity")

    image, text, logits = ours(towers.params)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    assert arrays.difference(unit(image), theirs.image_embeds) < arrays.TOLERANCE
    assert arrays.difference(unit(text), theirs.text_embeds) < arrays.TOLERANCE
    assert arrays.difference(logits, theirs.logits_per_image) < arrays.TOLERANCE
    assert np.ptp(theirs.logits_per_image.numpy()) > 0.1, "a comparison of constants shows nothing"


def test_the_model_is_described(towers: LoadedModel) -> None:
    model = towers.config
    assert (model.image_size, model.embedding_dim, model.contrastive) == (24, 32, "sigmoid")
    assert (model.image.pooling, model.image.pre_norm) == ("map", False)
    assert (model.text.pooling, model.text.is_causal, model.text.num_heads) == ("last", False, 2)
    assert towers.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("file", "kind"), [("a/spiece.model", "siglip"), ("b/tokenizer.json", "siglip2")]
)
def test_the_tokeniser_tells_siglip_from_siglip_2(file: str, kind: str) -> None:
    assert siglip.tokenizer_kind(file) == kind


def test_what_is_no_siglip_is_refused(reference: Any) -> None:
    with pytest.raises(CheckpointError, match="NaFlex"):
        siglip.load(arrays.weights({}), {"model_type": "siglip2"}, {}, "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"needs its spiece.model"):
        tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
        siglip.load(arrays.weights(tensors), reference.config.to_dict(), {}, "")
