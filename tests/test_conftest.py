"""The test session is as strict as it claims to be."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from owl_det import boxes


def test_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="unexpected"):
        warnings.warn("unexpected", stacklevel=1)


def test_shapes_are_checked_at_calls():
    with pytest.raises(TypeCheckError):
        boxes.cxcywh_to_xyxy(jnp.ones((2, 5)))
