"""Trains a run from its settings alone, or goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.compilation import compiler_options
from experiments.json_files import read_json, write_json
from experiments.methods.table import check_tokenizer, closing, resolve
from experiments.runs.assemble import assemble
from experiments.runs.execution import Execution
from experiments.runs.feeds import Feed, open_feed
from experiments.runs.layout import (
    everywhere,
    idle,
    lay_out,
    mesh_of,
    model_of,
    of_state,
    place,
    report,
)
from experiments.runs.phases import check_phases, enter_phase
from experiments.runs.run import (
    STARTING,
    config_for,
    forget_start,
    open_run,
    phase_at,
    read_settings,
)
from experiments.runs.start import start_of
from model.flops import training_flops_per_token
from parallel.agreement import by_main, check_same, is_main
from train.checkpoints import Checkpoints, CheckpointSettings
from train.data import prefetched
from train.loop import SILENT, LoopSettings, Outcome, out_of_patience, train, watched
from train.optimizers import learning_rate_at
from train.plugs import NONFINITE, PyTree, State, whole
from train.progress import progress_bar
from train.records import Record, Sink, cut_back, read_rows
from train.settings import Settings, differences, to_json
from train.step import make_train_step
from train.tokenizers.tokenizer import Tokenizer


def execute(
    settings: Settings,
    out: Path,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
) -> Outcome:
    """Trains the run into `out`, or goes on where it stopped.

    Returns:
      How it ended; `outcome.state` is the last state.

    Raises:
      ValueError: `out` holds a run of other settings (the fields are named), or the settings do not
        fit each other or the data.
    """
    out = Path(out)
    _agree(settings, out, execution)
    saved = read_settings(out) if (out / "settings.json").exists() else None
    settings = resolve(settings, saved, open_run)
    _compare(settings, out)
    # Refuses a schedule that does not fit the steps, before any data is read.
    learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    mesh = mesh_of(execution.mesh)
    outcome: Outcome | None = None
    with ExitStack() as stack:
        keep = CheckpointSettings(
            execution.loop.checkpoint_every, execution.keep_last, execution.keep_best
        )
        checkpoints = stack.enter_context(Checkpoints(out / "checkpoints", keep))
        # The lock is held from here: what another process has begun is not taken for ours.
        stack.enter_context(_forgotten_if_it_never_began(out))
        tokenizer, lines, open_it = open_feed(settings, out)
        check_tokenizer(settings, tokenizer)
        check_phases(settings, tokenizer)
        if execution.progress and is_main():
            print("\n".join(f"data: {line}" for line in lines))

        def begin() -> None:
            write_json(out / "settings.json", to_json(settings))
            (out / STARTING).unlink(missing_ok=True)

        by_main(begin)
        stack.enter_context(jax.set_mesh(mesh))
        feed = open_it()
        start = start_of(settings, tokenizer, checkpoints, out, execution.division, mesh)
        state = start.state
        step = int(state.step)
        by_main(lambda: cut_back(out / "metrics.jsonl", step))
        loop = execution.loop
        over = step >= settings.steps or out_of_patience(_history(out, loop), loop.patience)
        if over and (result := by_main(lambda: _result(out))):
            return Outcome(state, result["reason"], None, result["evaluation"], result["seconds"])
        spent = start.seconds
        sinks = _sinks(settings, out, execution) if is_main() else ()
        path = out / "metrics.jsonl" if is_main() else None
        record = stack.enter_context(Record(path, sinks))
        plan = _Plan(
            settings,
            execution,
            out,
            tokenizer,
            feed,
            mesh,
            start.frozen,
            start.frozen_hash,
        )
        while outcome is None or (
            outcome.reason == "finished"
            and outcome.signal is None
            and int(outcome.state.step) < settings.steps
        ):
            if outcome is not None:
                here = int(outcome.state.step)
                before, now = (phase_at(settings, n)[0] for n in (here - 1, here))
                args = (settings, tokenizer, mesh, execution.division)
                begun = time.perf_counter()
                state = jax.block_until_ready(enter_phase(*args, outcome.state, before, now))
                seconds = time.perf_counter() - begun
                spent = {**outcome.seconds, "phase": outcome.seconds.get("phase", 0.0) + seconds}
            outcome = _run_phase(plan, checkpoints, record, state, spent)
        if outcome.reason == "finished" and int(outcome.state.step) < settings.steps:
            outcome.reason = "signal"  # between two phases
    result = {
        "reason": outcome.reason,
        "step": int(outcome.state.step),
        "evaluation": outcome.evaluation,
        "seconds": outcome.seconds,
        "skipped_updates": int(outcome.state.extra[NONFINITE]["total"]),
    }
    result |= closing(settings, feed.sources, result["step"])
    by_main(lambda: write_json(out / "result.json", result))
    return outcome


class _Plan(NamedTuple):
    """What all phases of a run share."""

    settings: Settings
    execution: Execution
    out: Path
    tokenizer: Tokenizer
    feed: Feed
    mesh: Mesh
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
    parts = assemble(settings, config, plan.mesh.shape["data"])
    layout = lay_out(plan.mesh, execution.division, settings, phase, parts)
    model, plugs = model_of(layout, config), parts.plugs
    step = make_train_step(
        model,
        parts.terms,
        parts.optimizer,
        transforms=plugs.transforms,
        gradient=plugs.gradient or whole,
        # A method's gradient function goes through them by itself.
        micro_batches=settings.micro_batches if plugs.gradient is None else 1,
        loss_chunk=settings.loss_chunk,
        max_nonfinite=settings.max_nonfinite,
        log_norms=execution.log_norms,
    )
    if plugs.around is not None:
        step = plugs.around.step(step)
    shardings, whole_copy = of_state(layout, state), everywhere(layout)
    compiled_step = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, whole_copy),
        compiler_options=compiler_options(),
    )
    rows, own = phase.batch_size, plan.feed.own(layout, phase)
    data = plan.feed.dataset(phase, own)
    evaluation = plan.feed.evaluation(layout, model, parts, plan.frozen)

    def batch_of(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return place(layout, batch, own, rows)

    def save(step: int, state: State, loss: float | None, seconds: dict[str, float]) -> None:
        info = {"phase": index, "seconds": seconds, "frozen": plan.frozen_hash}
        info |= {"workers": plan.mesh.shape["data"]}
        checkpoints.save(step, state, info, loss=loss)

    if plan.mesh.size > 1 and execution.progress:
        first_batch = batch_of(data[int(state.step)])
        compiled = compiled_step.lower(state, plan.frozen, first_batch).compile()
        if is_main():
            print(report(layout, state, compiled))
    elif execution.progress and (words := idle(plan.mesh)):
        print(words)
    rates = learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    shown = execution.progress and is_main()
    bar = progress_bar(plan.out.name, int(state.step), last) if shown else None
    with bar or nullcontext(SILENT) as reporter:
        return train(
            compiled_step,
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
            flops_per_token=training_flops_per_token(config, phase.sequence_length),
            max_nonfinite=settings.max_nonfinite,
            place=batch_of,
            trace_folder=str(plan.out / "profile"),
            reporter=reporter,
            history=_history(plan.out, execution.loop),
        )


def _history(out: Path, loop: LoopSettings) -> list[float]:
    """What was watched in the evaluations so far; the record ends at the checkpoint."""
    path = out / "metrics.jsonl"
    if loop.patience is None or not path.exists():
        return []
    return [watched(row, loop.watch) for row in read_rows(path) if row["kind"] == "evaluation"]


def _agree(settings: Settings, out: Path, execution: Execution) -> None:
    """Raises ValueError if other processes have been started with something else."""
    facts = {
        "settings": to_json(settings),
        "execution": asdict(execution),
        "out": str(out.absolute()),
        "jax": jax.__version__,
    }
    check_same(json.loads(json.dumps(facts)), "settings", differences)


def _result(out: Path) -> dict[str, Any] | None:
    path = out / "result.json"
    return read_json(path) if path.exists() else None


def _compare(settings: Settings, out: Path) -> None:
    """Raises ValueError if `out` holds a run of other settings."""
    path = out / "settings.json"
    if not path.exists():
        return
    # Read and written again: a field that is new since then is at its default in both.
    ours, theirs = (json.loads(json.dumps(to_json(s))) for s in (settings, read_settings(out)))
    if lines := differences(ours, theirs):
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
        if not is_main():
            raise
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
