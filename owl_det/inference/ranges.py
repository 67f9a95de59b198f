"""Numbers that a user gives, each with the range that makes sense."""

import operator
from numbers import Real
from typing import Any

from owl_det.errors import DataError


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1]. Raises `DataError` for any other value, NaN included."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else -1.0
    if not 0 <= number <= 1:
        raise DataError(f"{name}: {value!r} is not a number in [0, 1]")
    return number


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`. Raises `DataError` for any other value."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        kind = "positive" if least == 1 else f"at least {least}"
        raise DataError(f"{name}: must be a whole number, {kind}; got {value!r}")
    return number
