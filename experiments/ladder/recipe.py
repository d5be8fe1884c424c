"""A recipe whose lengths are shares of a budget in tokens, so that it can be run at any budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.config import TransformerConfig
from train.optimizers.settings import OptimizerSettings
from train.schedules import Constant
from train.settings import Phase, Settings


@dataclass(frozen=True)
class Ramp:
    """Something that has other values before the end of a run.

    Attributes:
      what: "length" or "rows" (a factor on tokens of a row, or rows of a batch), or the name of a
        field of the model's config (its value).
      values: (share of the run's tokens up to which it holds, value), in order; after the last one
        the recipe's own value holds.

    >>> ramp = Ramp("length", ((0.25, 0.25), (0.5, 0.5)))
    >>> ramp.at(0.1, 1.0), ramp.at(0.3, 1.0), ramp.at(0.5, 1.0)
    (0.25, 0.5, 1.0)
    """

    what: str
    values: tuple[tuple[float, Any], ...]

    def __post_init__(self):
        shares = [share for share, _ in self.values]
        if not shares or shares != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
            raise ValueError(f"the shares of a ramp rise between 0 and 1, not {shares}")

    def at(self, share: float, after: Any) -> Any:
        """Returns the value from a share of the run on; `after` once the ramp is over."""
        return next((value for until, value in self.values if share < until), after)


@dataclass(frozen=True)
class Recipe:
    """What is trained and how, whatever the budget.

    Attributes:
      model: its vocabulary is the tokenizer's.
      optimizer: settings.
      schedule: settings; its warmup is `warmup`.
      rows: of a batch.
      length: tokens of a row.
      tokenizer: as in `train.settings.Settings`.
      warmup: share of the steps.
      ramps: what differs before the end.
      optimizer_shares: counts of steps among the optimizer's settings, as shares of the run.
      part_rows: rows of the parts that a batch is taken in, at least; None for all at once.
      more: further fields of `train.settings.Settings`.
    """

    model: TransformerConfig
    optimizer: OptimizerSettings
    rows: int
    length: int
    tokenizer: str
    schedule: Any = field(default_factory=Constant)
    warmup: float = 0.0
    ramps: tuple[Ramp, ...] = ()
    optimizer_shares: Mapping[str, float] = field(default_factory=dict)
    part_rows: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def with_model(self, **changes: Any) -> Recipe:
        """Returns the recipe with other fields of its model."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **changes))

    def with_optimizer(self, **changes: Any) -> Recipe:
        """Returns the recipe with other settings of its optimizer."""
        return dataclasses.replace(self, optimizer=dataclasses.replace(self.optimizer, **changes))

    def with_ramp(self, ramp: Ramp) -> Recipe:
        """Returns the recipe with one thing more that differs before the end."""
        return dataclasses.replace(self, ramps=(*self.ramps, ramp))

    def with_more(self, **fields: Any) -> Recipe:
        """Returns the recipe with further fields of its settings."""
        return dataclasses.replace(self, more={**self.more, **fields})

    @property
    def step_tokens(self) -> int:
        """Tokens of a step at the end of the run."""
        return self.rows * self.length

    def settings(self, data: tuple[str, ...], tokens: int, seed: int) -> Settings:
        """Returns the settings of a run.

        Args:
          data: sources.
          tokens: the budget; each phase has at least one step.
          seed: of the run.

        Raises:
          ValueError: a ramp of rows or length that does not come out even.
        """
        phases = self._phases(tokens)
        steps = sum(phase.steps for phase in phases)
        schedule = self.schedule
        if self.warmup:
            schedule = dataclasses.replace(schedule, warmup_steps=round(self.warmup * steps))
        counts: dict[str, Any] = {
            name: round(share * steps) for name, share in self.optimizer_shares.items()
        }
        return Settings(
            phases=phases,
            data=data,
            tokenizer=self.tokenizer,
            seed=seed,
            optimizer=dataclasses.replace(self.optimizer, **counts),
            schedule=schedule,
            micro_batches=self._parts(phases),
            **self.more,
        )

    def _parts(self, phases: Sequence[Phase]) -> int:
        """As many parts as come out even in all phases, of `part_rows` rows or more."""
        if self.part_rows is None:
            return 1
        rows = math.gcd(*(phase.batch_size for phase in phases))
        return next((n for n in range(rows // self.part_rows, 0, -1) if rows % n == 0), 1)

    def _phases(self, tokens: int) -> tuple[Phase, ...]:
        starts = sorted({0.0, *(share for ramp in self.ramps for share, _ in ramp.values)})
        phases: list[Phase] = []
        for start, end in zip(starts, [*starts[1:], 1.0], strict=True):
            phase = self._phase(start, tokens * (end - start))
            if phases and dataclasses.replace(phases[-1], steps=phase.steps) == phase:
                phase = dataclasses.replace(phase, steps=phases.pop().steps + phase.steps)
            phases.append(phase)
        return tuple(phases)

    def _phase(self, share: float, tokens: float) -> Phase:
        model: dict[str, Any] = {}
        rows, length = float(self.rows), float(self.length)
        for ramp in self.ramps:
            if ramp.what == "length":
                factor = ramp.at(share, 1.0)
                rows, length = rows / factor, length * factor  # as many tokens a step
            elif ramp.what == "rows":
                rows *= ramp.at(share, 1.0)
            else:
                model[ramp.what] = ramp.at(share, getattr(self.model, ramp.what))
        if rows != int(rows) or length != int(length):
            raise ValueError(
                f"a ramp asks for {rows:g} rows of {length:g} tokens; choose factors that come out "
                f"even for {self.rows} rows of {self.length}"
            )
        config = dataclasses.replace(self.model, **model)
        longest = max(config.max_length, self.length)
        config = dataclasses.replace(config, max_length=longest)
        steps = max(1, round(tokens / (rows * length)))
        return Phase(steps, config, int(rows), int(length))
