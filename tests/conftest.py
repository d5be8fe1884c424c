"""Eight virtual CPU devices for every test, and strict promotion for our own code."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def strict():
    """Implicit dtype and rank promotion raise: use it around our own code (Optax relies on it)."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
