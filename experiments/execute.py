"""Trains a run from its settings alone, or goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.assemble import (
    Parts,
    abstract_state,
    assemble,
    first_frozen,
    first_state,
    initial_params,
    keep_frozen,
    read_frozen,
)
from experiments.prepare import Corpora, check_lengths, describe, open_data
from experiments.run import (
    STARTING,
    config_for,
    forget_start,
    open_run,
    parse_parent,
    phase_at,
    read_json,
    write_json,
)
from model.config import TransformerConfig
from model.flops import flops_per_token
from model.transformer import Transformer
from train.checkpoints import Checkpoints, CheckpointSettings
from train.data import batches as batch_dataset
from train.data import evaluation_batches, prefetched
from train.evaluate import evaluate
from train.loop import SILENT, LoopSettings, Outcome, reset_nonfinite, train
from train.losses import cross_entropy
from train.optimizers import learning_rate_at
from train.plugs import PyTree, State, whole
from train.progress import progress_bar
from train.records import Record, Sink, cut_back
from train.settings import Settings, differences, to_json
from train.step import NONFINITE, make_evaluation_step, make_train_step
from train.tokenizers import Tokenizer


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
    """

    loop: LoopSettings = field(default_factory=LoopSettings)
    keep_last: int = 2
    keep_best: int = 1
    log_norms: bool = False
    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False


def execute(settings: Settings, out: Path, execution: Execution = Execution()) -> Outcome:
    """Trains the run into `out`, or goes on where it stopped.

    Returns:
      How it ended; `outcome.state` is the last state.

    Raises:
      ValueError: `out` holds a run of other settings (the fields are named), or the settings do not
        fit each other or the data.
    """
    out = Path(out)
    _compare(settings, out)
    # Refuses a schedule that does not fit the steps, before any data is read.
    learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    outcome: Outcome | None = None
    with ExitStack() as stack:
        keep = CheckpointSettings(
            execution.loop.checkpoint_every, execution.keep_last, execution.keep_best
        )
        checkpoints = stack.enter_context(Checkpoints(out / "checkpoints", keep))
        # The lock is held from here: what another process has begun is not taken for ours.
        stack.enter_context(_forgotten_if_it_never_began(out))
        tokenizer, corpora = open_data(settings.data, settings.tokenizer, out)
        check_lengths(corpora, _window_length(settings))
        if execution.progress:
            print("\n".join(f"data: {line}" for line in describe(corpora)))
        write_json(out / "settings.json", to_json(settings))
        (out / STARTING).unlink(missing_ok=True)
        start = _start(settings, tokenizer, checkpoints, out, execution)
        state = start.state
        if int(state.step) >= settings.steps and (out / "result.json").exists():
            result = read_json(out / "result.json")
            return Outcome(state, result["reason"], None, result["evaluation"], result["seconds"])
        spent = start.seconds
        cut_back(out / "metrics.jsonl", int(state.step))
        sinks = _sinks(settings, out, execution)
        record = stack.enter_context(Record(out / "metrics.jsonl", sinks))
        plan = _Plan(settings, execution, out, tokenizer, corpora, start.frozen, start.frozen_hash)
        while outcome is None or (
            outcome.reason == "finished"
            and outcome.signal is None
            and int(outcome.state.step) < settings.steps
        ):
            state = state if outcome is None else outcome.state
            spent = spent if outcome is None else outcome.seconds
            outcome = _run_phase(plan, checkpoints, record, state, spent)
        if outcome.reason == "finished" and int(outcome.state.step) < settings.steps:
            outcome.reason = "signal"  # between two phases
    write_json(
        out / "result.json",
        {
            "reason": outcome.reason,
            "step": int(outcome.state.step),
            "evaluation": outcome.evaluation,
            "seconds": outcome.seconds,
            "skipped_updates": int(outcome.state.extra[NONFINITE]["total"]),
        },
    )
    return outcome


class _Plan(NamedTuple):
    """What all phases of a run share."""

    settings: Settings
    execution: Execution
    out: Path
    tokenizer: Tokenizer
    corpora: Corpora
    frozen: PyTree
    frozen_hash: str | None


def _run_phase(
    plan: _Plan,
    checkpoints: Checkpoints,
    record: Record,
    state: State,
    spent: dict[str, float],
) -> Outcome:
    settings, execution = plan.settings, plan.execution
    index, first, last = phase_at(settings, int(state.step))
    phase = settings.phases[index]
    config = config_for(phase, plan.tokenizer)
    parts = assemble(settings, config)
    model, plugs = Transformer(config), parts.plugs
    step = make_train_step(
        model,
        parts.terms,
        parts.optimizer,
        transforms=plugs.transforms,
        gradient=plugs.gradient or whole,
        micro_batches=settings.micro_batches,
        loss_chunk=settings.loss_chunk,
        max_nonfinite=settings.max_nonfinite,
        log_norms=execution.log_norms,
    )
    measure = jax.jit(
        make_evaluation_step(model, [cross_entropy()], plugs.transforms, settings.loss_chunk)
    )
    data = batch_dataset(
        [(corpus.split("train"), weight) for corpus, weight in plan.corpora],
        seed=settings.seed,
        sequence_length=phase.sequence_length,
        batch_size=_windows_by_step(settings),
        window_length=_window_length(settings),
        document_boundaries=settings.document_boundaries,
    )
    held_out = [corpus.split("validation") for corpus, _ in plan.corpora]
    held_out_bytes = sum(split.bytes for split in held_out)

    def held_out_batches() -> Iterator[dict[str, np.ndarray]]:
        for split in held_out:
            yield from evaluation_batches(
                split,
                sequence_length=phase.sequence_length,
                batch_size=phase.batch_size,
                document_boundaries=settings.document_boundaries,
            )

    def evaluation(state: State) -> dict[str, float]:
        return evaluate(measure, state, plan.frozen, held_out_batches(), held_out_bytes)

    def save(step: int, state: State, loss: float | None, seconds: dict[str, float]) -> None:
        info = {"phase": index, "seconds": seconds, "frozen": plan.frozen_hash}
        checkpoints.save(step, state, info, loss=loss)

    rates = learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    bar = progress_bar(plan.out.name, int(state.step), last) if execution.progress else None
    with bar or nullcontext(SILENT) as reporter:
        return train(
            jax.jit(step, donate_argnums=0),
            state,
            plan.frozen,
            lambda start, stop: prefetched(data, start, stop),
            until=last,
            record=record,
            settings=execution.loop,
            evaluate=evaluation,
            save=save,
            spent=spent,
            learning_rate=np.asarray(jax.vmap(rates)(jnp.arange(settings.steps))),
            flops_per_token=3 * flops_per_token(config, phase.sequence_length),
            max_nonfinite=settings.max_nonfinite,
            trace_folder=str(plan.out / "profile"),
            reporter=reporter,
        )


def _window_length(settings: Settings) -> int:
    """Length that all phases cut their rows from: they go on through one order of windows."""
    return max(phase.sequence_length for phase in settings.phases)


def _windows_by_step(settings: Settings) -> int | Callable[[int], int]:
    """Windows that each step of the run takes.

    Raises:
      ValueError: a phase whose batch is no whole number of windows.
    """
    length = _window_length(settings)
    windows = []
    for phase in settings.phases:
        if length % phase.sequence_length or phase.batch_size % (length // phase.sequence_length):
            raise ValueError(
                f"a batch of {phase.batch_size} rows of {phase.sequence_length} tokens is no whole "
                f"number of the {length}-token windows that all phases share"
            )
        windows.append(phase.batch_size * phase.sequence_length // length)
    if len(set(windows)) == 1:
        return windows[0]
    return lambda step: windows[phase_at(settings, step)[0]]


class _Start(NamedTuple):
    """Where a run begins or goes on."""

    state: State
    frozen: PyTree
    frozen_hash: str | None
    seconds: dict[str, float]


def _start(
    settings: Settings,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    out: Path,
    execution: Execution,
) -> _Start:
    """Returns the newest intact state, or the first one, and what does not train."""
    there = checkpoints.steps()
    phase = settings.phases[phase_at(settings, there[-1] if there else 0)[0]]
    parts = assemble(settings, config_for(phase, tokenizer))
    try:
        found = checkpoints.restore(abstract_state(settings, parts))
    except FileNotFoundError:
        return _first(settings, parts, out)
    for step, reason in found.skipped:
        print(f"The checkpoint of step {step} is damaged and was passed over: {reason}")
    if execution.progress:
        print(f"Going on from step {found.step} of {settings.steps}")
    state, expected = found.state, found.info.get("frozen")
    if int(state.extra[NONFINITE]["in_a_row"]) >= settings.max_nonfinite:
        state = reset_nonfinite(state)
    return _Start(state, read_frozen(out, parts, expected), expected, found.info.get("seconds", {}))


def _first(settings: Settings, parts: Parts, out: Path) -> _Start:
    """Returns the start of a new run: parameters drawn, or taken from the parent."""

    @jax.jit
    def begin() -> tuple[PyTree, PyTree]:
        return parts.plugs.split(initial_params(settings, parts.config))

    if settings.parent is None:
        params, fixed = begin()
    else:
        params, fixed = jax.jit(parts.plugs.split)(_adopt(settings.parent, parts.config))
    frozen = first_frozen(parts, fixed)
    state = jax.jit(lambda p, f: first_state(settings, parts, p, f))(params, frozen)
    return _Start(state, frozen, keep_frozen(out, frozen), {})


def _adopt(parent: str, config: TransformerConfig) -> PyTree:
    """Returns the parameters of another run.

    Raises:
      ValueError: the parent's model has another config.
    """
    run = open_run(*parse_parent(parent))
    if run.model.config != config:
        lines = differences(asdict(config), asdict(run.model.config))
        raise ValueError(f"{parent} has another model: {'; '.join(lines)}")
    print(f"From {run.folder} at step {run.step}: parameters and tokenizer are kept;")
    print("optimizer state, schedule, step number and data order start anew")
    return run.params


def _compare(settings: Settings, out: Path) -> None:
    """Raises ValueError if `out` holds a run of other settings."""
    path = out / "settings.json"
    if not path.exists():
        return
    ours = json.loads(json.dumps(to_json(settings)))
    if lines := differences(ours, read_json(path)):
        raise ValueError(
            f"{out} holds a run of other settings; choose another folder, or the same settings:\n  "
            + "\n  ".join(lines)
        )


@contextmanager
def _forgotten_if_it_never_began(out: Path) -> Iterator[None]:
    """An error before the first row leaves nothing that the corrected command would meet."""
    begun = (out / "settings.json").exists()
    try:
        yield
    except Exception:
        metrics, settings = out / "metrics.jsonl", out / "settings.json"
        ours = settings.exists() or (out / STARTING).exists()
        if ours and not begun and not (metrics.exists() and metrics.stat().st_size):
            forget_start(out)
        raise


def _sinks(settings: Settings, out: Path, execution: Execution) -> tuple[Sink, ...]:
    from train.records import tensorboard_sink, wandb_sink

    sinks = []
    if execution.tensorboard:
        sinks.append(tensorboard_sink(out / "tensorboard"))
    if execution.wandb:
        sinks.append(wandb_sink(out, to_json(settings)))
    return tuple(sinks)
