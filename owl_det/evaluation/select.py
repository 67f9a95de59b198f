"""The predictions of one image that are worth keeping."""

import numpy as np
from jaxtyping import Float, Int

from owl_det.errors import DataError


def top_pairs(
    boxes: Float[np.ndarray, "k 4"], scores: Float[np.ndarray, "k q"], top_k: int
) -> tuple[Float[np.ndarray, "p 4"], Float[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """The `top_k` best of all query-box pairs of one image, so a box may occur several times.

    Returns the boxes, scores and query indices of `p = min(top_k, candidates)` pairs, best first;
    equal scores are ordered by box, then by query, also where they are cut off. A score of -inf
    (the queries that only fill up the table) is no candidate. Raises `DataError` on NaN.
    """
    flat = scores.ravel()
    if np.isnan(flat).any():
        raise DataError("scores: NaN among the predictions; the parameters have diverged")
    count = min(top_k, np.count_nonzero(flat > -np.inf))
    if count <= 0:
        return boxes[:0], flat[:0], np.zeros(0, np.int64)
    # argpartition alone would cut ties in an unspecified way, so the last place is filled by index.
    threshold = flat[np.argpartition(flat, -count)[-count]]
    above = np.flatnonzero(flat > threshold)
    level = np.flatnonzero(flat == threshold)[: count - above.size]
    chosen = np.sort(np.concatenate([above, level]))
    chosen = chosen[np.argsort(-flat[chosen], kind="stable")]
    box_index, query_index = np.divmod(chosen, scores.shape[1])
    return boxes[box_index], flat[chosen], query_index
