"""A shard that dies at every point of its protocol: acknowledged is applied, exactly once.

Push i is the i-th unit vector and the optimizer subtracts it, so number i of the parameters says
how often push i was applied.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallel import parameter_server_shard
from parallel.parameter_server_log import Disk
from parallel.parameter_server_shard import Push, Shard, cut, flatten, unflatten, work

PUSHES = 5


class Died(Exception):
    pass


class DyingDisk(Disk):
    """Dies in operation `at`: before it, right after it, or half-way through the next write.

    With `lossy` the disk has nothing of what was not synced, as after a power cut; else all of it.
    """

    def __init__(self, at=None, how="before", lossy=False):
        self.at, self.how, self.lossy = at, how, lossy
        self.count, self.pending = 0, []

    def _do(self, operation, half=None):
        now = self.count == self.at
        self.count += 1
        if now and self.how == "before":
            raise Died
        if self.how == "half" and self.at is not None and self.count > self.at and half:
            half()
            raise Died
        operation()
        if now and self.how == "after":
            raise Died

    def write(self, file, content):
        def put(part):
            if self.lossy:
                self.pending.append(lambda: file.write(part))
            else:
                file.write(part)

        self._do(lambda: put(content), lambda: put(content[: len(content) // 2]))

    def truncate(self, file, size):
        def operation():
            # Where a file is written next is the process's affair, not the disk's.
            cut_off = lambda: super(DyingDisk, self).truncate(file, size)
            if self.lossy:
                self.pending.append(cut_off)
            else:
                cut_off()

        self._do(operation)

    def sync(self, file):
        def operation():
            for each in self.pending:
                each()
            self.pending = []
            super(DyingDisk, self).sync(file)

        self._do(operation)

    def replace(self, source, target):
        self._do(lambda: super(DyingDisk, self).replace(source, target))

    def sync_folder(self, folder):
        self._do(lambda: super(DyingDisk, self).sync_folder(folder))


@pytest.fixture
def fast(monkeypatch):
    """The optimizers here are elementwise: hundreds of shards need not try it out."""
    monkeypatch.setattr(parameter_server_shard, "check_elementwise", lambda *_: None)


def open_shard(folder, disk=None, optimizer=None, bound=10, size=PUSHES, **kwargs):
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    initial = np.zeros(size, np.float32)
    return Shard(folder, initial, optimizer, bound=bound, disk=disk, compact_every=2, **kwargs)


def unit(i, worker="a", number=None, version=0):
    return Push(worker, number or i + 1, version, np.eye(PUSHES, dtype=np.float32)[i])


def pushed_through_a_death(folder, at, how, lossy):
    """Pushes all, starting the shard again and sending the push again when it dies.

    Returns whether it died, and the replies.
    """
    disk, shard, died, replies = DyingDisk(at, how, lossy), None, False, []
    for i in range(PUSHES):
        while True:
            try:
                if shard is None:
                    shard = open_shard(folder, disk)
                replies.append(shard.push(unit(i)))
                break
            except Died:
                assert not died
                died, shard, disk = True, None, Disk()
    if shard is not None:
        shard.close()
    return died, replies


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("how", ["before", "half", "after"])
def test_dying_at_any_point_costs_no_acknowledged_update(fast, tmp_path, how, lossy):
    died, at = True, 0
    while died:
        folder = tmp_path / str(at)
        died, replies = pushed_through_a_death(folder, at, how, lossy)
        assert {reply.outcome for reply in replies} <= {"applied", "seen"}
        shard = open_shard(folder)  # and once more, from what the disk has
        version, params = shard.pull()
        np.testing.assert_array_equal(params, -np.ones(PUSHES), err_msg=f"death at {at}")
        assert version == PUSHES
        assert shard.counts().of_worker == {"a": PUSHES}
        assert shard.counts().numbers == {"a": PUSHES}
        shard.close()
        at += 1
    assert at > 20  # openings, appends and two snapshots were all gone through


def test_dying_again_and_again_is_as_not_dying_at_all(fast, tmp_path):
    """Two workers, two shards, Adam, deaths at drawn points, of shards and of recoveries too."""
    optimizer, draw = optax.adam(0.1), np.random.default_rng(0)
    gradients = draw.normal(size=(12, 6)).astype(np.float32)
    want = [open_shard(tmp_path / f"calm {i}", optimizer=optimizer, size=3) for i in range(2)]
    folders, deaths, acknowledged = [tmp_path / f"wild {i}" for i in range(2)], 0, []
    shards = [None, None]
    for i, gradient in enumerate(gradients):
        worker, number = "ab"[i % 2], i // 2 + 1
        for s, part in enumerate(cut(gradient, 2)):
            want[s].push(Push(worker, number, i, part))
            while True:
                try:
                    if shards[s] is None:
                        how = str(draw.choice(["before", "half", "after"]))
                        disk = DyingDisk(int(draw.integers(0, 12)), how, bool(draw.integers(2)))
                        shards[s] = open_shard(folders[s], disk, optimizer, size=3)
                    reply = shards[s].push(Push(worker, number, i, part))
                    assert reply.outcome != "stale"
                    acknowledged.append((s, worker, number))
                    break
                except Died:
                    deaths, shards[s] = deaths + 1, None
    assert deaths > 10
    for s in range(2):
        shards[s].close()
        again = open_shard(folders[s], optimizer=optimizer, size=3)
        np.testing.assert_array_equal(again.pull()[1], want[s].pull()[1])  # bit for bit
        assert again.counts().of_worker == {"a": 6, "b": 6}
        assert again.counts().applied == sum(each[0] == s for each in acknowledged) == 12


def test_a_push_sent_again_is_applied_once(fast, tmp_path):
    shard = open_shard(tmp_path)
    assert shard.push(unit(0)).outcome == "applied"
    assert shard.push(unit(0)).outcome == "seen"
    assert shard.push(unit(1, worker="b", number=1)).outcome == "applied"
    assert shard.push(unit(0)) == ("seen", 2)
    np.testing.assert_array_equal(shard.pull()[1], [-1, -1, 0, 0, 0])
    counts = shard.counts()
    assert (counts.applied, counts.seen, counts.of_worker) == (2, 2, {"a": 1, "b": 1})


def test_a_late_push_of_a_dead_worker_does_not_hide_one_of_its_successor(fast, tmp_path):
    shard = open_shard(tmp_path)
    assert shard.push(unit(0, worker="0.1", number=1)).outcome == "applied"
    late = unit(1, worker="0.1", number=2)
    assert shard.push(unit(2, worker="0.2", number=1)).outcome == "applied"
    assert shard.push(late).outcome == "applied"
    assert shard.push(unit(3, worker="0.2", number=2)).outcome == "applied"
    np.testing.assert_array_equal(shard.pull()[1], [-1, -1, -1, -1, 0])


def test_what_is_too_old_is_refused_and_counted(fast, tmp_path):
    shard = open_shard(tmp_path, bound=2)
    for i in range(3):
        assert shard.push(unit(i, version=max(0, i - 1))).outcome == "applied"
    assert shard.push(unit(3, worker="slow", number=1, version=0)) == ("stale", 3)
    assert shard.push(unit(3, worker="slow", number=2, version=1)) == ("applied", 4)
    counts = shard.counts()
    assert (counts.stale, counts.applied, counts.of_worker) == (1, 4, {"a": 3, "slow": 1})
    np.testing.assert_array_equal(shard.pull()[1], [-1, -1, -1, -1, 0])


def test_workers_and_shards_are_the_optimizer(tmp_path):
    """One worker after the other against Optax on the whole vector."""
    optimizer = optax.adamw(0.1, weight_decay=0.01)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(1)}
    loss = lambda p: jnp.square(jnp.sin(p["w"]).sum(axis=0) - p["b"]).sum()

    @jax.jit
    def gradient(flat):
        value, grads = jax.value_and_grad(lambda f: loss(unflatten(f, params)))(flat)
        return grads, value

    shards = [
        Shard(tmp_path / str(i), part, optimizer, bound=0)
        for i, part in enumerate(cut(flatten(params), 3))
    ]
    state = optimizer.init(params)
    for number in range(1, 4):
        replies, value = work(shards, lambda flat: jax.device_get(gradient(flat)), "w", number)
        assert [reply.outcome for reply in replies] == ["applied"] * 3
        assert float(value) == pytest.approx(float(loss(params)), rel=1e-6)
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    got = unflatten(np.concatenate([shard.pull()[1] for shard in shards]), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, params)


def test_a_gradient_that_is_not_finite_is_skipped_by_all_shards(fast, tmp_path):
    """One bad number is in the second part alone, and the first is not pushed either."""
    shards = [open_shard(tmp_path / str(i), size=2) for i in range(2)]
    bad = np.array([1, 1, 1, np.inf], np.float32)
    replies, loss = work(shards, lambda flat: (bad, 7.0), "a", 1)
    assert replies == [("skipped", 0), ("skipped", 0)]
    assert loss == 7.0
    replies, _ = work(shards, lambda flat: (np.ones(4, np.float32), 7.0), "a", 2)
    assert [reply.outcome for reply in replies] == ["applied"] * 2
    assert [shard.counts().applied for shard in shards] == [1, 1]


def test_errors(tmp_path):
    shard = open_shard(tmp_path)
    with pytest.raises(ValueError, match="computed at version 3, and the shard is at 0"):
        shard.push(unit(0, version=3))
    with pytest.raises(ValueError, match="gradient of shape"):
        shard.push(unit(0)._replace(gradient=np.ones(2)))
    with pytest.raises(ValueError, match="not finite"):
        shard.push(unit(0)._replace(gradient=np.full(PUSHES, np.nan)))
    assert shard.pull()[0] == 0
    for i in range(2):
        shard.push(unit(i))  # and a snapshot
    with pytest.raises(ValueError, match="other parameters or another optimizer"):
        open_shard(tmp_path, optimizer=optax.adam(0.1))
    with pytest.raises(ValueError, match="treat each number by itself"):
        open_shard(tmp_path / "b", optimizer=optax.lamb(0.1))
    with pytest.raises(ValueError, match="not int64 of shape"):
        Shard(tmp_path / "c", np.ones((2, 2), np.int64), optax.sgd(0.1), bound=1)
    with pytest.raises(ValueError, match="needs jax_enable_x64"):
        Shard(tmp_path / "c", np.ones(2), optax.sgd(0.1), bound=1)
    with pytest.raises(ValueError, match="bound of -1"):
        open_shard(tmp_path / "d", bound=-1)
    with pytest.raises(ValueError, match="3 servers for 2 numbers"):
        cut(np.ones(2), 3)
    with pytest.raises(ValueError, match="7 numbers for parameters of 2"):
        unflatten(np.ones(7), {"a": jnp.ones(2)})
