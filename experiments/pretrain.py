"""Trains a language model on text.

    python -m experiments.pretrain --data FILE --model modern_mini --optimizer muon --steps 1000 \
        --out runs/first

Stopped by Ctrl-C, SIGTERM or a kill, the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.cli import parse_with_methods, run_main
from experiments.compilation import use_compilation_cache
from experiments.methods.table import METHODS
from experiments.run_names import parse_parent
from experiments.runs.execute import Execution, execute
from experiments.runs.phases import grown_config, parse_phases
from experiments.runs.prepare import open_data, steps_per_epoch
from experiments.runs.run import open_run, read_settings
from experiments.starts import PIECES, VECTORS, Fresh, foreign_kind, start_run
from model.config import TransformerConfig
from model.grow import How
from model.presets import PRESETS, modern_mini
from parallel.agreement import check_same, is_main
from parallel.processes import connect
from train.loop import LoopSettings, Outcome
from train.mup import MuP
from train.optimizers import OPTIMIZERS
from train.optimizers.settings import OptimizerSettings
from train.schedules import SCHEDULES
from train.settings import Phase, Settings, differences
from train.text.sources import open_source, parse_mixture


@dataclass(frozen=True)
class Pretrain:
    """All settings of a pre-training run.

    Attributes:
      model: preset, and its fields.
      optimizer: name, and its fields.
      schedule: name, and its fields.
      data: sources, each "SPEC" or "WEIGHT*SPEC": "stdlib", a file, a folder, a glob, "tfds:NAME".
        By default what a parent was trained on, else stdlib, the source of Python's own library.
      tokenizer: "bytes", "sentencepiece:N" (trained on the first source), or a path; by default
        sentencepiece:4096, or the parent's.
      out: folder of the run.
      from_run: "RUN" or "RUN@STEP": start with the model, parameters and tokenizer of that
        checkpoint; optimizer state, schedule and data order start anew. Also "hf:FOLDER",
        "llama2c:FILE.bin" with its --tokenizer, or "vectors:FILE" (word2vec or GloVe, as the
        embedding of --model); see `experiments.starts`.
      grow: fields of the parent's model that grow, as in layers=8,width=256; see `model.grow`.
      steps: updates.
      phases: what comes before the settings given here hold, "STEPS:FIELD=VALUE,..." each: that
        many of the steps with some fields of the model, batch_size, sequence_length or growth
        changed. Models grow from phase to phase. Warmups of depth, row length, batch, window; a
        head that unties late: --phases 100:layers=1,tied_head=true 200:sequence_length=64,window=32
      growth: what new layers are made of (see `model.grow`): of the last phase, or with --grow.
      epochs: passes over the training split in place of steps, with an evaluation after each.
      batch_size: rows of a batch.
      sequence_length: tokens of a row.
      learning_rate: short for --optimizer.learning-rate.
      seed: of parameters, data order and dropout.
      micro_batches: parts that a batch is accumulated over.
      document_boundaries: whether tokens see the document before theirs.
      label_smoothing: of the cross-entropy.
      z_loss: weight of log(Z)^2.
      loss_chunk: positions whose logits are held at a time.
      target_loss: stop at the first evaluation at or under it.
      evaluate_every: steps between evaluations on the whole held-out split.
      checkpoint_every: steps between checkpoints.
      log_every: steps between rows of metrics.jsonl.
      profile: first and last step of a trace, counted from 1, e.g. 20:22.
      keep_last: newest checkpoints kept, besides the best one.
      log_norms: record norms of gradients, updates and weights by layer.
      tensorboard: write TensorBoard logs as well.
      wandb: log to Weights & Biases as well.
      mesh: devices by axis (data, pipeline, fsdp, context, tensor), as in data=2,tensor=4; -1 for
        all that are left. By default one device, or with several processes all.
      strategies: "zero1" divides optimizer state over data, "sequence" time over tensor.
      pipeline_micro_batches: parts in which rows pass the axis pipeline; by default its size.
      pipeline_rounds: times that each part passes it: 1 for GPipe, more for shorter stages.
      vocabulary_multiple: pad the vocabulary to a multiple, so that the mesh divides it.
      mup_base_width: width of the model that the rates were tuned at: rates and initial scales are
        carried over from it (`train.mup`). By default they are taken as they are.
      mup_base_heads: of that model; by default heads are as wide there.
      mup_base_layers: of that model; by default it is as deep.
      coordinator: HOST:PORT of process 0, where several processes train together; or "auto". Under
        a launcher that says it (Slurm, Open MPI, Kubernetes, TPU pods) neither this nor the next
        two are needed: see docs/several-machines.md.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      connect_timeout: seconds to wait for the others.
    """

    model: TransformerConfig
    optimizer: OptimizerSettings
    schedule: Any
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    out: Path = Path("runs/pretrain")
    from_run: str | None = None
    grow: str | None = None
    steps: int = 1000
    phases: tuple[str, ...] = ()
    growth: How = "identity"
    epochs: int | None = None
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float | None = None
    seed: int = 0
    micro_batches: int = 1
    document_boundaries: Literal["ignore", "mask"] = "ignore"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_chunk: int | None = None
    target_loss: float | None = None
    evaluate_every: int | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    profile: str | None = None
    keep_last: int = 2
    log_norms: bool = False
    tensorboard: bool = False
    wandb: bool = False
    mesh: str = ""
    strategies: tuple[str, ...] = ()
    pipeline_micro_batches: int | None = None
    pipeline_rounds: int = 1
    vocabulary_multiple: int = 1
    mup_base_width: int | None = None
    mup_base_heads: int | None = None
    mup_base_layers: int | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    connect_timeout: float = 300.0


def settings_of(command: Pretrain, methods: tuple[Any, ...] = ()) -> tuple[Settings, Execution]:
    """Returns what the command asks for, checked."""
    optimizer = command.optimizer
    if command.learning_rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=command.learning_rate)
    model, tokenizer = command.model, command.tokenizer or PIECES
    if model.positions == "rotary":  # has no table to outgrow
        longest = max(model.max_length, command.sequence_length)
        model = dataclasses.replace(model, max_length=longest)
    parent, data = command.from_run, command.data or _data_of_parent(command.from_run)
    if parent is not None:
        if (kind := foreign_kind(parent)) is not None:
            drawn = Fresh(model, command.sequence_length, command.seed, _first_texts(data))
            parent = start_run(parent, command.out / "start", command.tokenizer, drawn)
            assert parent is not None
        run = open_run(parent)
        model, tokenizer = run.model.config, str(run.folder / "tokenizer")
        if kind is None and command.tokenizer not in (None, tokenizer):
            raise ValueError(f"a run from {command.from_run} keeps its tokenizer; leave it out")
        if kind != VECTORS and command.model not in (model, modern_mini()):
            raise ValueError(f"a run from {command.from_run} keeps its model; leave --model out")
        if command.grow is not None:
            model = grown_config(model, command.grow)
    elif command.grow is not None:
        raise ValueError("--grow is for the model of a parent; give --from, or use --model")
    steps, evaluate_every = command.steps, command.evaluate_every
    if command.epochs is not None:
        if command.epochs < 1:
            raise ValueError(f"epochs is {command.epochs}; it must be at least 1")
        _, corpora = open_data(data, tokenizer, command.out)
        evaluate_every = steps_per_epoch(
            corpora, batch_size=command.batch_size, sequence_length=command.sequence_length
        )
        steps = command.epochs * evaluate_every
    profile = _profile(command.profile)
    if profile and profile[0] > steps:
        raise ValueError(f"profile begins at step {profile[0]}, and the run has {steps}")
    phase = Phase(steps, model, command.batch_size, command.sequence_length, growth=command.growth)
    settings = Settings(
        phases=parse_phases(command.phases, phase),
        data=data,
        tokenizer=tokenizer,
        seed=command.seed,
        optimizer=optimizer,
        schedule=command.schedule,
        micro_batches=command.micro_batches,
        document_boundaries=command.document_boundaries,
        label_smoothing=command.label_smoothing,
        z_loss=command.z_loss,
        loss_chunk=command.loss_chunk,
        vocabulary_multiple=command.vocabulary_multiple,
        mup=_mup(command),
        methods=methods,
        parent=parent,
    )
    loop = LoopSettings(
        command.log_every,
        evaluate_every,
        command.checkpoint_every,
        command.target_loss,
        profile,
    )
    execution = Execution(
        loop,
        keep_last=command.keep_last,
        log_norms=command.log_norms,
        tensorboard=command.tensorboard,
        wandb=command.wandb,
        mesh=command.mesh,
        strategies=command.strategies,
        pipeline_micro_batches=command.pipeline_micro_batches,
        pipeline_rounds=command.pipeline_rounds,
    )
    return settings, execution


def parsed(args: Sequence[str] | None = None) -> tuple[Pretrain, tuple[Any, ...]]:
    """Returns what a command line asks for, and its methods.

    Args:
      args: words; those of the process by default.
    """
    return parse_with_methods(
        Pretrain,
        {
            "model": ("modern_mini", PRESETS),
            "optimizer": ("muon", OPTIMIZERS),
            "schedule": ("linear", SCHEDULES),
        },
        METHODS,
        args,
        description=__doc__ or "",
    )


def main() -> int:
    """Parses the command line, trains, and says how it ended."""
    command, methods = parsed()
    connect(command.coordinator, command.num_processes, command.process_id, command.connect_timeout)
    own = ("process_id", "connect_timeout")
    shared = {name: v for name, v in dataclasses.asdict(command).items() if name not in own}
    check_same(json.loads(json.dumps(shared, default=str)), "settings", differences)
    settings, execution = settings_of(command, methods)
    use_compilation_cache()
    start = time.perf_counter()
    outcome = execute(settings, command.out, execution)
    if is_main():
        _say(command.out, outcome, time.perf_counter() - start)
    if outcome.reason == "signal":
        assert outcome.signal is not None
        return 128 + outcome.signal
    return 3 if outcome.reason == "nonfinite" else 0


def _say(out: Path, outcome: Outcome, seconds: float) -> None:
    """Prints how a run ended."""
    step = int(outcome.state.step)
    parts = "  ".join(f"{name} {spent:.1f} s" for name, spent in outcome.seconds.items())
    print(f"{outcome.reason} at step {step} after {seconds:.1f} s  (the whole run: {parts})")
    if outcome.evaluation:
        numbers = (f"{name} {outcome.evaluation[name]:.4f}" for name in ("loss", "bits_per_byte"))
        print("validation  " + "  ".join(numbers))
    print(f"run         {out}")
    if outcome.reason == "signal":
        assert outcome.signal is not None
        name = signal.Signals(outcome.signal).name
        print(f"{name}: saved step {step}; the same command goes on from there")


def _data_of_parent(parent: str | None) -> tuple[str, ...]:
    """The sources of a run that another one starts from, the standard library for others."""
    of_parent: tuple[str, ...] = ()
    if parent is not None and foreign_kind(parent) is None:
        of_parent = read_settings(parse_parent(parent)[0]).data
    return of_parent or ("stdlib",)


def _first_texts(data: tuple[str, ...]) -> Callable[[], Iterable[str]]:
    """What new pieces are learned from, as in a run without a parent: the first source."""
    return lambda: open_source(parse_mixture(data)[0][0]).documents()


def _mup(command: Pretrain) -> MuP | None:
    width, heads, layers = (
        getattr(command, f"mup_base_{name}") for name in ("width", "heads", "layers")
    )
    if width is None:
        if heads is not None or layers is not None:
            raise ValueError("the base model of muP needs a width; give --mup-base-width")
        return None
    return MuP(width, heads, layers)


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"profile is {text!r}; give two steps, as in 20:22")
    return int(first), int(last)


if __name__ == "__main__":
    run_main(main)
