"""How a run is carried out: what may differ from one start of it to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.runs.layout import Division
from train.loop import LoopSettings


@dataclass(frozen=True)
class Execution:
    """How a run is carried out; may differ from start to resume.

    Attributes:
      loop: what the loop logs, evaluates and stops at.
      keep_last: newest checkpoints kept.
      keep_best: best ones kept besides.
      log_norms: record the norms of gradients, updates and weights, by layer.
      progress: draw a progress bar and print evaluations.
      tensorboard: also write TensorBoard logs to `tensorboard/`.
      wandb: also log to Weights & Biases.
      mesh: devices by axis, as in "data=2,tensor=4"; -1 for all that are left, "" for one device.
      strategies: "zero1" divides optimizer state over `data`, "sequence" time over `tensor`.
      pipeline_micro_batches: parts in which rows pass the axis `pipeline`, by default as many as it
        has stages.
      pipeline_rounds: times that each part passes it: 1 for GPipe, more for shorter stages.
    """

    loop: LoopSettings = field(default_factory=LoopSettings)
    keep_last: int = 2
    keep_best: int = 1
    log_norms: bool = False
    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False
    mesh: str = ""
    strategies: tuple[str, ...] = ()
    pipeline_micro_batches: int | None = None
    pipeline_rounds: int = 1

    @property
    def division(self) -> Division:
        """What of the layout the mesh leaves open."""
        return Division(self.strategies, self.pipeline_micro_batches, self.pipeline_rounds)
