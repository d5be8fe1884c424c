"""Trees that are stored by their content: once, whole, and by a hash of what they hold."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.checkpoint_cases import (
    Pair,
    abstract,
    assert_same,
    flip_a_bit,
    mesh,
    small,
)
from train import tree_store
from train.checkpoints import (
    load_tree,
    save_tree,
    tree_hash,
)
from train.manifest import MANIFEST


def test_a_tree_is_stored_once_and_comes_back(tmp_path):
    tree = {
        "base": {"a/b": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "c": jnp.uint8(3)},
        "key": jax.random.key(2),
        "empty": jnp.zeros((2, 0)),
    }
    folder = tmp_path / "frozen"
    digest = save_tree(folder, tree)
    assert digest == tree_hash(tree)
    assert_same(load_tree(folder), tree)
    assert_same(load_tree(folder, abstract(tree)), tree)
    written = (folder / MANIFEST).stat().st_mtime_ns
    assert save_tree(folder, tree) == digest
    assert (folder / MANIFEST).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds another tree"):
        save_tree(folder, {**tree, "key": jax.random.key(3)})
    with pytest.raises(ValueError, match=r"key key<fry>.* is in it but not asked for"):
        load_tree(folder, {k: v for k, v in tree.items() if k != "key"})
    assert os.listdir(tmp_path) == ["frozen"]
    name = flip_a_bit(folder)
    for call in (lambda: load_tree(folder), lambda: save_tree(folder, tree)):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(FileNotFoundError, match="none"):
        load_tree(tmp_path / "none")


def test_trees_of_other_shapes(tmp_path):
    nodes = Pair(jnp.ones(2), (jnp.int32(1), {}))
    save_tree(tmp_path / "nodes", nodes)
    assert_same(load_tree(tmp_path / "nodes", nodes), nodes)
    assert_same(
        load_tree(tmp_path / "nodes"), {"first": jnp.ones(2), "second": {"0": jnp.int32(1)}}
    )
    for name, tree in {"empty": {}, "leaf": jnp.arange(3)}.items():
        save_tree(tmp_path / name, tree)
        assert_same(load_tree(tmp_path / name), tree)


def test_a_stale_half_of_a_tree_is_cleared(tmp_path, monkeypatch):
    stale = tmp_path / "frozen.writing" / "tree-0.orbax-checkpoint-tmp"
    stale.mkdir(parents=True)

    def start_write(folder, leaves, start=tree_store.start_write):
        assert not stale.exists()  # its space is free before new space is taken
        return start(folder, leaves)

    monkeypatch.setattr(tree_store, "start_write", start_write)
    save_tree(tmp_path / "frozen", small(1))
    assert os.listdir(tmp_path) == ["frozen"]


def test_a_tree_that_another_process_finishes_first_stays(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def lock(path, lock=tree_store.lock):
        monkeypatch.undo()
        save_tree(path.parent.with_suffix(""), small(2))
        path.parent.mkdir()
        with lock(path):
            yield

    monkeypatch.setattr(tree_store, "lock", lock)
    with pytest.raises(ValueError, match="holds another tree"):
        save_tree(tmp_path / "frozen", small(1))
    assert_same(load_tree(tmp_path / "frozen"), small(2))


def test_the_hash_sees_values_names_types_and_shapes_but_not_places(strict):
    x = jnp.arange(8.0)
    spread = jax.device_put(x, NamedSharding(mesh(8), P("a")))
    assert tree_hash({"x": x}) == tree_hash({"x": spread}) == tree_hash({"x": np.asarray(x)})
    assert tree_hash({"x": x, "y": x}) == tree_hash({"y": x, "x": x})
    key, rbg = jax.random.key(0), jax.random.key(0, impl="rbg")
    others = [
        {"x": x.at[3].set(3.5)},
        {"x": -x},
        {"z": x},
        {"x": {"y": x}},
        {"x": x.reshape(2, 4)},
        {"x": x.astype(jnp.int32)},
        {"x": x, "empty": jnp.zeros(0)},
        {"x": x, "empty": jnp.zeros((0, 1))},
        {"x": key},
        {"x": rbg},
        {"x": jax.random.key_data(key)},
        {"a/b": x},
        {"a": {"b": x}},
    ]
    assert len({tree_hash(tree) for tree in [{"x": x}, *others]}) == len(others) + 1
