"""CLIP's tokeniser as files."""

import random
from pathlib import Path

import pytest

from data_pipelines.tokenizer import END, ClipTokenizer
from owl_det.convert import clip_vocabulary

WORDS = (
    "a photo of the WHITE cat dog Café naïve it's we're I'd don't rock'n'roll x-ray 3.14 1,000 "
    "50% $9.99 C++ #hashtag @user 東京 привет 🙂 <b> [x] __init__ ! !!"
).split()


def test_tokenizer_json_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra siglip")
    clip_vocabulary.write(tmp_path, max_length=16)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = ClipTokenizer(77)
    rng = random.Random(0)
    for _ in range(300):
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == ids[: ids.index(END) + 1], text


def test_only_another_vocabulary_is_kept(tmp_path: Path) -> None:
    assert clip_vocabulary.own_tokenizer(tmp_path) == ""
    clip_vocabulary.write(tmp_path, max_length=16)
    assert clip_vocabulary.own_tokenizer(tmp_path) == ""
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat</w>"', '"kat</w>"'))
    assert clip_vocabulary.own_tokenizer(tmp_path) == str(file)
