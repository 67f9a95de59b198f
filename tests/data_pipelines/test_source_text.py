"""Data sources that commands take as one line of text."""

import pytest

from data_pipelines.source_text import parse_source, split_source
from owl_det.config import CocoSource, PseudoBoxesSource
from owl_det.errors import ConfigError


def test_keys_are_those_of_a_config_and_of_its_types() -> None:
    source, group = parse_source("kind=coco,annotations=a/b.json,group=rare,weight=2", "x")
    assert (source, group) == (CocoSource(annotations="a/b.json", weight=2.0), "rare")
    source, group = parse_source("kind=pseudo_boxes,records=2017,min_box_score=0.2", "x")
    assert (source, group) == (PseudoBoxesSource(records="2017", min_box_score=0.2), "")
    assert split_source("kind=voc,path=a=b") == {"kind": "voc", "path": "a=b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shapes_world", r"'shapes_world': expected kind=…,key=value"),
        ("kind=coco,kind=voc", "with each key once"),
        ("kind=shapes_world,num_images=x", "num_images: 'x' is no int"),
        ("kind=coco,annotation=a.json", r"truth.annotation: no such key; did you mean"),
        ("kind=cocoa", r"truth.kind"),
    ],
)
def test_other_text_is_one_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_source(text, "truth")
