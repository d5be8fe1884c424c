"""Trains a model for a task, from a model that is there or from scratch.

    python -m experiments.finetune --task classification --start runs/first \\
        --data train=train.tsv valid=dev.tsv test=test.tsv --columns text=sentence \\
        --out runs/sentiment

    python -m experiments.finetune --task classification --start hf:distilgpt2 \\
        --data train=train.txt valid=dev.txt --separator ' ' --column-names label text \\
        --method lora --lora.rank 8 --learning-rate 1e-3 --out runs/adapted

    python -m experiments.finetune --task translation --model encoder_decoder_mini \\
        --data train=train.en.gz,train.de.gz valid=val.en.gz,val.de.gz --optimizer muon \\
        --label-smoothing 0.1 --sequence-length 128 --epochs 20 --out runs/en-de

What is best on the validation split is kept, measured on the test split once at the end, and its
answers are written beside it, a row a line. The head of the task trains whatever a method freezes:
`--method freeze --freeze.rules '.*'` trains the head alone. Stopped by Ctrl-C, SIGTERM or a kill,
the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.cli import named_pairs, parse_with_methods, run_main
from experiments.compilation import use_compilation_cache
from experiments.methods.table import METHODS, check_task
from experiments.runs.execute import execute
from experiments.runs.execution import Execution
from experiments.runs.run import open_run
from experiments.runs.task_data import open_task
from experiments.starts import PIECES, VECTORS, Fresh, foreign_kind, start_run
from experiments.task_report import describe_report, report_task
from experiments.tasks.labels import as_its_head_reads
from experiments.tasks.table import TASKS
from model.config import EncoderDecoderConfig, TransformerConfig
from model.presets import PRESETS, modern_mini
from train.loop import LoopSettings
from train.optimizers import OPTIMIZERS
from train.optimizers.settings import OptimizerSettings
from train.schedules import SCHEDULES
from train.settings import Phase, Settings
from train.tasks.rows import RowFormat
from train.tasks.task import TRAIN, TaskFiles
from train.text.sources import open_source


@dataclass(frozen=True)
class Finetune:
    """All settings of a fine-tuning.

    Attributes:
      task: name, and its fields.
      model: preset, and its fields; for --start scratch and vectors:FILE alone.
      optimizer: name, and its fields.
      schedule: name, and its fields.
      start: "RUN", "RUN@STEP", "hf:FOLDER", "llama2c:FILE.bin", "vectors:FILE" (word2vec or GloVe,
        as the embedding) or "scratch".
      data: SPLIT=FILE for train, valid and test: .tsv, .csv, .jsonl, or any text with --separator;
        for translation also SPLIT=SOURCE,TARGET, two files of aligned lines, plain or .gz. One file
        alone, train=FILE, is divided by a hash of its rows.
      columns: NAME=COLUMN where the file's column is called otherwise than the task calls it, as in
        text=sentence label=class; a second sentence is text2.
      separator: of columns; by default a tab in .tsv, a comma in .csv.
      column_names: of the columns in order, for files whose first line does not name them.
      bad_rows: "stop" at a row that does not parse, with its line number, or "skip" and count.
      share: of the training rows, drawn by the seed, that are trained on.
      tokenizer: for a start from scratch or word vectors ("sentencepiece:N" is trained on the
        training rows), or of a foreign model without one.
      out: folder of the run.
      steps: updates; by default those of --epochs.
      epochs: passes over the training rows.
      batch_size: rows of a batch.
      sequence_length: tokens of a row; longer ones are cut, and counted.
      learning_rate: short for --optimizer.learning-rate.
      dropout: of the model, in place of the one it was trained with.
      label_smoothing: of the cross-entropy.
      seed: of the head, the order of the rows and dropout.
      micro_batches: parts that a batch is accumulated over.
      evaluate_every: steps between evaluations on the validation split, each with a checkpoint; by
        default four an epoch.
      patience: stop after so many evaluations one after another without a better one.
      forgetting: a source of text (see `experiments.pretrain`): the perplexity of the language
        model on its validation split is measured before and after.
      log_every: steps between rows of metrics.jsonl.
      mesh: devices by axis, as in data=2; by default one device.
    """

    task: Any
    model: TransformerConfig
    optimizer: OptimizerSettings
    schedule: Any
    start: str = "scratch"
    data: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    separator: str | None = None
    column_names: tuple[str, ...] = ()
    bad_rows: Literal["stop", "skip"] = "stop"
    share: float = 1.0
    tokenizer: str | None = None
    out: Path = Path("runs/finetune")
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    sequence_length: int = 64
    learning_rate: float | None = None
    dropout: float | None = None
    label_smoothing: float = 0.0
    seed: int = 0
    micro_batches: int = 1
    evaluate_every: int | None = None
    patience: int | None = None
    forgetting: str | None = None
    log_every: int = 10
    mesh: str = ""


def settings_of(command: Finetune, methods: tuple[Any, ...] = ()) -> tuple[Settings, Execution]:
    """Returns what the command asks for, checked.

    Raises:
      ValueError: no files, a start that there is not, sizes that do not fit each other.
    """
    optimizer = command.optimizer
    if command.learning_rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=command.learning_rate)
    form = RowFormat(
        named_pairs("columns", command.columns),
        command.separator,
        command.column_names,
        command.bad_rows,
    )
    if command.task.files != TaskFiles():
        raise ValueError(
            "--task.files is filled in from --data, --columns, --separator, --column-names, "
            "--bad-rows and --share; give those"
        )
    paths = named_pairs("data", command.data)
    files = TaskFiles(paths, form, share=command.share, share_seed=command.seed)
    check_task(methods, command.task)
    task = dataclasses.replace(command.task, files=files).resolve()
    fresh = command.model
    if fresh.positions == "rotary":  # has no table to outgrow
        longest = max(fresh.max_length, command.sequence_length)
        fresh = dataclasses.replace(fresh, max_length=longest)
    drawn = Fresh(fresh, command.sequence_length, command.seed, task.texts)
    parent = start_run(command.start, command.out / "start", command.tokenizer, drawn)
    of_vectors = foreign_kind(command.start) == VECTORS
    if command.forgetting is not None and (parent is None or of_vectors):
        raise ValueError(
            "a model that begins from scratch, or as word vectors, has nothing to forget; leave "
            "--forgetting out"
        )
    if parent is None:
        model, tokenizer = fresh, command.tokenizer or PIECES
    else:
        run = open_run(parent)
        if getattr(command.task, "mean", None) is None:  # what was given stays
            task = as_its_head_reads(task, run.settings.task)
        model, tokenizer = run.model.config, str(run.folder / "tokenizer")
        if not of_vectors and command.model not in (model, modern_mini()):
            raise ValueError(f"a start from {command.start} keeps its model; leave --model out")
        if command.forgetting is not None:
            if isinstance(model, EncoderDecoderConfig):
                raise ValueError(
                    "forgetting is measured on running text, which an encoder-decoder does not "
                    "read; leave --forgetting out"
                )
            open_source(command.forgetting)  # refuses what is not there, before anything trains
    if command.dropout is not None:
        model = dataclasses.replace(model, dropout=command.dropout)
    steps = 1 if command.steps is None else command.steps
    settings = Settings(
        phases=(Phase(steps, model, command.batch_size, command.sequence_length),),
        data=(),
        tokenizer=tokenizer,
        seed=command.seed,
        optimizer=optimizer,
        schedule=command.schedule,
        micro_batches=command.micro_batches,
        label_smoothing=command.label_smoothing,
        methods=methods,
        parent=parent,
        task=task,
    )
    evaluate_every = command.evaluate_every
    if command.steps is None or evaluate_every is None:
        if not command.epochs > 0:
            raise ValueError(f"epochs is {command.epochs}; it must be above 0")
        examples = open_task(settings, command.out)[1].splits[TRAIN].size
        epoch = max(1, examples // command.batch_size)
        if command.steps is None:
            phase = settings.phases[0]
            steps = max(1, round(command.epochs * epoch))
            settings = dataclasses.replace(
                settings, phases=(dataclasses.replace(phase, steps=steps),)
            )
        if evaluate_every is None:
            evaluate_every = max(1, min(epoch // 4, settings.steps))
    loop = LoopSettings(
        command.log_every,
        evaluate_every,
        evaluate_every,  # a checkpoint with each, so that the best one is there
        watch=task.watch,
        patience=command.patience,
    )
    return settings, Execution(loop, mesh=command.mesh)


def main() -> int:
    """Parses the command line, trains, measures, and says how it ended."""
    command, methods = parse_with_methods(
        Finetune,
        {
            "task": ("classification", TASKS),
            "model": ("modern_mini", PRESETS),
            "optimizer": ("adamw", OPTIMIZERS),
            "schedule": ("linear", SCHEDULES),
        },
        METHODS,
        description=__doc__ or "",
    )
    use_compilation_cache()
    settings, execution = settings_of(command, methods)
    begun = time.perf_counter()
    outcome = execute(settings, command.out, execution)
    seconds = time.perf_counter() - begun
    parts = "  ".join(f"{name} {spent:.1f} s" for name, spent in outcome.seconds.items())
    step = int(outcome.state.step)
    print(f"{outcome.reason} at step {step} after {seconds:.1f} s  (the whole run: {parts})")
    if outcome.reason == "signal":
        assert outcome.signal is not None
        name = signal.Signals(outcome.signal).name
        print(f"{name}: saved; the same command goes on from there")
        return 128 + outcome.signal
    if outcome.reason == "nonfinite":
        return 3
    figures = report_task(command.out, command.forgetting)
    print("\n".join(describe_report(command.out, settings, figures)))
    return 0


if __name__ == "__main__":
    run_main(main)
