"""The order of collectives where one CPU plays several devices, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np

from train.collective_order import after, several_here

BATCH = {"tokens": jnp.arange(6, dtype=jnp.int32), "weights": jnp.ones(6)}


def text_of():
    def program(batch, counts):
        return after(batch, counts)["tokens"]

    return jax.jit(program).lower(BATCH, {"loss": jnp.float32(3)}).as_text()


def test_a_batch_waits_for_its_counts_and_stays_what_it_is(strict):
    found = jax.jit(after)(BATCH, {"loss": jnp.float32(3), "other": jnp.int32(0)})
    jax.tree.map(np.testing.assert_array_equal, found, BATCH)
    assert "select" in text_of()  # and so depends on them


def test_one_device_and_other_machines_wait_for_nothing(monkeypatch):
    assert several_here()
    elsewhere = jax.sharding.AbstractMesh(
        (2,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu"),
    )
    with jax.sharding.use_abstract_mesh(elsewhere):
        assert not several_here()
    for name, value in (("device_count", 1), ("default_backend", "gpu")):
        with monkeypatch.context() as patch:
            patch.setattr(jax, name, lambda value=value: value)
            assert "select" not in text_of()
