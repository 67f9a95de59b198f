"""Label spaces: the rules of arXiv 2306.09683, A.1, on examples worked by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from owl_det.annotate import label_spaces
from owl_det.errors import DataError


def test_curated_names_are_merged_by_the_published_rules() -> None:
    merged = label_spaces.merge_vocabularies(
        [["Dog", "Dress", "Bus", "glasses"], ["dogs", "buses", "Dresses", "dog", "Cats"]]
    )
    # "cats" and "glasses" stay: no "cat" and no "glass" is there.
    assert merged.names == ("bus", "cats", "dog", "dress", "glasses")
    assert dict(merged.dropped) == {
        "dog": "duplicate of 'dog'",
        "buses": "plural of 'bus'",
        "dogs": "plural of 'dog'",
        "dresses": "plural of 'dress'",
    }


def test_a_plural_of_a_plural_goes_with_it() -> None:
    """The published code asks all names, those that it will remove among them."""
    assert label_spaces.merge_vocabularies([["a", "as", "ass"]]).names == ("a",)


def test_union_scales_curated_scores_and_skips_repeated_ngrams(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\nDog  # an animal\n")
    space = label_spaces.make("union", [str(tmp_path / "names.txt")])
    assert space.curated.names == ("cat", "dog")
    assert space.curated_factor == 0.3
    assert space.of_image(["red red", "red"]) == ("red", "red red")
    assert label_spaces.make("curated", ["shapes_world"]).curated_factor == 1.0
    assert label_spaces.make("curated", ["shapes_world"]).of_image(["red"]) == ()


def test_the_limit_holds_for_all_texts_of_an_image() -> None:
    space = label_spaces.make("ngrams", [], max_ngrams=4)
    assert space.of_image(["one two", "three four"]) == ("one", "one two", "two", "three")


def test_vocabularies_are_read_from_coco_json_and_tfds(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets", reason="needs the extra tfds")
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"categories": [{"id": 1, "name": "cell"}]}))
    assert label_spaces.read_vocabulary(str(path)) == ("cell",)
    lvis = {"id": 1, "name": "cup_(drinking)", "synset": "cup.n.01"}
    path.write_text(json.dumps({"categories": [lvis]}))
    assert label_spaces.read_vocabulary(str(path)) == ("cup drinking",)  # as the reader of boxes
    names = label_spaces.read_vocabulary("tfds:lvis")
    assert len(names) == 1203 and "aerosol can" in names


@pytest.mark.parametrize(
    ("labels", "vocabularies", "message"),
    [
        ("union", [], "--vocabulary"),
        ("ngrams", ["shapes_world"], "--vocabulary"),
        ("curated", ["absent.txt"], "absent.txt"),
        ("absent.txt", [], "absent.txt"),
        ("absent.txt", ["shapes_world"], "--vocabulary"),
    ],
)
def test_lists_that_cannot_be_used_are_named(
    labels: str, vocabularies: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        label_spaces.make(labels, vocabularies)


def test_malformed_vocabularies_are_named(tmp_path: Path) -> None:
    for name, text in (
        ("a.json", "[]"),
        ("b.json", '{"categories": [{"name": 3}]}'),
        ("c.txt", ""),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(DataError, match=name):
            label_spaces.read_vocabulary(str(path))


def test_tables_say_what_was_dropped_and_why() -> None:
    curated = label_spaces.merge_vocabularies([["cat", "Cats", "a|b"]])
    space = label_spaces.LabelSpace(curated=curated, phrases="ngrams")
    counts: Counter[str] = Counter()
    space.of_image(["the free cat"], counts)
    content = label_spaces.table(space, counts)
    assert content["curated_dropped"] == [["cats", "plural of 'cat'"]]
    assert content["generic_words"] == {"free": 1}
    text = label_spaces.table_markdown(space, counts)
    assert "| cats | plural of 'cat' |" in text and "| free | 1 |" in text


def test_markup_in_captions_is_escaped() -> None:
    assert label_spaces.escape_markdown("<b>a|b</b>\n# c") == "\\<b\\>a\\|b\\</b\\> \\# c"


@pytest.mark.filterwarnings("ignore:unclosed file.*textblob:ResourceWarning")
def test_label_spaces_of_noun_phrases() -> None:
    pytest.importorskip("textblob", reason="needs the extra phrases")
    alone = label_spaces.make("noun_phrases", [], max_ngrams=3)
    assert alone.of_image(["a red dog", "the red dog and a cat"]) == ("red dog", "cat")
    assert alone.curated_factor == 1.0 and not alone.curated.names
    both = label_spaces.make("union_noun_phrases", ["shapes_world"])
    assert both.curated.names and both.curated_factor == 0.3 and both.phrases == "noun_phrases"
    assert alone.describe()["uses_ngrams"] is False
    assert str(alone.describe()["tagger"]).startswith("textblob ")
    with pytest.raises(DataError, match="union_noun_phrases for both"):
        label_spaces.make("noun_phrases", ["shapes_world"])
    counts: Counter[str] = Counter()
    alone.of_image(["free dog"], counts)
    assert "| noun phrases | count |" in label_spaces.table_markdown(alone, counts)


def test_noun_phrases_need_textblob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_spaces, "is_installed", lambda _: False)
    with pytest.raises(DataError, match=r"--labels noun_phrases: .*'\.\[phrases\]'"):
        label_spaces.make("noun_phrases", [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "id,name\n1,cat\n", "line 1: 'id,name' has a comma"),
        ("a.txt", "cat\n0: dog\n", "line 2"),
        ("a.txt", "1. cat\n2. dog\n", "line 1"),
        ("a.txt", "cat\n'dog'\n", "line 2: .* is in quotes"),
        ("a.yaml", "names:\n  0: cat\n", "line 1"),
        ("a.txt", '["cat", "dog"]', "line 1"),
        ("a.json", '{"0": "cat"}', "has no list `categories`"),
        ("a.json", '{"categories": [{"name": "cat"}, {"name": 7}]}', r"categories\[1\]"),
        ("a.json", '{"categories": ["cat", null]}', r"categories\[1\]"),
        ("a.json", '{"categories": "cat"}', "has no list `categories`"),
        ("a.json", "[[1]]", "entry 0"),
        ("a.json", "[]", "holds no names"),
        ("a.json", "{", "is no JSON"),
    ],
)
def test_lists_of_other_formats_are_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        label_spaces.read_vocabulary(str(tmp_path / name))


def test_spellings_of_one_name_are_merged_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(
        "\ufefftraffic_light\r\nTraffic  Light\r\ncafe\u0301\r\ncaf\u00e9\r\n".encode()
    )
    space = label_spaces.make("curated", [str(path)])
    assert space.curated.names == ("caf\u00e9", "traffic light")
    assert "4 names are 2 texts to the model and are merged" in caplog.text
    coco = tmp_path / "names.json"
    coco.write_text(json.dumps({"categories": [{"id": 1, "name": "traffic_light "}]}))
    assert label_spaces.read_vocabulary(str(coco)) == ("traffic light",)
    coco.write_text(json.dumps(["cat", "traffic_light"]))
    assert label_spaces.read_vocabulary(str(coco)) == ("cat", "traffic light")
