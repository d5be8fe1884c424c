"""Compresses a trained run or a Hugging Face folder, after training.

    python -m experiments.compress --run runs/first --method gptq --method.format q4_0 \\
        --calibration text.txt --out runs/small

Prints the report, before and after (`experiments.compression_report`). What comes out is a run:
`experiments.generate`, `experiments.evaluate` and `experiments.export` open it. What pruning or a
low rank has lost may be trained back, the larger model teaching; beside quantized weights, which do
not train, adapters do:

    python -m experiments.pretrain --from runs/pruned --data FILE --method distil \\
        --distil.teacher runs/first --out runs/recovered
    python -m experiments.pretrain --from runs/first --data FILE --method lora \\
        --lora.base-run runs/small --out runs/adapted
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compress.calibrate import not_finite, windows
from compress.export.stored import is_packed
from compress.lora import merged
from experiments.cli import parse, run_main
from experiments.compilation import use_compilation_cache
from experiments.compression.compressors import COMPRESSORS, settings_to_json
from experiments.compression.runs import write_run
from experiments.compression_report import report, write
from experiments.convert import from_huggingface
from experiments.folders import check_free
from experiments.runs.run import Run, open_run, phase_at
from model.rules import path_of
from train.corpus import Corpus, build_corpus
from train.text.sources import open_source, parse_mixture


@dataclass(frozen=True)
class Compress:
    """What to compress, with what; give --run or --hf.

    Attributes:
      method: name, and its fields. What takes training (quantization-aware training, gradual and
        sparse training, LoRA, distillation) is a method of experiments.pretrain --from-run RUN.
      run: run to compress.
      hf: Hugging Face folder to compress.
      out: run to make; it must not exist.
      calibration: source whose train split is looked at; by default the run's first.
      step: checkpoint of the run; by default the newest, or of a task the best.
      tokenizer: for --hf, as in experiments.convert.
      windows: at most so many windows of calibration text, spread evenly over the split.
      length: tokens of a window, by default as in training.
      batch_size: windows at a time.
      repeats: of each timing in the report; 0 leaves timings out.
    """

    method: Any
    run: Path | None = None
    hf: Path | None = None
    out: Path = Path("runs/compressed")
    calibration: str | None = None
    step: int | None = None
    tokenizer: str | None = None
    windows: int = 128
    length: int | None = None
    batch_size: int = 8
    repeats: int = 5


def calibration_windows(
    tokens: np.ndarray, *, length: int, count: int, batch: int
) -> list[np.ndarray]:
    """Returns batches of up to `count` windows that are spread evenly over the tokens.

    Raises:
      ValueError: there are fewer tokens than one window.

    >>> calibration_windows(np.arange(100), length=4, count=2, batch=2)[0].tolist()
    [[0, 1, 2, 3], [96, 97, 98, 99]]
    """
    fits = min(count, len(tokens) // max(length, 1))
    starts = np.linspace(0, max(len(tokens) - length, 0), max(fits, 1)).astype(int)
    rows = [np.asarray(tokens[start : start + length]) for start in starts]
    return windows(np.concatenate(rows), length=length, batch=batch, count=count)


def compress(
    run: Run, method: Any, corpus: Corpus, command: Compress
) -> tuple[Any, Any, dict[str, Any]]:
    """Returns config and parameters of the compressed model, and facts about how it was made.

    Args:
      run: what to compress; its parameters are plain, see `check_plain`.
      method: of `experiments.compression.compressors`.
      corpus: for calibration.
      command: how much of it.

    Raises:
      ValueError: the text is shorter than a window, or what the method finds wrong.
    """
    phase = run.settings.phases[phase_at(run.settings, run.step)[0]]
    length = command.length or min(phase.sequence_length, run.model.config.max_length)
    batches = calibration_windows(
        corpus.split("train").tokens,
        length=length,
        count=command.windows,
        batch=command.batch_size,
    )
    config, params = method(run.model, run.params, batches)
    facts = {
        "from": str(run.folder),
        "from_step": run.step,
        **settings_to_json(method),
        "calibration": {
            "source": corpus.name,
            "fingerprint": corpus.fingerprint,
            "windows": sum(len(batch) for batch in batches),
            "length": length,
        },
    }
    return config, params, facts


def check_plain(run: Run) -> None:
    """Raises ValueError unless all parameters are plain arrays of finite numbers."""
    leaves = jax.tree_util.tree_flatten_with_path(run.params, is_leaf=is_packed)[0]
    if packed := [path_of(path) for path, leaf in leaves if is_packed(leaf)]:
        raise ValueError(
            f"{run.folder} is quantized already ({packed[0]}); compress the run that it was made of"
        )
    check_finite(run)


def check_finite(run: Run) -> None:
    """Raises ValueError if a parameter holds NaN or infinity."""
    if bad := not_finite(run.params):
        raise ValueError(
            f"{', '.join(bad)} of {run.folder} holds NaN or infinity; choose a checkpoint from "
            "before training diverged with --step"
        )


def run_command(command: Compress) -> list[str]:
    """Compresses what the command says; returns lines to print.

    Raises:
      ValueError: not one of --run and --hf, `out` exists, no calibration source, the run is
        compressed already or holds NaN, or as `compress`.
    """
    if (command.run is None) == (command.hf is None):
        given = "neither" if command.run is None else "both"
        raise ValueError(f"{given} of --run and --hf were given; name one, to compress")
    if command.hf is not None and command.step is not None:
        raise ValueError("a Hugging Face folder has no steps; leave --step out")
    if command.run is not None and command.tokenizer is not None:
        raise ValueError("a run has its own tokenizer; leave --tokenizer out")
    check_free(command.out)
    if command.run is not None:
        return _compress_to(command, open_run(command.run, command.step), str(command.run))
    assert command.hf is not None
    with tempfile.TemporaryDirectory() as name:
        from_huggingface(command.hf, Path(name) / "run", command.tokenizer)
        return _compress_to(command, open_run(Path(name) / "run"), str(command.hf))


def _compress_to(command: Compress, run: Run, name: str) -> list[str]:
    if command.calibration is None and not run.settings.data:
        raise ValueError(f"{name} has no running text of its own; give --calibration")
    plain = dataclasses.replace(run, params=merged(run.params))
    check_plain(plain)  # before any text is read
    source = command.calibration or parse_mixture(run.settings.data)[0][0]
    corpus = build_corpus(open_source(source), run.tokenizer)
    config, params, facts = compress(plain, command.method, corpus, command)
    facts = {**facts, "from": name}
    tokenizer = run.folder / "tokenizer"
    write_run(command.out, config, params, tokenizer, run.settings, facts)
    lines = [f"run          {command.out}, from {name} at step {run.step}", ""]
    if "validation" not in corpus.splits:
        return [*lines, f"no report: {corpus.name} has no validation split: {corpus.missing}"]
    found = report(run, open_run(command.out), corpus.split("validation"), repeats=command.repeats)
    return [*lines, write(command.out, found)]


def main() -> None:
    """Parses the command line, compresses, prints."""
    command = parse(Compress, {"method": ("rtn", COMPRESSORS)}, description=__doc__ or "")
    use_compilation_cache()
    print("\n".join(run_command(command)))


if __name__ == "__main__":
    run_main(main)
