"""Old text to replay: a model's own samples, as a file of tokens.

    python -m experiments.replay --run runs/first --out old.bin
    python -m experiments.pretrain --from runs/first --data '9*new.txt' old.bin --out runs/second

Training on new text alone wears off what a model could do; some of the old text among the new keeps
it. Where the text that it was trained on is at hand, name that in place of `old.bin`. Otherwise its
samples stand for it (pseudo-rehearsal, Robins 1995; for language models LAMOL, Sun et al. 2020,
arXiv:1909.03329). They are drawn from the model p as it is, so the loss of a later model q on them
is, but for what does not depend on q, the divergence from the old model:

    E_p[-log q] = H(p) + KL(p || q)

For the rows of a task see `experiments.methods.replay`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.folders import check_free
from experiments.runs.run import Run, check_continues, open_run
from model.generate import generate
from model.heads import without_heads

ROWS = 64  # written at a time
SHARD_IDS = 1 << 16  # a file of tokens has two bytes for each


@dataclass(frozen=True)
class WriteSamples:
    """What to write.

    Attributes:
      run: folder of the run whose model writes.
      out: file to make, .bin: uint16 tokens in a row, as `--data` reads them.
      tokens: about so many.
      length: tokens of a row, each a text from its start; by default those of a row in training.
      separator: id between documents in the text that the model was trained on; by default the
        tokenizer's end of document.
      step: checkpoint; by default the newest, or of a task the best.
      seed: of the draws.
    """

    run: Path
    out: Path = Path("old.bin")
    tokens: int = 200_000
    length: int | None = None
    separator: int | None = None
    step: int | None = None
    seed: int = 0


def samples(
    run: Run, rows: int, length: int, *, key: jax.Array, separator: int | None = None
) -> np.ndarray:
    """Returns texts of the model of a run, int32 [rows, 1 + length], the separator before each.

    One ends where the model has its document end, and the next begins there, in the same row.

    Args:
      run: opened.
      rows: how many.
      length: tokens that the model writes of each.
      key: of the draws, at temperature 1 from all tokens.
      separator: id between documents; by default the tokenizer's end of document.

    Raises:
      ValueError: no rows, a length that the positions do not hold, an id that there is not, or a
        model that does not continue text.
    """
    config = run.model.config
    check_continues(run)
    first = run.tokenizer.end_of_document if separator is None else separator
    if not 0 <= first < config.vocabulary_size:
        raise ValueError(f"the separator is {first}; the ids end at {config.vocabulary_size - 1}")
    if rows < 1 or not 1 <= length < config.max_length:
        raise ValueError(
            f"{rows} rows of {length} tokens cannot be written; at least one row of 1 to "
            f"{config.max_length - 1} tokens can (the model has {config.max_length} positions)"
        )
    params = without_heads(run.params)
    written = [
        generate(
            run.model,
            params,
            [[first]] * min(rows, ROWS),
            key=jax.random.fold_in(key, number),
            max_new_tokens=length,
            slots=length + 1,
        ).tokens
        for number in range(-(-rows // ROWS))
    ]
    return np.concatenate([np.asarray(part) for part in written])[:rows]


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """Writes ids as a file of tokens, uint16, under a temporary name first.

    Raises:
      ValueError: the path is no .bin or taken, or an id does not fit.
    """
    _check(path)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < SHARD_IDS:
        raise ValueError(
            f"ids up to {tokens.max()} do not fit a file of tokens, which ends at {SHARD_IDS - 1}; "
            "replay text itself: name a file of it with --data"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    np.asarray(tokens, "<u2").ravel().tofile(temporary)
    os.replace(temporary, path)


def _check(path: Path) -> None:
    check_free(path)
    if path.suffix != ".bin":
        raise ValueError(f"{path} is to hold tokens: give a name that ends in .bin")


def main() -> None:
    """Parses the command line, writes, says what."""
    import tyro

    command = tyro.cli(WriteSamples, description=__doc__)
    use_compilation_cache()
    _check(command.out)
    if command.tokens < 1:
        raise ValueError(f"tokens is {command.tokens}; it must be at least 1")
    run = open_run(command.run, command.step)
    length = command.length
    if length is None:
        trained = run.settings.phases[-1].sequence_length
        length = min(trained, run.model.config.max_length - 1)
    written = samples(
        run,
        -(-command.tokens // length),
        length,
        key=jax.random.key(command.seed),
        separator=command.separator,
    )
    write_tokens(command.out, written)
    print(f"run            {command.run} at step {run.step}")
    print(f"tokens         {written.size:,} in {command.out}")
    print("start          " + run.tokenizer.decode(written[0, 1:])[:200])


if __name__ == "__main__":
    run_main(main)
