"""What privacy a run of DP-SGD has, by the accountant of Google's library `dp-accounting`.

A run is (epsilon, delta)-private if no example changes the probability of any outcome by more than
a factor e^epsilon, but for a probability delta (Dwork et al. 2006). An example is one row of the
batches (the shortest rows, where phases differ; of a task also a window of a paragraph, or a row
that conversations were packed into): text that is cut into several rows, or stands in the data
several times, is that many examples. To change an example is to empty its row, which leaves the
others in their places ("zero-out" neighbours); to put another in its place moves the sum by up to
2 C, as much as half the noise would.

Two numbers are given, for two ways in which batches may come about:

* **partition**: how ours do. Each epoch is a random order of all examples, cut into batches one
  after the other, so that an example is in one batch an epoch, and as many Gaussian mechanisms
  compose as there are epochs; that the order is random earns nothing. A batch that runs over the
  end of an epoch may hold an example twice, and is counted as if it did, for as many examples as
  that can happen to. It holds for any order.
* **poisson**: what most papers report. Every example joins every batch by a coin of its own, and
  the randomness amplifies privacy. Batches of ours are not drawn so; the number tells what the same
  noise would be said to give, and is no claim about the run (Chua et al. 2024, arXiv:2403.17673,
  measure how far shuffled batches can stay behind it).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from model.extras import from_extra


class Privacy(NamedTuple):
    """What a run has spent.

    Attributes:
      delta: see above.
      partition, poisson: epsilon; infinite without noise.
      participations: times that an example was in a batch, at most.
      sampling_rate: of "poisson", the largest share of the examples of a source in one batch.
      examples: of all sources.
    """

    delta: float
    partition: float
    poisson: float
    participations: int
    sampling_rate: float
    examples: int

    def __str__(self) -> str:
        return (
            f"privacy: epsilon {self.partition:.3g} at delta {self.delta:.2g} for one of "
            f"{self.examples:,} rows, each used at most {self.participations} times (no "
            f"amplification by sampling is assumed; with Poisson sampling, which this run did not "
            f"have, the same noise would count as {self.poisson:.3g})"
        )


def spent(
    noise: float,
    batches: Sequence[int],
    sources: Sequence[tuple[int, float]],
    delta: float | None = None,
) -> Privacy:
    """Returns what a run has spent.

    "partition" is exact for the Gaussian mechanism (Balle & Wang 2018, arXiv:1805.06530, theorem
    8), "poisson" the bound of the accountant by Renyi divergences (Mironov et al. 2019,
    arXiv:1908.10530).

    Args:
      noise: sigma of `train.dp.per_example`.
      batches: rows of each step that was made.
      sources: examples of each, and its share of the rows.
      delta: by default a tenth of one over the examples.

    Raises:
      ValueError: no examples, or a delta that is none.
      ImportError: the library is not installed.

    >>> run = spent(1.0, [10] * 30, [(100, 1.0)], 1e-5)  # three epochs
    >>> run.participations, round(run.partition, 2), run.poisson < run.partition
    (3, 8.39, True)
    """
    if not sources or min(n for n, _ in sources) < 1:
        raise ValueError(f"there are no examples in one of the sources: {list(sources)}")
    examples, shares = sum(n for n, _ in sources), sum(share for _, share in sources)
    delta = 1 / (10 * examples) if delta is None else delta
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must be above 0 and below 1")
    drawn, largest = sum(batches), max(batches, default=0)
    rounding = 0 if len(sources) == 1 else 1  # a mixture may be a row ahead of its shares
    rate = min(1.0, max((largest * w / shares + rounding) / n for n, w in sources))
    if not drawn:
        return Privacy(delta, 0.0, 0.0, 0, rate, examples)
    uses = [_uses(batches, n, w / shares, rounding) for n, w in sources]
    times = max(sum(many * each for many, each in use.items()) for use in uses)
    if not noise:
        return Privacy(delta, math.inf, math.inf, times, rate, examples)
    library = _library()
    # Gaussian mechanisms compose to one whose sensitivities are added as squares: exact.
    squares = max(sum(many**2 * each for many, each in use.items()) for use in uses)
    partition = float(library.get_epsilon_gaussian(noise / math.sqrt(squares), delta))
    sampled = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise))
    accountant = library.rdp.RdpAccountant()
    with _quiet():  # of orders whose series does not converge: it takes the best of the others
        accountant.compose(library.SelfComposedDpEvent(sampled, len(batches)))
        poisson = float(accountant.get_epsilon(delta))
    return Privacy(delta, partition, poisson, times, rate, examples)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library's warnings off the screen."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _uses(batches: Sequence[int], n: int, share: float, rounding: int) -> dict[int, int]:
    """How often the worst example of n is in a batch: copies of it there -> how many batches.

    >>> _uses([10] * 30, 100, 1.0, 0), _uses([8] * 30, 100, 1.0, 0), _uses([8] * 5, 4, 1.0, 0)
    ({1: 3}, {2: 1, 1: 1}, {3: 5})
    """
    largest = math.ceil(max(batches) * share) + rounding
    if n < largest:  # several epochs in one batch
        return {math.ceil(largest / n) + 1: len(batches)}
    epochs = math.ceil((sum(batches) * share + rounding) / n)
    ends = set(itertools.accumulate(batches))
    twice, epoch = 0, 1
    while epoch < epochs:
        # What is at the end of an epoch and at the beginning of the next is at no end of that.
        crosses = bool(rounding) or epoch * n not in ends
        twice, epoch = twice + crosses, epoch + 1 + crosses
    once = epochs - 2 * twice
    return {copies: each for copies, each in ((2, twice), (1, once)) if each}


def _library() -> Any:
    what = "a private run says what it has spent with the library dp-accounting"
    from_extra("dp_accounting.rdp", "private", what)
    return from_extra("dp_accounting", "private")
