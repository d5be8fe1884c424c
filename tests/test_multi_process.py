"""Real processes: what they agree on, checkpoints that they write together, one signal for all."""

import json
import shutil
import sys
import time

import pytest

from experiments.runs.run import open_run
from experiments.scale.process_runs import (
    difference,
    finish,
    free_port,
    launch,
    losses,
    pretrain,
    run,
    table,
    write_text,
)

pytestmark = pytest.mark.slow

TALK = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from parallel.agreement import *
from parallel.mesh import make_mesh
from parallel.processes import connect
from train.checkpoints import Checkpoints, CheckpointSettings
from train.tree_store import load_tree, save_tree, tree_hash

folder, count = Path(sys.argv[1]), 2
number = int(sys.argv[-1])
assert connect(sys.argv[3], count, number, timeout=120)
long = "é" * 3000
assert gather_texts(long if number else "short") == ["short", long]

def refuse(error, work):
    try:
        work()
    except error as found:
        return str(found)
    raise AssertionError("nothing was raised")

def fail():
    raise ValueError("a reason")

assert "a reason" in refuse(ValueError, lambda: by_main(fail))
assert by_main(lambda: {"from": number}) == {"from": 0}
said = refuse(ValueError, lambda: together(fail if number else lambda: 1))
assert said == ("a reason" if number else "a reason (in process 1)")

mesh = make_mesh(data=2, fsdp=2)
agree = highest(mesh)
assert [int(agree(15 if number == n else 0)) for n in (0, 1, 2)] == [15, 15, 0]

# Leaves in every layout, an empty one, a weakly typed one, a key.
along, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
def draw():
    return {
        "params": {"a": jnp.arange(8.0), "b": jnp.ones((4, 2)), "none": jnp.zeros((0, 3))},
        "rng": jax.random.key(3),
        "step": jnp.asarray(7),
        "weak": jnp.full((), 2.0),
    }
placed = {
    "params": {"a": along, "b": NamedSharding(mesh, P("fsdp")), "none": whole},
    "rng": whole, "step": whole, "weak": whole,
}
state = jax.jit(draw, out_shardings=placed)()
assert state["weak"].weak_type
assert whole_array(state["params"]["a"]).tolist() == list(range(8))
with Checkpoints(folder / "checkpoints", CheckpointSettings(keep_last=1)) as checkpoints:
    assert checkpoints.steps() == []
    refuse(FileNotFoundError, lambda: checkpoints.restore(state))
    checkpoints.save(1, state, {"phase": 0}, loss=3.0)
    checkpoints.save(2, state, {"phase": 0}, loss=4.0)
    checkpoints.save(3, state, {"phase": 1}, loss=5.0, wait=True)
    assert checkpoints.steps() == [1, 3], checkpoints.steps()
    assert "which has steps [3]" in refuse(ValueError, lambda: checkpoints.save(2, state, {}))
    other = {**placed, "params": {"a": whole, "b": along, "none": whole}}
    abstract = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, other
    )
    found = checkpoints.restore(abstract)
    assert (found.step, found.info) == (3, {"phase": 1})
    assert found.state["weak"].weak_type
    for name, leaf in found.state["params"].items():
        assert leaf.sharding == other["params"][name], name
        assert (whole_array(leaf) == whole_array(state["params"][name])).all()
frozen = {"base": state["params"]}
digest = save_tree(folder / "frozen", frozen)
assert digest == save_tree(folder / "frozen", frozen) == tree_hash(frozen)
assert "holds another tree" in refuse(
    ValueError, lambda: save_tree(folder / "frozen", {"base": {"a": state["params"]["a"] + 1}})
)
back = load_tree(folder / "frozen", {"base": {n: a for n, a in abstract["params"].items()}})
assert tree_hash(back) == digest
local = load_tree(folder / "frozen")  # each process its own copy, as when it opens another run
assert local["base"]["a"].tolist() == list(range(8))
moved = spread(local, {"base": other["params"]})
assert tree_hash(moved) == digest
print("all said", number)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))


def test_two_processes_agree_and_write_together(tmp_path):
    command = [sys.executable, "-c", TALK, str(tmp_path)]
    for number, (status, output, errors) in enumerate(finish(launch([command] * 2, 2, tmp_path))):
        assert status == 0, errors[-3000:]
        assert f"all said {number}" in output
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "3", "lock"]
    assert not (tmp_path / "frozen.writing").exists()


def test_processes_devices_signals_and_moves(tmp_path):
    """Within 1e-6: gloo adds in another order than the threads of one process."""
    rows = table(tmp_path / "table")
    by_case = {(row["case"], row["against"]): row for row in rows}
    assert by_case["4 x 1", "2 x 2"]["difference"] == 0.0
    assert len(rows) == 7
    for row in rows:
        assert row["difference"] < 1e-6, row
    for first in ("2 x 2", "1 x 4"):
        stopped = by_case[f"{first}, SIGTERM to the last process", "1 x 4"]
        assert set(stopped["exits"]) == {143}
        assert 3 <= stopped["saved"] < 40
        assert stopped["losses"] >= stopped["saved"]


def test_other_settings_are_refused_by_name(tmp_path):
    write_text(tmp_path)
    out = tmp_path / "run"
    commands = [pretrain(tmp_path, out, seed=seed) for seed in (1, 2)]
    for status, _, errors in finish(launch(commands, 2, tmp_path)):
        assert status == 2, errors[-2000:]
        assert "the settings of process 1 of 2 differ from those of process 0" in errors
        assert "seed" in errors
    assert not out.exists()


def test_a_parent_and_what_is_frozen_move_between_processes(tmp_path):
    """From a run of one process, frozen in part, begun by two processes and ended by one."""
    write_text(tmp_path)
    parent, out = tmp_path / "parent", tmp_path / "child"
    run(pretrain(tmp_path, parent, steps=4), 1, 4, tmp_path)

    def child(folder):
        changes = {"from": parent, "model": None, "tokenizer": None, "checkpoint_every": 2}
        words = pretrain(tmp_path, folder, **changes | {"steps": 4, "optimizer": "muon"})
        return [*words, "--method", "freeze", "--freeze.rules", "token_embedding"]

    command = child(out)
    run(command, 2, 2, tmp_path)
    alone = tmp_path / "alone"
    run(child(alone), 1, 4, tmp_path)
    assert difference(losses(alone), losses(out)) < 1e-6
    assert (out / "frozen" / "manifest.json").exists()
    shutil.rmtree(out / "checkpoints" / "4")
    (out / "result.json").unlink()
    before = losses(out)
    run(command, 1, 4, tmp_path)
    assert difference(before, losses(out)) < 1e-6
    assert open_run(out).step == 4
    assert json.loads((out / "result.json").read_text())["reason"] == "finished"


def test_one_that_is_killed_ends_the_other(tmp_path):
    write_text(tmp_path)
    out = tmp_path / "run"
    started = launch([pretrain(tmp_path, out, steps=100_000)] * 2, 2, tmp_path)
    while not (out / "metrics.jsonl").exists() and started[0].poll() is None:
        time.sleep(0.1)
    started[1].kill()
    (status, _, errors), _ = finish(started, limit=240)
    assert status not in (0, None), errors[-2000:]


def test_an_unreachable_coordinator_is_one_sentence(tmp_path):
    write_text(tmp_path)
    flags = {"num_processes": 2, "process_id": 1, "connect_timeout": 2}
    where = f"127.0.0.1:{free_port()}"
    command = pretrain(tmp_path, tmp_path / "run", coordinator=where, **flags)
    [(status, _, errors)] = finish(launch([command], 1, tmp_path))
    assert status == 2
    assert errors.startswith("error: process 1 could not reach the coordinator")
    assert not (tmp_path / "run").exists()
