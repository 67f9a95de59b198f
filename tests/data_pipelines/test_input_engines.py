"""The two engines that run the input in parallel: order, start, errors, and an end."""

import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from data_pipelines import input as input_lib
from owl_det.errors import DataError

ENGINES = [input_lib._thread_pool_batches, input_lib._tf_data_batches]


@pytest.mark.parametrize("engine", ENGINES)
def test_order_does_not_depend_on_who_is_first(engine: Callable[..., Any]) -> None:
    def make(position: int) -> dict[str, np.ndarray]:
        time.sleep(0.01 * (position % 3 == 0))  # the first of each three takes longest
        return {"x": np.array(position, np.int32), "row": np.full(2, position, np.float32)}

    batches = engine(make, 5, 4, 3)
    taken = list(islice(batches, 3))
    batches.close()
    np.testing.assert_array_equal([b["x"] for b in taken], np.arange(5, 17).reshape(3, 4))
    assert taken[0]["row"].shape == (4, 2) and taken[0]["x"].dtype == np.int32


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_arrives_as_it_was_raised(engine: Callable[..., Any]) -> None:
    def make(position: int) -> dict[str, np.ndarray]:
        if position == 6:
            raise DataError("images/6.png: too damaged to use")
        return {"x": np.array(position)}

    batches = engine(make, 0, 2, 2)
    with pytest.raises(DataError, match="images/6.png: too damaged to use"):
        list(islice(batches, 10))


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    batches = input_lib._thread_pool_batches(lambda i: {"x": np.array(i)}, 0, 2, 4)
    assert isinstance(next(batches), dict)
    assert threading.active_count() > before
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert threading.active_count() == before
