"""The asynchronous parameter server on Ray: shards and workers as actors (extra `ray`).

    driver:  a worker is done -> give it its next step;  it died -> start another in its place
    worker:  pull all shards, compute, push to all, again and again until each has answered
    shard:   `parallel.parameter_server_shard.Shard`; Ray starts it anew when its process dies

No worker waits for another. What makes deaths harmless is in the shard: its log, and numbered
pushes. Its folder must be seen by every machine on which Ray may start it again.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import optax

from parallel.parameter_server_elementwise import check_elementwise
from parallel.parameter_server_shard import Counts, Push, Reply, Shard, cut, work

Result = TypeVar("Result")
# `make() -> (parameters [n], number of the step) -> (gradient [n], loss)`, made in the worker.
MakeGradient = Callable[[], Callable[[np.ndarray, int], tuple[np.ndarray, float]]]

_INITIAL = "initial.npy"  # in the folder of a shard
_PAUSE = 0.1  # seconds between two calls of a shard that is being started


class Done(NamedTuple):
    """A worker's step that is over.

    Attributes:
      worker: its place, from 0.
      name: the worker's name at the servers, which changes when it is started anew.
      number: of the step of that name, from 1; 0 where the worker died.
      replies: one a shard; empty where the worker died.
      loss: of the step.
      seconds: that it computed, before it was padded to the worker's pace.
    """

    worker: int
    name: str
    number: int
    replies: Sequence[Reply]
    loss: float
    seconds: float


class RemoteShard:
    """A shard in another process, as `parallel.parameter_server_shard.Server` asks.

    A call that gets no answer is made again, a push with the same number.

    Args:
      actor: from `start_shards`.
      patience: seconds after which a shard that does not come back is an error.

    Raises (when called):
      TimeoutError: it did not come back.
    """

    def __init__(self, actor: Any, patience: float = 60.0) -> None:
        self._actor, self._patience = actor, patience

    def pull(self) -> tuple[int, np.ndarray]:
        """See `Shard.pull`."""
        return self._ask(lambda: self._actor.pull.remote())

    def push(self, push: Push) -> Reply:
        """See `Shard.push`."""
        return self._ask(lambda: self._actor.push.remote(push))

    def counts(self) -> Counts:
        """See `Shard.counts`."""
        return self._ask(lambda: self._actor.counts.remote())

    def _ask(self, call: Callable[[], Any]) -> Any:
        import ray

        end = time.monotonic() + self._patience
        while True:
            try:
                return ray.get(call(), timeout=max(_PAUSE, end - time.monotonic()))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"a shard of the parameter server did not come back in {self._patience:g} "
                        f"s: {type(error).__name__}: {error}"
                    ) from error
                time.sleep(_PAUSE)


class _ShardActor(Shard):
    """A shard whose process ends when its disk fails, so that Ray starts one that replays.

    Its initial parameters come from its folder: Ray keeps large arguments of an actor in a store
    that may have let go of them by the time it starts the actor again.
    """

    def __init__(
        self,
        folder: Path,
        optimizer: optax.GradientTransformation,
        *,
        bound: int,
        compact_every: int,
    ) -> None:
        initial = np.load(folder / _INITIAL)
        super().__init__(folder, initial, optimizer, bound=bound, compact_every=compact_every)

    def push(self, push: Push) -> Reply:
        try:
            return super().push(push)
        except OSError:
            os._exit(1)  # what the disk has is known only to a process that reads it


class _WorkerActor:
    """Computes and pushes; all that it knows of the run is the number of its step."""

    def __init__(self, name: str, shards: Sequence[Any], make: MakeGradient, pace: float) -> None:
        self._name, self._pace = name, pace
        self._servers = [RemoteShard(actor) for actor in shards]
        self._gradient = make()

    def ready(self) -> None:
        """Returns once there is a worker."""

    def step(self, number: int, batch: int) -> tuple[list[Reply], float, float]:
        seconds = 0.0

        def gradient(flat: np.ndarray) -> tuple[np.ndarray, float]:
            nonlocal seconds
            grads, loss, seconds = self.gradient(flat, batch)
            return grads, loss

        return *work(self._servers, gradient, self._name, number), seconds

    def gradient(self, flat: np.ndarray, batch: int) -> tuple[np.ndarray, float, float]:
        """Gradient, loss and seconds, no sooner than the worker's pace."""
        start = time.monotonic()
        grads, loss = self._gradient(flat, batch)
        seconds = time.monotonic() - start
        time.sleep(max(0.0, self._pace - seconds))
        return grads, loss, seconds


def start_shards(
    folder: Path | str,
    params: np.ndarray,
    optimizer: optax.GradientTransformation,
    *,
    servers: int,
    bound: int,
    compact_every: int = 100,
) -> list[Any]:
    """Starts the shards as Ray actors, after `ray.init`; takes up what is in their folders.

    Args:
      folder: of all shards' folders.
      params: [n] initial parameters, laid end to end.
      optimizer: see `Shard`.
      servers: number of shards.
      bound: see `Shard`.
      compact_every: see `Shard`.

    Raises:
      ImportError: without Ray.
      ValueError: as `Shard` and `cut`.
    """
    import ray

    check_elementwise(optimizer, params)
    folder = Path(folder).resolve()
    # Without CPUs of their own: they wait for most of the time. A task is not repeated by Ray, as
    # a push is repeated by its worker.
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(_ShardActor)
    shards = []
    for number, part in enumerate(cut(params, servers)):
        of_shard = folder / f"shard_{number}"
        _keep_initial(of_shard, part)
        shards.append(actor.remote(of_shard, optimizer, bound=bound, compact_every=compact_every))
    ray.get([shard.counts.remote() for shard in shards])  # or its error would come much later
    return shards


def _keep_initial(folder: Path, part: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"new.{_INITIAL}"
    with beside.open("wb") as file:
        np.save(file, part, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / _INITIAL)


class Workers:
    """Workers as Ray actors, one step at a time each, at their own pace; all ready once made.

    Args:
      shards: from `start_shards`.
      make: makes the gradient function in the worker's process.
      paces: seconds that a step of each worker takes at least, from its pull to its push; 0 for as
        fast as it computes. Their number is that of the workers.

    Raises:
      ValueError: without workers.
    """

    def __init__(self, shards: Sequence[Any], make: MakeGradient, paces: Sequence[float]) -> None:
        if not paces:
            raise ValueError("no worker; give the pace of at least one")
        import ray

        self._shards, self._make, self._paces = list(shards), make, list(paces)
        self._starts = [0] * len(paces)
        self.actors = [self._start(worker) for worker in range(len(paces))]
        ray.get([actor.ready.remote() for actor in self.actors])  # or the first has a long lead

    def _start(self, worker: int) -> Any:
        import ray

        self._starts[worker] += 1
        actor = ray.remote(num_cpus=0, max_restarts=0)(_WorkerActor)
        return actor.remote(self.name(worker), self._shards, self._make, self._paces[worker])

    def name(self, worker: int) -> str:
        """Returns the name that a worker has at the servers: its place, and how often it started.

        A push of one that died may still arrive; it must not count as one of its successor.
        """
        return f"{worker}.{self._starts[worker]}"

    def run(self, steps: int, patience: float = 60.0) -> Iterator[Done]:
        """Yields every step that ends, of whichever worker, until all have.

        The steps compute on batches 0, 1, ... in the order in which they begin. A worker that died
        is started anew; the step that it was at ends with it, as one without replies.

        Args:
          steps: of all workers together.
          patience: seconds in which some worker must end a step.

        Raises:
          TimeoutError: none did.
        """
        import ray

        numbers, batch = [0] * len(self.actors), 0
        waiting: dict[Any, int] = {}

        def submit(worker: int) -> None:
            nonlocal batch
            if batch < steps:
                numbers[worker] += 1
                reference = self.actors[worker].step.remote(numbers[worker], batch)
                waiting[reference] = worker
                batch += 1

        for worker in range(len(self.actors)):
            submit(worker)
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=patience)
            if not ready:
                raise TimeoutError(f"no worker ended a step in {patience:g} s; see Ray's log")
            worker = waiting.pop(ready[0])
            name = self.name(worker)
            try:
                done = Done(worker, name, numbers[worker], *ray.get(ready[0]))
            except ray.exceptions.RayActorError:
                self.actors[worker], numbers[worker] = self._start(worker), 0
                done = Done(worker, name, 0, (), float("nan"), 0.0)
            submit(worker)
            yield done

    def gradients(self, flat: np.ndarray, batch: int) -> list[tuple[np.ndarray, float, float]]:
        """Returns gradient, loss and seconds of every worker at the same parameters.

        All are waited for: the synchronous form, to compare with.

        Worker w computes on batch `batch + w`.
        """
        import ray

        shared = ray.put(flat)
        return ray.get(
            [actor.gradient.remote(shared, batch + w) for w, actor in enumerate(self.actors)]
        )

    def stop(self) -> None:
        """Ends the workers' processes."""
        import ray

        for actor in self.actors:
            ray.kill(actor)


def acknowledged(done: Sequence[Done], servers: int) -> list[dict[str, int]]:
    """Returns, for each shard, worker name -> number of its pushes that were acknowledged.

    >>> done = [Done(0, "0.1", 1, (Reply("applied", 1), Reply("stale", 9)), 2.0, 0.1)]
    >>> acknowledged(done, 2)
    [{'0.1': 1}, {}]
    """
    sums: list[dict[str, int]] = [{} for _ in range(servers)]
    for each in done:
        for shard, reply in enumerate(each.replies):
            if reply.acknowledged:
                sums[shard][each.name] = sums[shard].get(each.name, 0) + 1
    return sums


def audit(done: Sequence[Done], counts: Sequence[Counts]) -> dict[str, int]:
    """Returns the sums over shards of updates acknowledged, applied, and how they differ.

    `lost` are acknowledged and not applied, and must be 0. `unheard` are applied and their worker
    died, or the run ended, before it heard of it: at most one a shard for each worker that did.
    `skipped` were never sent, as their gradients were not finite.

    >>> done = [Done(0, "0.1", 1, (Reply("applied", 1),), 2.0, 0.1)]
    >>> audit(done, [Counts(2, {"0.1": 2}, {"0.1": 2}, 0, 0, 0)])
    {'acknowledged': 1, 'applied': 2, 'lost': 0, 'unheard': 1, 'stale': 0, 'seen': 0, \
'skipped': 0}
    """
    heard = acknowledged(done, len(counts))
    outcomes = Counter(reply.outcome for each in done for reply in each.replies)
    lost = unheard = 0
    for told, count in zip(heard, counts, strict=True):
        for name in {*told, *count.of_worker}:
            difference = count.of_worker.get(name, 0) - told.get(name, 0)
            unheard, lost = unheard + max(0, difference), lost + max(0, -difference)
    return {
        "acknowledged": sum(sum(told.values()) for told in heard),
        "applied": sum(count.applied for count in counts),
        "lost": lost,
        "unheard": unheard,
        **{name: outcomes[name] for name in ("stale", "seen", "skipped")},
    }
