"""Selection of query-box pairs against a full sort."""

import numpy as np
import pytest

from owl_det.errors import DataError
from owl_det.evaluation.select import top_pairs

BOXES = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.mark.parametrize("top_k", [1, 5, 17, 24, 1000])
def test_equals_a_stable_sort_of_all_pairs(top_k):
    scores = np.random.default_rng(top_k).uniform(size=(6, 4)).round(1)  # many ties
    boxes, kept, queries = top_pairs(BOXES, scores, top_k)
    pairs = [(-scores[k, q], k, q) for k in range(6) for q in range(4)]
    expected = sorted(pairs)[:top_k]
    np.testing.assert_array_equal(kept, [-score for score, _, _ in expected])
    np.testing.assert_array_equal(boxes, BOXES[[k for _, k, _ in expected]])
    np.testing.assert_array_equal(queries, [q for _, _, q in expected])


def test_filler_queries_are_never_chosen():
    scores = np.full((6, 3), -np.inf)
    scores[4, 1] = -2.0
    boxes, kept, queries = top_pairs(BOXES, scores, 5)
    np.testing.assert_array_equal(boxes, BOXES[[4]])
    assert kept.tolist() == [-2.0] and queries.tolist() == [1]


@pytest.mark.parametrize("shape, top_k", [((6, 0), 5), ((0, 4), 5), ((6, 4), 0)])
def test_nothing_to_choose_gives_empty_arrays(shape, top_k):
    boxes, kept, queries = top_pairs(BOXES[: shape[0]], np.zeros(shape), top_k)
    assert boxes.shape == (0, 4) and kept.shape == queries.shape == (0,)


def test_nan_is_an_error():
    with pytest.raises(DataError, match="NaN"):
        top_pairs(BOXES, np.full((6, 2), np.nan), 3)
