"""A run: a folder that `experiments.runs.execute` fills and `open_run` opens.

settings.json     what the run is
data.json         what its text was, by content
tokenizer/        self-contained
frozen/           what does not train, if anything
metrics.jsonl     the record, a row a line
checkpoints/      state by step
weights.json      which parameters are quantized and how, if any (`experiments.compression.runs`)
result.json       how it ended
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from compress.export.stored import abstract_from
from experiments.json_files import read_json
from experiments.methods.table import METHODS
from experiments.run_names import parse_parent
from experiments.runs.assemble import (
    abstract_frozen,
    abstract_state,
    assemble,
    averages,
    effective_weights,
    read_frozen,
)
from experiments.tasks.table import TASKS
from model.build import build_model
from model.config import EncoderDecoderConfig, TransformerConfig
from model.transformer import Transformer
from train.checkpoints import Checkpoints, Restored
from train.optimizers.averaging import average_of
from train.plugs import State
from train.settings import Phase, Settings, from_json
from train.tokenizers.tokenizer import Tokenizer, load_tokenizer

START = ("settings.json", "data.json", "tokenizer", "frozen")  # what a first start writes
STARTING = ".starting"  # there until all of it is written
WEIGHTS = "weights.json"


@dataclass(frozen=True)
class Run:
    """A trained run, opened.

    Attributes:
      folder: where it lies.
      settings: what it is.
      step: of the checkpoint.
      model: with the config of that checkpoint's phase.
      params: what its model runs with: what trained and what did not, merged, and the weight
        transforms applied.
      tokenizer: its tokenizer.
    """

    folder: Path
    settings: Settings
    step: int
    model: Transformer
    params: Any
    tokenizer: Tokenizer


def open_run(folder: str | os.PathLike[str], step: int | None = None) -> Run:
    """Opens a run at `step`, or at its newest intact checkpoint; of a task, at the best there is.

    Args:
      folder: of the run; "RUN@STEP" as well, where no folder is called so.
      step: of the checkpoint.

    Raises:
      FileNotFoundError: the folder is no run, or has no such checkpoint.
      ValueError: the checkpoint is damaged.
    """
    folder = Path(folder)
    if step is None and not folder.exists():
        folder, step = parse_parent(str(folder))
    settings = read_settings(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    with Checkpoints(folder / "checkpoints", mode="read") as checkpoints:
        there = checkpoints.steps()
        if step is None and settings.task is not None:
            step = checkpoints.best_step()
        at = step if step is not None else (there[-1] if there else 0)
        # At the end of a phase, phase_at() names the next one, and the model is still this one's.
        phase = settings.phases[_phase_of(checkpoints, settings, at)]
        parts = assemble(settings, config_for(phase, tokenizer))
        state = abstract_state(settings, parts)
        stored = read_json(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {}
        abstract_params = abstract_from(state.params, stored) if stored else state.params
        found = checkpoints.restore_part("params", abstract_params, step)
        if averages(settings) and not stored:
            found = averaged_weights(checkpoints, state, found)
        # What the gradient or the workers remember is of no use here.
        extra = {
            name: checkpoints.restore_part(f"extra/{name}", state.extra[name], found.step).state
            for name in (transform.name for transform in parts.plugs.transforms)
            if jax.tree.leaves(state.extra[name])
        }
        abstract = abstract_frozen(settings, parts)
        frozen = read_frozen(folder, abstract, found.info.get("frozen"))
    for passed, reason in found.skipped:
        about = f"The checkpoint of step {passed} is damaged and was passed over: {reason}"
        print(about, file=sys.stderr)  # what a command prints may be piped on
    params = effective_weights(parts, found.step, found.state, frozen, extra)
    return Run(folder, settings, found.step, build_model(parts.config), params, tokenizer)


def check_continues(run: Run) -> None:
    """Raises ValueError for a run whose model reads a source: it continues no text."""
    if isinstance(run.model.config, EncoderDecoderConfig):
        raise ValueError(
            f"{run.folder} has an encoder and continues no text; experiments.chat writes its "
            "answers, and what it was measured by stands in its task.json"
        )


def best_step(folder: str | os.PathLike[str]) -> int | None:
    """Returns the step of the best checkpoint of a run, by what it was watched by; None if none is.

    Raises:
      FileNotFoundError: the folder is no run.
    """
    read_settings(Path(folder))
    with Checkpoints(Path(folder) / "checkpoints", mode="read") as checkpoints:
        return checkpoints.best_step()


def averaged_weights(checkpoints: Checkpoints, state: State, found: Restored) -> Restored:
    """Returns, in place of the weights of a checkpoint, the average that was saved with them.

    Args:
      checkpoints: of the run.
      state: its shapes.
      found: the parameters of the checkpoint.
    """
    path, abstract = average_of(state.optimizer)
    average = checkpoints.restore_part(f"optimizer/{path}", abstract, found.step).state
    weights = jax.tree.map(lambda a, w: a.astype(w.dtype), average, found.state)
    return dataclasses.replace(found, state=weights)


def _phase_of(checkpoints: Checkpoints, settings: Settings, step: int) -> int:
    """The phase that a checkpoint was saved in; the one its step belongs to if it does not say."""
    try:
        said = checkpoints.info(step).get("phase")
    except (FileNotFoundError, ValueError):  # missing or damaged: for reading it to say
        said = None
    return phase_at(settings, step)[0] if said is None else int(said)


def read_settings(folder: Path) -> Settings:
    """Returns the settings of the run in `folder`."""
    path = folder / "settings.json"
    if not path.exists():
        hint = ""
        if (folder / "config.json").exists():
            hint = "; experiments.convert --hf makes one of a Hugging Face folder"
        raise FileNotFoundError(f"{folder} is no run: it has no settings.json{hint}")
    try:
        return from_json(read_json(path), METHODS, TASKS)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run as this version writes them ({error}); "
            "open it with the version that wrote it"
        ) from error


def phase_at(settings: Settings, step: int) -> tuple[int, int, int]:
    """Returns (index, first step, last step) of the phase that step number `step` belongs to.

    >>> from model.presets import gpt2_tiny
    >>> two = Settings(phases=(Phase(10, gpt2_tiny(), 4, 8), Phase(5, gpt2_tiny(), 4, 16)))
    >>> phase_at(two, 9), phase_at(two, 10), phase_at(two, 15)
    ((0, 0, 10), (1, 10, 15), (1, 10, 15))
    """
    first = 0
    for index, phase in enumerate(settings.phases):
        if step < first + phase.steps or index == len(settings.phases) - 1:
            return index, first, first + phase.steps
        first += phase.steps
    raise AssertionError("a run has at least one phase")


def config_for(phase: Phase, tokenizer: Tokenizer) -> TransformerConfig:
    """Returns the phase's config with the tokenizer's vocabulary."""
    return dataclasses.replace(phase.model, vocabulary_size=tokenizer.vocabulary_size)


def begin_start(out: Path) -> None:
    """Marks that what a first start is about to put into `out` is ours to remove.

    Raises:
      ValueError: there are files in `out` that a run would take for its own.
    """
    if (out / STARTING).exists():
        forget_start(out)  # a start that was killed must not lend this one its tokenizer
    if theirs := [name for name in START if (out / name).exists()]:
        raise ValueError(f"{out} is no run but holds {', '.join(theirs)}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / STARTING).touch()


def forget_start(out: Path) -> None:
    """Removes what a first start has put into `out`, for a run that never began."""
    for name in START:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / STARTING).unlink(missing_ok=True)
