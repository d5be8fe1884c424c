"""Private training as a method: `--method dp_sgd --dp-sgd.clip 1 --dp-sgd.noise 1`.

    python -m experiments.pretrain --from runs/first --data text.txt --method lora \\
        --method dp_sgd --dp-sgd.noise 0.8 --out runs/private

What the run has spent is printed at its end and written to `result.json` (see `train.privacy`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from parallel.agreement import is_main
from train.dp import per_example
from train.methods import Plugs, Setup
from train.privacy import spent
from train.settings import Settings
from train.tasks.regression import Regression


@dataclass(frozen=True)
class DpSgd:
    """Clips the gradient of each row and adds noise to their sum (see `train.dp`).

    Attributes:
      clip: largest norm of a row's gradient.
      noise: standard deviation of the noise, in units of `clip`.
      delta: at which epsilon is given; by default a tenth of one over the rows of the data.
    """

    name: ClassVar[str] = "dp_sgd"
    clip: float = 1.0
    noise: float = 1.0
    delta: float | None = None

    def __post_init__(self) -> None:
        per_example(self.clip, self.noise)
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}; it must be above 0 and below 1")

    def check_task(self, task: Any) -> None:
        """Raises ValueError for a regression whose units would be read off its private numbers."""
        if isinstance(task, Regression) and (task.mean is None or task.scale is None):
            raise ValueError(
                "mean and scale of the training numbers would go into every target, unnoised; give "
                "both from elsewhere: --task.mean and --task.scale"
            )

    def build(self, setup: Setup) -> Plugs:
        """Makes the gradient function.

        Raises:
          ImportError: the accountant is not installed, which would be said too late at the end.
        """
        if importlib.util.find_spec("dp_accounting") is None:
            raise ImportError(
                "dp_sgd says what it has spent with the library dp-accounting: "
                "pip install -e '.[private]'"
            )
        return Plugs(
            gradient=per_example(self.clip, self.noise, setup.micro_batches),
            rows=setup.micro_batches,
        )

    def closing(
        self, settings: Settings, sources: Sequence[tuple[int, float]], steps: int
    ) -> dict[str, Any]:
        """Prints what the run has spent; see `experiments.methods.table.closing`."""
        found = spent(self.noise, _rows_of_steps(settings)[:steps], sources, self.delta)
        if is_main():
            print(found)
        # JSON has no infinity.
        return {"privacy": {k: v if math.isfinite(v) else None for k, v in found._asdict().items()}}


def _rows_of_steps(settings: Settings) -> list[int]:
    """Rows of the shortest kind in the batch of each step."""
    length = min(phase.sequence_length for phase in settings.phases)
    return [
        phase.batch_size * (phase.sequence_length // length)
        for phase in settings.phases
        for _ in range(phase.steps)
    ]
