"""The loop around the step: it feeds, watches and saves, and keeps out of the step's way.

At most two steps are in flight: before step i is dispatched the host waits for the metrics of
step i - 2, never for those of the newest. That bounds memory, keeps the device busy, and XLA:CPU
with several virtual devices deadlocks without a bound.

In several processes each decision must be the same in all of them. Most follow from the metrics,
which are; a signal reaches one process alone, so its number travels beside the metrics of each step
(`parallel.agreement.highest`), and all stop when they read it, at most two steps later.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import jax
import numpy as np

from parallel.agreement import highest, is_main
from train.meters import Clock, Energy, utilization
from train.plugs import NONFINITE, Metrics, PyTree, State
from train.records import Record
from train.step import Step
from train.stop import stop_requests

IN_FLIGHT = 2


@dataclass(frozen=True)
class LoopSettings:
    """What the loop does besides stepping; none of it changes what is learned.

    Attributes:
      log_every: steps between two rows of the record.
      evaluate_every: steps between two evaluations on the whole held-out split; None for one at the
        end alone.
      checkpoint_every: steps between two checkpoints; one is always written at the end.
      target_loss: stop at the first evaluation at or under it.
      watch: figure of the evaluations by which the best checkpoint is chosen, and `patience` goes:
        least is best; with a minus before it, as in "-accuracy", greatest.
      patience: stop when so many evaluations one after another have not been better than the best.
      profile: (first, last) step of a trace written to `profile/` of the run, counted as in the
        record: from 1.
    """

    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int = 500
    target_loss: float | None = None
    profile: tuple[int, int] | None = None
    watch: str = "loss"
    patience: int | None = None

    def __post_init__(self):
        for name in ("log_every", "evaluate_every", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                what = "evaluation" if name == "patience" else "step"
                raise ValueError(f"{name} is {value}; it must be at least 1 {what}")
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"profile runs from step {self.profile[0]} to {self.profile[1]}; "
                "give a first step, at least 1, and a last one, at least the first"
            )


@dataclass
class Outcome:
    """How a phase ended.

    Attributes:
      state: the last state; that of the last good step after losses that were not finite.
      reason: "finished", "target", "patience", "nonfinite" or "signal".
      signal: its number, if one was caught in any process; if that was after the last step was
        dispatched, the reason is "finished" all the same.
      evaluation: the last evaluation, name -> mean.
      seconds: wall-clock seconds by kind: compile, data, step, evaluation, checkpoint.
    """

    state: State
    reason: Literal["finished", "target", "patience", "nonfinite", "signal"]
    signal: int | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def watched(evaluation: Mapping[str, Any], watch: str) -> float:
    """Returns what is to be least of an evaluation; infinity for what is no number.

    Raises:
      ValueError: the evaluation has no such figure; those that it has are listed.

    >>> watched({"accuracy": 0.75}, "-accuracy"), watched({"loss": "nan"}, "loss")
    (-0.75, inf)
    """
    name = watch.removeprefix("-")
    if name not in evaluation:
        raise ValueError(f"the evaluation has no {name!r} to watch; it has {', '.join(evaluation)}")
    value = float(evaluation[name])
    value = -value if watch.startswith("-") else value
    return math.inf if math.isnan(value) else value


def out_of_patience(values: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` of the watched values are no better than the best before them.

    >>> out_of_patience([3.0, 1.0, 2.0], 1), out_of_patience([3.0, 1.0, 2.0], 2)
    (True, False)
    """
    if patience is None or not values:
        return False
    return len(values) - 1 - min(range(len(values)), key=values.__getitem__) >= patience


class Reporter(Protocol):
    """Shows a person how it goes; see `train.progress`."""

    def advance(self, step: int, values: dict[str, float]) -> None:
        """After each step that was waited for."""

    def say(self, text: str) -> None:
        """A line that stays."""


class _Silent:
    def advance(self, step: int, values: dict[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


SILENT: Reporter = _Silent()


def train(
    step: Step,
    state: State,
    frozen: PyTree,
    batches: Callable[[int, int], Iterator[dict[str, np.ndarray]]],
    *,
    until: int,
    record: Record,
    settings: LoopSettings = LoopSettings(),
    evaluate: Callable[[State], dict[str, float]] | None = None,
    save: Callable[[int, State, float | None, dict[str, float]], None] | None = None,
    spent: Mapping[str, float] | None = None,
    learning_rate: np.ndarray | None = None,
    flops_per_token: float = 0.0,
    max_nonfinite: int = 5,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]] = jax.device_put,
    trace_folder: str = "profile",
    reporter: Reporter = SILENT,
    history: Sequence[float] = (),
) -> Outcome:
    """Runs the compiled `step` from `state.step` to `until`, or to a reason to stop.

    Args:
      step: compiled, `(state, frozen, batch) -> (state, metrics)`; donates its state.
      state: where to start; its buffers are gone afterwards.
      frozen: what does not train.
      batches: `(first, last) -> iterator` over the batches of those steps.
      until: the step number at which the phase ends.
      record: gets the rows.
      settings: see `LoopSettings`.
      evaluate: `state -> {name: mean}`, with "loss" among them.
      save: `(step, state, watched, seconds) -> None`; may return while it still writes.
      spent: seconds by kind of what the run did before (earlier phases, earlier starts).
      learning_rate: of every step of the run, for the record alone; numbers, since computing one
        on the device would wait for the newest step.
      flops_per_token: of a training step, for the utilization.
      max_nonfinite: as in the step.
      place: puts a batch onto the devices.
      trace_folder: where `profile` goes.
      reporter: shows progress.
      history: what was watched in the evaluations before, for `patience`.
    """
    clock, first = Clock(), int(state.step)
    clock.seconds |= spent or {}
    before = sum(clock.seconds.values())
    pending: collections.deque[tuple[int, Metrics, jax.Array | None]] = collections.deque()
    devices, several = state.step.sharding.device_set, jax.process_count() > 1
    # The mesh of the run: in several processes all of its state lies on one.
    agree = highest(state.step.sharding.mesh) if several else None  # type: ignore[attr-defined]
    agreed: int | None = None  # the signal that all processes know of
    window = _Window(record, settings, learning_rate, flops_per_token, devices, reporter)
    outcome = Outcome(state, "finished", seconds=clock.seconds)
    evaluated, saved, healthy = -1, first, True
    values = list(history)
    traced = range(settings.profile[0], settings.profile[1] + 1) if settings.profile else range(0)

    def drain(left: int) -> bool:
        """Waits until only `left` steps are in flight; False, from then on, if the run must end."""
        nonlocal healthy, agreed
        while len(pending) > left:
            number, metrics, told = pending.popleft()
            with clock("step"):
                metrics, told = jax.device_get((metrics, told))
            agreed = agreed or (int(told) if told is not None else None) or None
            if healthy:  # what was dispatched after the last bad step did nothing
                window.add(number, metrics)
            healthy &= int(metrics["nonfinite_in_a_row"]) < max_nonfinite
        return healthy

    def measure(number: int) -> Literal["target", "patience"] | None:
        """Evaluates; says so if that is a reason to stop."""
        nonlocal evaluated
        if evaluate is None or evaluated == number:
            return None
        evaluated = number
        with window.paused():
            with clock("evaluation"):
                outcome.evaluation = evaluate(state)
            loss, seconds = outcome.evaluation["loss"], before + clock.total()
            costs = {"seconds": seconds, "clock": dict(clock.seconds)}
            record.write("evaluation", number, {**outcome.evaluation, **costs})
            values.append(watched(outcome.evaluation, settings.watch))
            reporter.say(f"step {number:>6}  {_figures(outcome.evaluation)}")
        if settings.target_loss is not None and loss <= settings.target_loss:
            return "target"
        return "patience" if out_of_patience(values, settings.patience) else None

    def keep(number: int) -> None:
        nonlocal saved
        if save is not None and saved != number:
            with window.paused(), clock("checkpoint"):
                loss = values[-1] if evaluated == number else None
                save(number, state, loss, dict(clock.seconds))
            saved = number

    with stop_requests() as requested, contextlib.ExitStack() as trace:

        def asked() -> int | None:
            return requested() if agree is None else agreed

        if out_of_patience(values, settings.patience):  # stopped here before
            outcome.reason, until = "patience", first
        source = iter(batches(first, until))
        for done in range(first + 1, until + 1):
            if not drain(IN_FLIGHT - 1):
                break
            if asked() is not None:
                outcome.reason = "signal"
                break
            with clock("data"):
                batch = place(next(source))
            if done in traced and done in (traced.start, first + 1):
                drain(0)
                if is_main():
                    trace.enter_context(jax.profiler.trace(trace_folder))
            # The first call returns when it is compiled; later ones at once.
            compiling = done == first + 1
            with (
                window.paused() if compiling else contextlib.nullcontext(),
                clock("compile" if compiling else "step"),
                jax.profiler.StepTraceAnnotation("train", step_num=done),
            ):
                state, metrics = step(state, frozen, batch)
            told = None if agree is None else agree(requested() or 0)
            pending.append((done, metrics, told))
            if traced and done == traced[-1]:
                drain(0)
                trace.close()
            if settings.evaluate_every and done % settings.evaluate_every == 0 and done < until:
                if not drain(0):
                    break
                if reason := measure(done):
                    outcome.reason = reason
                    break
            if done % settings.checkpoint_every == 0 and done < until:
                if not drain(0):
                    break
                keep(done)
        if not drain(0):
            outcome.reason = "nonfinite"
        trace.close()
        last = int(state.step)
        if last > first and outcome.reason in ("finished", "target") and measure(last) == "target":
            outcome.reason = "target"
        if last > first:
            keep(last)
        # Nothing is in flight any more, so that this waits for the slowest process alone.
        outcome.signal = requested() if agree is None else int(agree(requested() or 0)) or agreed
    outcome.state = state
    return outcome


def _figures(evaluation: Mapping[str, float]) -> str:
    """An evaluation in one line: a language model's by its perplexity, others in full."""
    loss = evaluation["loss"]
    text = f"validation loss {loss:.4f}"
    if "cross_entropy" in evaluation:
        return f"{text}  perplexity {math.exp(min(loss, 700.0)):.2f}"
    others = (f"{name} {value:.4f}" for name, value in evaluation.items() if name != "loss")
    return "  ".join([text, *others])


def reset_nonfinite(state: State) -> State:
    """Returns the state with the count of bad steps in a row at zero, to try again."""
    counters = {**state.extra[NONFINITE], "in_a_row": jax.numpy.int32(0)}
    return dataclasses.replace(state, extra={**state.extra, NONFINITE: counters})


class _Window:
    """Turns the metrics of steps into rows: those of the row's step, and costs since the last row.

    Costs are those of stepping alone: what happens while it is `paused` does not count.
    """

    def __init__(self, record, settings, learning_rate, flops_per_token, devices, reporter):
        self.record, self.settings, self.reporter = record, settings, reporter
        self.learning_rate, self.flops_per_token = learning_rate, flops_per_token
        self.devices, self.energy = devices, Energy()
        self.restart()

    def restart(self) -> None:
        """Starts a row."""
        self.tokens, self.steps = 0.0, 0
        self.spent: dict[str, float] = {}
        self.since = self.meters()

    def meters(self) -> dict[str, float]:
        clocks = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
        return {**clocks, **self.energy.joules()}

    def costs(self) -> dict[str, float]:
        """Returns what was spent on the steps of this row so far."""
        now = self.meters()
        return {
            name: self.spent.get(name, 0.0) + now[name] - self.since.get(name, now[name])
            for name in now
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Something else than steps goes on in here."""
        self.spent = self.costs()
        yield
        self.since = self.meters()

    def add(self, number: int, metrics: Metrics) -> None:
        scalars = {name: float(v) for name, v in metrics.items() if name != "norms"}
        self.tokens += scalars["tokens"]
        self.steps += 1
        skipped = bool(scalars.pop("skipped"))
        in_a_row = int(scalars.pop("nonfinite_in_a_row"))
        costs = self.costs()
        seconds = costs.pop("seconds")
        speed = {"tokens_per_second": self.tokens / seconds if seconds > 0 else 0.0}
        flops_per_second = speed["tokens_per_second"] * self.flops_per_token
        if (used := utilization(flops_per_second, self.devices)) is not None:
            speed["utilization"] = used
        self.reporter.advance(number, {"loss": scalars["loss"], **speed})
        if skipped:
            self.reporter.say(f"step {number:>6}  not finite: update skipped ({in_a_row} in a row)")
            self.record.write("skipped", number, {"in_a_row": in_a_row})
        if number % self.settings.log_every:
            return
        if self.learning_rate is not None:
            scalars["learning_rate"] = float(self.learning_rate[number - 1])
        if "norms" in metrics:
            scalars["norms"] = jax.tree.map(lambda a: np.asarray(a).tolist(), metrics["norms"])
        speed["step_seconds"] = seconds / self.steps
        self.record.write("train", number, {**scalars, **speed, **costs})
        self.restart()
