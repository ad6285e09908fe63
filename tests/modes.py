"""JAX's strict modes as a fixture: `from tests.modes import mode`, and take `mode` in a test."""

from collections.abc import Iterator

import jax
import pytest

MODES = {
    "no jit": lambda: jax.disable_jit(),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
}
"""Context managers by name: each ends as it found JAX's settings."""


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once in each of the three modes."""
    with MODES[request.param]():
        yield request.param
