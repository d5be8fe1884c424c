"""The asynchronous server on Ray: nobody waits, and deaths cost no acknowledged update."""

import numpy as np
import optax
import pytest

from parallel import parameter_server_ray as server
from parallel.parameter_server_shard import Counts, Reply

WIDTH = 60_000  # more than Ray sends along with a call: what is larger lies in its object store


def make_gradient():
    """Pulls every number to 1; the batch adds noise."""

    def gradient(flat, batch):
        noise = np.random.default_rng(batch).normal(size=flat.size)
        return (flat - 1 + 0.01 * noise).astype(np.float32), float(np.square(flat - 1).sum())

    return gradient


def make_gradient_with_a_bad_batch():
    """Batch 2 overflows."""
    gradient = make_gradient()

    def bad(flat, batch):
        grads, loss = gradient(flat, batch)
        return np.where(batch == 2, np.inf, grads), loss

    return bad


@pytest.fixture
def ray_runtime(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_shard(ray_runtime, tmp_path):
    ray, done = ray_runtime, []
    start = np.zeros(WIDTH, np.float32)
    shards = server.start_shards(tmp_path, start, optax.sgd(0.1), servers=2, bound=20)
    remote = [server.RemoteShard(shard) for shard in shards]
    workers = server.Workers(shards, make_gradient, paces=[0.05, 0.05, 0.5])
    for each in workers.run(60):
        done.append(each)
        if len(done) == 20:
            ray.kill(workers.actors[0])
            ray.kill(shards[1], no_restart=False)
    workers.stop()
    counts = [shard.counts() for shard in remote]
    found = server.audit(done, counts)

    assert [each.name for each in done if not each.replies] == ["0.1"]
    assert any(each.name == "0.2" and each.replies for each in done)
    assert counts[1].replayed > 10
    assert found["lost"] == 0
    assert found["unheard"] <= 2  # of the worker that was killed
    assert found["applied"] == found["acknowledged"] + found["unheard"]
    assert found["acknowledged"] == 2 * 59 - found["stale"]
    by_worker = [sum(each.worker == w for each in done) for w in range(3)]
    assert by_worker[1] > by_worker[2]  # the slow one holds nobody up
    params = np.concatenate([shard.pull()[1] for shard in remote])
    np.testing.assert_allclose(params, np.ones(WIDTH), atol=0.15)


@pytest.mark.slow
def test_a_bad_batch_does_not_end_the_run(ray_runtime, tmp_path):
    start = np.zeros(8, np.float32)
    shards = server.start_shards(tmp_path, start, optax.sgd(0.1), servers=2, bound=20)
    remote = [server.RemoteShard(shard) for shard in shards]
    workers = server.Workers(shards, make_gradient_with_a_bad_batch, paces=[0.0, 0.0])
    done = list(workers.run(6))
    workers.stop()
    found = server.audit(done, [shard.counts() for shard in remote])
    assert len(done) == 6
    assert (found["applied"], found["acknowledged"], found["skipped"]) == (10, 10, 2)


def test_audit_tells_lost_from_unheard():
    done = [
        server.Done(0, "0.1", 1, (Reply("applied", 1), Reply("applied", 1)), 0.0, 0.1),
        server.Done(0, "0.1", 2, (Reply("seen", 2), Reply("stale", 9)), 0.0, 0.1),
        server.Done(0, "0.1", 3, (Reply("skipped", 2), Reply("skipped", 9)), 0.0, 0.1),
        server.Done(0, "0.1", 0, (), 0.0, 0.1),
        server.Done(0, "0.2", 1, (Reply("applied", 4), Reply("applied", 10)), 0.0, 0.1),
    ]
    counts = [
        Counts(4, {}, {"0.1": 3, "0.2": 1}, 0, 0, 0),  # one that its dead worker never heard of
        Counts(1, {}, {"0.1": 1}, 0, 1, 0),  # one that was acknowledged and is gone
    ]
    assert server.audit(done, counts) == {
        "acknowledged": 5,
        "applied": 5,
        "lost": 1,
        "unheard": 1,
        "stale": 1,
        "seen": 1,
        "skipped": 2,
    }


def test_errors():
    with pytest.raises(ValueError, match="no worker"):
        server.Workers([], make_gradient, [])
