"""What a process holds of compiled programs, and when it lets go of it."""

import jax
import jax.numpy as jnp
import pytest

from experiments import compilation
from experiments.compilation import MAPPINGS, forget_programs_if_many, mappings


def test_mappings_are_lines_of_the_kernels_list_where_there_is_one(tmp_path):
    assert mappings(tmp_path / "none") == 0
    maps = tmp_path / "maps"
    maps.write_text("one\ntwo\n")
    assert mappings(maps) == 2


@pytest.mark.parametrize("held", [MAPPINGS, MAPPINGS + 1])
def test_programs_are_forgotten_where_they_hold_too_many(held, monkeypatch, compilations):
    monkeypatch.setattr(compilation, "mappings", lambda: held)

    @jax.jit
    def tripled(x):
        return 3 * x

    for _ in range(2):
        tripled(jnp.ones(2))
        forget_programs_if_many()
    assert compilations["jit(tripled)"] == (2 if held > MAPPINGS else 1)
