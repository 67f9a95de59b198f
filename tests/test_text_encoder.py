"""Names in prompts become embeddings in tables of few shapes."""

import logging
from typing import Any

import numpy as np
import pytest

from data_pipelines import prompts
from owl_det.inference.text_encoder import TextEncoder, mean_of_prompts
from tests import tiny

MODEL = tiny.config().model
NAMES = [f"thing {i}" for i in range(19)]


class Tower:
    """A text tower whose embedding of a text is its ids; remembers the shapes it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, params: Any, tokens: np.ndarray) -> np.ndarray:
        self.shapes.append(tokens.shape[:2])
        return tokens.astype(np.float32)


def test_every_name_stands_in_every_prompt() -> None:
    encoder = TextEncoder(Tower(), MODEL)
    found = encoder.embed({}, ["Cat", "dog"], "clip_best7")
    for t, template in enumerate(prompts.eval_prompts("clip_best7")):
        for q, name in enumerate(("cat", "dog")):
            wanted = encoder.tokenizer.encode(template.replace("{}", name))
            np.testing.assert_array_equal(found[t, q], wanted)


@pytest.mark.parametrize(
    ("mode", "settings", "shapes"),
    [
        ("none", {}, [(1, 19)]),
        ("none", {"multiple": 16}, [(1, 32)]),
        ("none", {"names_at_once": 8}, [(1, 8)] * 3),
        ("none", {"names_at_once": 64, "multiple": 64}, [(1, 64)]),
        ("clip_best7", {"names_at_once": 16}, [(7, 16)] * 2),
        ("clip", {"names_at_once": 160, "multiple": 2}, [(81, 13)] * 2),
    ],
)
def test_tables_have_few_shapes_and_change_nothing(
    mode: str, settings: dict[str, Any], shapes: list[tuple[int, int]]
) -> None:
    tower = Tower()
    found = TextEncoder(tower, MODEL, **settings).embed({}, NAMES, mode)
    assert tower.shapes == shapes
    encoder = TextEncoder(Tower(), MODEL)
    for column, name in enumerate(NAMES):
        np.testing.assert_array_equal(found[:, column], encoder.embed({}, [name], mode)[:, 0])


def test_nothing_to_encode_runs_no_tower() -> None:
    tower = Tower()
    encoder = TextEncoder(tower, MODEL)
    assert encoder.embed({}, [], "clip_best7").shape == (7, 0, MODEL.embedding_dim)
    assert encoder.embed_texts({}, []).shape == (0, MODEL.embedding_dim)
    assert not tower.shapes


def test_texts_go_without_a_prompt() -> None:
    encoder = TextEncoder(Tower(), MODEL)
    (found,) = encoder.embed_texts({}, ["two cats"])
    np.testing.assert_array_equal(found, encoder.tokenizer.encode("two cats"))


def test_a_name_that_does_not_fit_is_found_in_each_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = TextEncoder(Tower(), MODEL)
    room = MODEL.text.num_positions - 2
    names = ["cat", "cat " * room, "cat " * (room + 1)]
    np.testing.assert_array_equal(encoder.is_cut(names, "none"), [[False, False, True]])
    assert encoder.is_cut(names, "clip_best7")[:, 1:].all()
    assert encoder.is_cut([], "clip_best7").shape == (7, 0)
    with caplog.at_level(logging.WARNING, "absl"):
        encoder.warn_of_cut(names, "none")
    assert caplog.text.count("is cut: it is longer than") == 1


def test_the_mean_of_prompts_weighs_each_alike() -> None:
    found = mean_of_prompts(np.array([[[3.0, 0]], [[0, 0.5]]]))
    np.testing.assert_allclose(found, [[np.sqrt(0.5)] * 2], rtol=1e-6)
