"""Trains a run from its settings alone, or goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run import config_for, open_run, parse_parent, phase_at, write_json
from model.config import TransformerConfig
from model.flops import abstract_params, flops_per_token
from model.transformer import Transformer
from train.cache import build_once, default_cache
from train.checkpoints import Checkpoints, CheckpointSettings
from train.corpus import Corpus, build_corpus
from train.data import batches as batch_dataset
from train.data import evaluation_batches, prefetched, windows_per_epoch
from train.evaluate import evaluate
from train.loop import SILENT, LoopSettings, Outcome, reset_nonfinite, train
from train.losses import cross_entropy, z_loss
from train.optimizers import build, learning_rate_at
from train.plugs import LossTerm, State
from train.progress import progress_bar
from train.records import Record, Sink, cut_back
from train.settings import Settings, differences, to_json
from train.sources import Source, open_source, parse_mixture
from train.step import NONFINITE, init_state, make_evaluation_step, make_train_step
from train.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece


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
    tokenizer, corpora = open_data(settings.data, settings.tokenizer, out)
    # Only now, so that a mistake in the data leaves no folder that the corrected command refuses.
    write_json(out / "settings.json", to_json(settings))
    terms = [cross_entropy(settings.label_smoothing)]
    if settings.z_loss:
        terms.append(z_loss(weight=settings.z_loss))
    outcome: Outcome | None = None
    with ExitStack() as stack:
        keep = CheckpointSettings(
            execution.loop.checkpoint_every, execution.keep_last, execution.keep_best
        )
        checkpoints = stack.enter_context(Checkpoints(out / "checkpoints", keep))
        state = _start(settings, tokenizer, checkpoints, execution)
        if int(state.step) >= settings.steps and (out / "result.json").exists():
            result = json.loads((out / "result.json").read_text())
            return Outcome(state, result["reason"], None, result["evaluation"], result["seconds"])
        there = int(state.step) in checkpoints.steps()
        spent = checkpoints.info(int(state.step))["seconds"] if there else {}
        cut_back(out / "metrics.jsonl", int(state.step))
        sinks = _sinks(settings, out, execution)
        record = stack.enter_context(Record(out / "metrics.jsonl", sinks))
        while outcome is None or (
            outcome.reason == "finished" and int(outcome.state.step) < settings.steps
        ):
            state = state if outcome is None else outcome.state
            spent = spent if outcome is None else outcome.seconds
            plan = (settings, execution, out, tokenizer, corpora, terms)
            outcome = _run_phase(*plan, checkpoints, record, state, spent)
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


def open_data(
    data: tuple[str, ...], tokenizer_spec: str, out: Path
) -> tuple[Tokenizer, list[tuple[Corpus, float]]]:
    """Returns the tokenizer (kept in `out`) and the tokenised sources with their weights."""
    mixture = [(open_source(spec), weight) for spec, weight in parse_mixture(data)]
    tokenizer = _tokenizer(tokenizer_spec, out, mixture[0][0])
    return tokenizer, [(build_corpus(source, tokenizer), weight) for source, weight in mixture]


def steps_per_epoch(
    data: tuple[str, ...], tokenizer_spec: str, out: Path, *, batch_size: int, sequence_length: int
) -> int:
    """Returns the whole batches in one pass over the training split, at least 1."""
    _, corpora = open_data(data, tokenizer_spec, out)
    splits = [(corpus.split("train"), weight) for corpus, weight in corpora]
    return max(1, windows_per_epoch(splits, sequence_length) // batch_size)


def _run_phase(
    settings: Settings,
    execution: Execution,
    out: Path,
    tokenizer: Tokenizer,
    corpora: list[tuple[Corpus, float]],
    terms: list[LossTerm],
    checkpoints: Checkpoints,
    record: Record,
    state: State,
    spent: dict[str, float],
) -> Outcome:
    index, first, last = phase_at(settings, int(state.step))
    phase = settings.phases[index]
    config = config_for(phase, tokenizer)
    model = Transformer(config)
    optimizer = _optimizer(settings, config)
    step = make_train_step(
        model,
        terms,
        optimizer,
        micro_batches=settings.micro_batches,
        loss_chunk=settings.loss_chunk,
        max_nonfinite=settings.max_nonfinite,
        log_norms=execution.log_norms,
    )
    measure = jax.jit(make_evaluation_step(model, [cross_entropy()], (), settings.loss_chunk))
    data = batch_dataset(
        [(corpus.split("train"), weight) for corpus, weight in corpora],
        seed=settings.seed,
        sequence_length=phase.sequence_length,
        batch_size=_windows_by_step(settings),
        window_length=_window_length(settings),
        document_boundaries=settings.document_boundaries,
    )
    held_out = [corpus.split("validation") for corpus, _ in corpora]
    held_out_bytes = sum(split.bytes for split in held_out)

    def held_out_batches() -> Iterator[dict[str, np.ndarray]]:
        for split in held_out:
            yield from evaluation_batches(
                split,
                sequence_length=phase.sequence_length,
                batch_size=phase.batch_size,
                document_boundaries=settings.document_boundaries,
            )

    def save(step: int, state: State, loss: float | None, seconds: dict[str, float]) -> None:
        checkpoints.save(step, state, {"phase": index, "seconds": seconds}, loss=loss)

    rates = learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    bar = progress_bar(out.name, int(state.step), last) if execution.progress else None
    with bar or nullcontext(SILENT) as reporter:
        return train(
            jax.jit(step, donate_argnums=0),
            state,
            {},
            lambda start, stop: prefetched(data, start, stop),
            until=last,
            record=record,
            settings=execution.loop,
            evaluate=lambda s: evaluate(measure, s, {}, held_out_batches(), held_out_bytes),
            save=save,
            spent=spent,
            learning_rate=np.asarray(jax.vmap(rates)(jnp.arange(settings.steps))),
            flops_per_token=3 * flops_per_token(config, phase.sequence_length),
            max_nonfinite=settings.max_nonfinite,
            trace_folder=str(out / "profile"),
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


def _optimizer(settings: Settings, config: TransformerConfig) -> Any:
    abstract = abstract_params(config)
    return build(settings.optimizer, settings.schedule, settings.steps, abstract)


def _start(
    settings: Settings, tokenizer: Tokenizer, checkpoints: Checkpoints, execution: Execution
) -> State:
    """Returns the newest intact state, or the first one."""
    there = checkpoints.steps()
    phase = settings.phases[phase_at(settings, there[-1] if there else 0)[0]]
    config = config_for(phase, tokenizer)
    optimizer = _optimizer(settings, config)
    key_params, key_run = jax.random.split(jax.random.key(settings.seed))

    def first(key_params: jax.Array, key_run: jax.Array) -> State:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = Transformer(config).init(key_params, tokens)["params"]
        return init_state(key_run, params, optimizer)

    try:
        found = checkpoints.restore(jax.eval_shape(first, key_params, key_run))
    except FileNotFoundError:
        state = jax.jit(first)(key_params, key_run)
        return state if settings.parent is None else _adopt(state, settings.parent, config)
    for step, reason in found.skipped:
        print(f"The checkpoint of step {step} is damaged and was passed over: {reason}")
    if execution.progress:
        print(f"Going on from step {found.step} of {settings.steps}")
    state = found.state
    if int(state.extra[NONFINITE]["in_a_row"]) >= settings.max_nonfinite:
        state = reset_nonfinite(state)
    return state


def _adopt(state: State, parent: str, config: TransformerConfig) -> State:
    """Returns a first state with the parameters of another run.

    Raises:
      ValueError: the parent's model has another config.
    """
    run = open_run(*parse_parent(parent))
    if run.model.config != config:
        lines = differences(asdict(config), asdict(run.model.config))
        raise ValueError(f"{parent} has another model: {'; '.join(lines)}")
    print(f"From {run.folder} at step {run.step}: parameters and tokenizer are kept;")
    print("optimizer state, schedule, step number and data order start anew")
    return State(state.step, run.params, state.optimizer, state.rng, state.extra)


def _compare(settings: Settings, out: Path) -> None:
    """Raises ValueError if `out` holds a run of other settings."""
    path = out / "settings.json"
    if not path.exists():
        return
    ours = json.loads(json.dumps(to_json(settings)))
    if lines := differences(ours, json.loads(path.read_text())):
        raise ValueError(
            f"{out} holds a run of other settings; choose another folder, or the same settings:\n  "
            + "\n  ".join(lines)
        )


def _tokenizer(spec: str, out: Path, source: Source) -> Tokenizer:
    """Returns the run's tokenizer; trains it once for a source and size, on this machine."""
    folder = out / "tokenizer"
    if (folder / "kind.json").exists():
        return load_tokenizer(folder)
    kind, _, size = spec.partition(":")
    if kind == "sentencepiece" and size.isdecimal():
        cache = default_cache()
        key = f"{source.fingerprint(cache / 'fingerprints')[:32]}-{size}"
        trained = cache / "tokenizers" / key

        def write(folder: Path) -> None:
            train_sentencepiece(source.documents(), int(size)).save(folder)

        tokenizer = build_once(trained, load_tokenizer, write)
    else:
        tokenizer = load_tokenizer(spec)
    tokenizer.save(folder)
    return tokenizer


def _sinks(settings: Settings, out: Path, execution: Execution) -> tuple[Sink, ...]:
    from train.records import tensorboard_sink, wandb_sink

    sinks = []
    if execution.tensorboard:
        sinks.append(tensorboard_sink(out / "tensorboard"))
    if execution.wandb:
        sinks.append(wandb_sink(out, to_json(settings)))
    return tuple(sinks)
