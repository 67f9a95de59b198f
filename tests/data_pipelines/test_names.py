"""How names are written, lists of them, and which of them are one text to the model."""

import pytest

from data_pipelines import name_lists, names
from owl_det.errors import DataError


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("traffic_light", "traffic light"),
        ("  a \t b\u00a0\u3000c__d ", "a b c d"),
        ("\ufeffblue triangle", "blue triangle"),
        ("cafe\u0301", "caf\u00e9"),
        ("e\u200b\u0301", "\u00e9"),
        ("a \u200b b", "a b"),
        ("\x1b[1mcat\x00\x7f", "[1mcat"),
        (
            "\u0646\u0645\u06cc\u200c\u062f\u0627\u0646",
            "\u0646\u0645\u06cc\u200c\u062f\u0627\u0646",
        ),
        ("Café-au-lait (big)", "Café-au-lait (big)"),
        ("_", ""),
    ],
)
def test_plain_names(name, plain):
    assert names.plain(name) == plain
    assert names.plain(plain) == plain


@pytest.mark.parametrize(
    "pair",
    [
        ("Cat", "cat"),
        ("traffic_light", "traffic light"),
        ("a  b", "a b"),
        ("cafe\u0301", "caf\u00e9"),
        ("cat", "\ufeffcat"),
        ("ГОРОД", "город"),
    ],
)
def test_two_spellings_of_one_text_are_named(pair):
    with pytest.raises(DataError) as error:
        names.require_distinct(["dog", *pair], "x.json: categories")
    message = str(error.value)
    assert message.startswith("x.json: categories: ")
    assert all(repr(name) in message for name in pair)


def test_names_that_differ_are_distinct():
    names.require_distinct(["cat", "cats", "cat dog", "catdog", "naïve", "naive"], "x")
    with pytest.raises(DataError, match="x: two categories are called 'a'"):
        names.require_distinct(["a", "b", "a"], "x")
    with pytest.raises(DataError, match="x: a category has an empty name"):
        names.require_distinct(["a", " _"], "x")


@pytest.mark.parametrize(
    "content",
    [
        b"cat\nred_dog\n",
        b"\xef\xbb\xbfcat\r\nred dog \r\n\r\n",
        b"cat\r\rred dog",
        "cat\nred dog\n".encode("utf-16"),
        b"\xfe\xff" + "cat\nred dog\n".encode("utf-16-be"),
        "\ufeffcat\nred dog\n".encode("utf-32-le"),
        b"\n\n  cat\n\t\nred\tdog".replace(b"red\tdog", b"red  dog"),
        b"# my names\ncat # a pet\n#red dog\nred dog",
    ],
)
def test_lists_are_read_whatever_the_editor(tmp_path, content):
    (tmp_path / "names.txt").write_bytes(content)
    assert name_lists.read_list(tmp_path / "names.txt") == ("cat", "red dog")


@pytest.mark.parametrize(
    "name",
    [
        "2 door car",
        "C#",
        "cup (drinking)",
        "on",
        "007",
        "1e3",
        "~",
        "16:9 screen",
        "o'clock",
        "x-ray",
    ],
)
def test_odd_names_are_names(name):
    assert name_lists.parse_list(f"cat\n{name}\n", "x") == ("cat", name)


@pytest.mark.parametrize(
    "given",
    [
        ("team 1", "team 2"),
        ("boeing 747", "boeing 767"),
        ("airbus 0", "concorde 2"),
        ("707-320", "727-200"),
        ("3-piece suit", "7-seater"),
        ("cat 1",),
    ],
)
def test_numbers_that_are_parts_of_names_stay(given):
    assert name_lists.parse_list("\n".join(given), "x") == given


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("id,name\n0,cat\n", 1),
        ("cat\n/m/01,dog\n", 2),
        ("cat, dog, emu", 1),
        ("cat;1\ndog;2\n", 1),
        ("cat\tfeline\n", 1),
        ("cat\n\ndog|canine\n", 3),
        ("names:\n  - cat\n", 1),
        ("- cat\n- dog\n", 1),
        ("0: cat\n1: dog\n", 1),
        ("name: cat\n", 1),
        ('["cat", "dog"]', 1),
        ('{"names": ["cat"]}', 1),
        ("item {\n  id: 1\n}\n", 1),
        ("1 cat\n2 dog\n", 1),
        ("cat\n1 dog\n2 emu\n", 2),
        ("7 cat\n9 dog\n", 1),
        ("1. cat\n2. dog\n", 1),
        ("cat\n3) dog\n", 2),
        ("(1) cat\n", 1),
        ("n01440764 tench\n", 1),
        ('"cat"\n"dog"\n', 1),
        ("cat\n'dog'\n", 2),
        ("“cat”\n", 1),
        ("<html>\n", 1),
        ("1-cat\n2-dog\n", 1),
        ("cat 0\ndog 1\n", 1),
        ("cat=3\ndog=7\n", 1),
        ("cat 0.93\ndog 0.12\n", 1),
        ("cat\nimages/a.JPG\n", 2),
        ("\u732b\uff0c\u72d7\n", 1),
    ],
)
def test_what_is_no_list_is_refused_with_its_line(tmp_path, text, line):
    (tmp_path / "names.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"names\.csv: line {line}: .*one name a line"):
        name_lists.read_list(tmp_path / "names.csv")


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "names.txt"
    with pytest.raises(DataError, match=r"names\.txt: No such file"):
        name_lists.read_list(file)
    for content in (b"\xff\xfe\xff", b"cat\xe9", "cat".encode("utf-16-le")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"names\.txt: .*UTF-8"):
            name_lists.read_list(file)
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf", b"# only a comment\n"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="holds no names"):
            name_lists.read_list(file)


def test_the_place_in_a_numbered_list_is_the_class_number():
    assert name_lists.parse_list("cat\ndog\n\n\n", "x", is_numbered=True) == ("cat", "dog")
    with pytest.raises(DataError, match="x: line 2: is empty.*class number"):
        name_lists.parse_list("cat\n\ndog", "x", is_numbered=True)
    with pytest.raises(DataError, match="x: line 1: is a comment"):
        name_lists.parse_list("# classes\ncat\ndog", "x", is_numbered=True)
