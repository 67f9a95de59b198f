"""The tokeniser against ids of OpenAI's CLIP, and what happens to texts that do not fit."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.tokenizer import END, PAD, START, ClipTokenizer, build, canonicalise, clean
from owl_det.config import TextTowerConfig
from owl_det.errors import DataError
from tests.data_pipelines import clip_vocabulary


def _words(text: str, num_positions: int = 16) -> list[int]:
    ids = ClipTokenizer(num_positions).encode(text).tolist()
    assert ids[0] == START and ids.count(END) == 1
    end = ids.index(END)
    assert all(i == PAD for i in ids[end + 1 :])
    return ids[1:end]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("", []),
        ("  A  photo\n of a CAT ", [320, 1125, 539, 320, 2368]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    assert _words(text) == ids


def test_cleaning() -> None:
    assert clean("  Caf&amp;eacute;\t&lt;b&gt; ") == "café <b>"
    assert clean("schÃ¶n") == "schön"
    assert _words("cat &amp; dog") == _words("cat & dog")


@pytest.mark.parametrize("text", ["<|endoftext|> cat", "<|startoftext|>"])
def test_special_tokens_cannot_be_written(text: str) -> None:
    """The end token marks where the text is pooled: a caption must not be able to forge it."""
    assert not {START, END} & set(_words(text))


def test_a_text_that_does_not_fit_keeps_its_end_token() -> None:
    tokenizer = ClipTokenizer(6)
    assert tokenizer.fits("one two three four")
    assert not tokenizer.fits("one two three four five")
    long, short = (
        tokenizer.encode("one two three four five"),
        tokenizer.encode("one two three four"),
    )
    np.testing.assert_array_equal(long, short)
    assert long[-1] == END


def test_shapes_of_many_and_of_none() -> None:
    tokenizer = ClipTokenizer(8)
    assert tokenizer.encode_all([]).shape == (0, 8)
    many = tokenizer.encode_all(("cat", "dog"))
    assert many.dtype == np.int32 and many.shape == (2, 8)
    np.testing.assert_array_equal(many[1], tokenizer.encode("dog"))
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.encode("dog")[0] = 1


# --- against transformers ------------------------------------------------------------------------

_FOREIGN = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
_CORPUS = [
    "a photo of a small cat",
    "many dogs and a red car on the road",
    "the quick brown fox jumps over the lazy dog",
    "it is raining cats and dogs in the city of rome",
    "numbers 0123456789 and letters abcdefghijklmnopqrstuvwxyz",
    "é ü ñ ß 東 京 привет שלום x-ray 3.14 don't",
    *(
        f"a {size} {thing} in the {place}"
        for size in ("small", "large", "white", "broken")
        for thing in ("dog", "bicycle", "window", "teapot")
        for place in ("garden", "kitchen")
    ),
]


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="needs the extra parity")


@pytest.fixture(scope="module")
def clip_reference(transformers: Any) -> Any:
    # By these names: version 5 accepts those of version 4 without a word and knows no vocabulary.
    return transformers.CLIPTokenizer(
        vocab=clip_vocabulary.vocabulary(), merges=clip_vocabulary.merges()
    )


def _up_to_end(ids: np.ndarray, end: int) -> list[int]:
    row = ids.tolist()
    return row[: row.index(end) + 1]


@_FOREIGN
def test_clip_ids_equal_those_of_transformers(clip_reference: Any) -> None:
    """Identical, but for texts that OpenAI's cleaning mends and transformers leaves alone."""
    tokenizer = ClipTokenizer(77)
    texts = clip_vocabulary.texts(1500)
    num_identical = 0
    for text in texts:
        ours = _up_to_end(tokenizer.encode(text), END)
        theirs = clip_reference(text, truncation=True, max_length=77).input_ids
        num_identical += ours == theirs
        if ours != theirs:
            cleaned = clip_reference(clean(text), truncation=True, max_length=77).input_ids
            assert ours == cleaned, ascii(text)
    assert num_identical >= 1000


@_FOREIGN
def test_a_tokenizer_json_gives_the_same_ids(clip_reference: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    clip_reference.backend_tokenizer.save(str(file))
    settings = TextTowerConfig(num_positions=16)
    tokenizer, built_in = build(settings, file), build(settings)
    for text in [*clip_vocabulary.texts(1000), "<|endoftext|> cat", "a <|startoftext|>"]:
        np.testing.assert_array_equal(tokenizer.encode(text), built_in.encode(text), ascii(text))
        assert tokenizer.fits(text) == built_in.fits(text)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model with the special tokens of SigLIP's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra siglip")
    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=90,
        model_type="unigram",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


@_FOREIGN
def test_siglip_ids_equal_those_of_transformers(transformers: Any, spiece: Path) -> None:
    reference = transformers.SiglipTokenizer(str(spiece))
    settings = TextTowerConfig(tokenizer="siglip", num_positions=64, vocabulary_size=90)
    tokenizer = build(settings, spiece)
    for text in [*_CORPUS, *clip_vocabulary.texts(1000)]:
        theirs = reference(text, padding="max_length", truncation=True, max_length=64).input_ids
        assert tokenizer.encode(text).tolist() == theirs, ascii(text)


@_FOREIGN
def test_siglip_2_ids_equal_those_of_transformers(transformers: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra siglip")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    specials += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials)
    bpe.train_from_iterator(_CORPUS * 20, trainer)
    model = json.loads(bpe.to_str())["model"]
    reference = transformers.Siglip2Tokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]]
    )
    file = tmp_path / "tokenizer.json"
    reference.backend_tokenizer.save(str(file))
    tokenizer = build(
        TextTowerConfig(tokenizer="siglip2", num_positions=64, vocabulary_size=400), file
    )
    assert len(set(tokenizer.encode("a photo of a small cat").tolist())) > 4
    for text in [*_CORPUS, *clip_vocabulary.texts(1000)]:
        words = reference(text, add_special_tokens=False).input_ids[:63]
        theirs = [*words, 1] + [0] * (63 - len(words))  # <eos> is 1, <pad> 0
        assert tokenizer.encode(text).tolist() == theirs, ascii(text)


# --- files ---------------------------------------------------------------------------------------


def test_siglip_without_its_file_is_refused() -> None:
    with pytest.raises(DataError, match=r"config.data.tokenizer.*spiece.model"):
        build(TextTowerConfig(tokenizer="siglip"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.json"):
        build(TextTowerConfig(), tmp_path / "nowhere.json")


@pytest.mark.parametrize("kind", ["clip", "siglip2"])
def test_a_damaged_json_is_named(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra siglip")
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"tokenizer\.json: no tokeniser file"):
        build(TextTowerConfig(tokenizer=kind), file)


def test_a_damaged_sentencepiece_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="needs the extra siglip")
    file = tmp_path / "spiece.model"
    file.write_bytes(b"\x00\x01nothing")
    with pytest.raises(DataError, match=r"spiece\.model: no sentencepiece model"):
        build(TextTowerConfig(tokenizer="siglip"), file)


def test_a_vocabulary_that_the_model_does_not_know_is_refused(spiece: Path) -> None:
    settings = TextTowerConfig(tokenizer="siglip", vocabulary_size=80)
    with pytest.raises(DataError, match="90 entries"):
        build(settings, spiece)


def test_siglip_texts_are_canonical(spiece: Path) -> None:
    assert canonicalise("  A photo, of:\n a CAT! ") == "a photo of a cat"
    settings = TextTowerConfig(tokenizer="siglip", num_positions=6, vocabulary_size=90)
    tokenizer = build(settings, spiece)
    np.testing.assert_array_equal(tokenizer.encode("A cat!"), tokenizer.encode("a cat"))
    assert tokenizer.encode("")[0] == 1 and (tokenizer.encode("") == 1).all()
    assert (
        not tokenizer.fits("the quick brown fox")
        and tokenizer.encode("the quick brown fox")[-1] == 1
    )
