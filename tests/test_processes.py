"""Several processes: two real ones train like one; a coordinator that is not there."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from parallel.agreement import local_rows
from parallel.mesh import make_mesh
from parallel.processes import connect, launcher

ROOT = Path(__file__).parent.parent

TRAIN = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.presets import gpt2_tiny
from model.transformer import Transformer
from parallel.agreement import check_same, is_main, local_rows
from parallel.mesh import make_mesh
from parallel.placement import constrain, place_batch, state_shardings
from parallel.placement_strategies import strategies_for
from parallel.processes import connect
from train.losses import cross_entropy
from train.step import init_state, make_train_step

coordinator, count, number, text = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", 4 // count)
assert connect(coordinator, count, number, timeout=60)
mesh = make_mesh(data=2, fsdp=2)
print("rows", local_rows(mesh, 8), is_main())
check_same(text, "settings")

model, optimizer = Transformer(gpt2_tiny(dropout=0.0, layers=1)), optax.adamw(1e-2)
key = jax.random.key(0)

def first(key):
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return init_state(key, params, optimizer)

abstract = jax.eval_shape(first, key)
strategies = strategies_for(mesh, abstract.params)
shardings = state_shardings(mesh, abstract, strategies)
state = jax.jit(first, out_shardings=shardings)(key)
laid_out = Transformer(model.config, constrain=constrain(mesh, strategies))
step = jax.jit(
    make_train_step(laid_out, [cross_entropy()], optimizer),
    donate_argnums=0,
    out_shardings=(shardings, None),
)
for i in range(3):
    tokens = np.random.default_rng(i).integers(0, 64, (8, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch["weights"] = np.ones((8, 16), np.float32)
    state, metrics = step(state, {}, place_batch(mesh, batch))
    print("loss", float(metrics["loss"]).hex())
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(count, texts):
    """Output of each process."""
    address = f"127.0.0.1:{free_port()}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, address, str(count), str(i), texts[i]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        return [(*child.communicate(timeout=240), child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()


def losses(output):
    return [float.fromhex(line.split()[1]) for line in output.splitlines() if "loss" in line]


@pytest.mark.slow
def test_two_processes_train_like_one():
    """Within 1e-6: sums over processes are taken in another order than sums over threads."""
    (alone, errors, code) = run(1, ["same"])[0]
    assert code == 0, errors
    both = run(2, ["same", "same"])
    for _, errors, code in both:
        assert code == 0, errors
    assert losses(both[0][0]) == losses(both[1][0])
    assert len(losses(alone)) == 3
    np.testing.assert_allclose(losses(both[0][0]), losses(alone), rtol=1e-6)
    assert both[0][0].splitlines()[0] == "rows [0, 1, 2, 3] True"
    assert both[1][0].splitlines()[0] == "rows [4, 5, 6, 7] False"


@pytest.mark.slow
def test_processes_of_other_settings_are_refused():
    for _, errors, code in run(2, ["same", "other"]):
        assert code != 0
        assert "the settings of process 1 of 2 differ from those of process 0" in errors


def test_an_unreachable_coordinator_is_named_in_time():
    port = free_port()
    with pytest.raises(
        TimeoutError,
        match=rf"process 1 could not reach the coordinator at 127.0.0.1:{port} within 0.5 s",
    ):
        connect(f"127.0.0.1:{port}", 2, 1, timeout=0.5)


@pytest.mark.slow
def test_process_0_does_not_wait_for_ever():
    code = (
        "import sys; from parallel.processes import connect\n"
        f"connect('127.0.0.1:{free_port()}', 2, 0, timeout=3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "process 0 waited 3 s for all 2 processes" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("node0:1", 2, None), "--coordinator and --num-processes without --process-id"),
        ((None, None, 1), "--process-id without --coordinator and --num-processes"),
        (("node0:1", 2, 2), "process 2 of 2 processes; they are numbered from 0 to 1"),
        (("node0", 2, 1), "'node0'; write it as HOST:PORT"),
        ((":12", 2, 1), "':12'; write it as HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        connect(*flags)


def test_launchers():
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    assert launcher(slurm) == "Slurm"
    assert launcher(slurm | {"SLURM_NTASKS": "1"}) is None  # an allocation with one task
    assert launcher({"SLURM_JOB_ID": "7"}) is None
    assert launcher({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # any pod
    indexed = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    assert launcher(indexed) == "Kubernetes"
    assert launcher({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}) == "TPU pod"
    assert launcher({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}) is None
    assert launcher({}) is None


def test_rows_of_a_process_are_all_rows_when_it_is_alone():
    assert local_rows(make_mesh(data=4, tensor=2), 8) == list(range(8))
    assert jax.process_count() == 1
