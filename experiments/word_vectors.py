"""Writes a run whose embedding begins as word vectors: word2vec or GloVe files.

    python -m experiments.word_vectors --vectors glove.txt --tokenizer runs/first/tokenizer \\
        --model modern_mini --out runs/vectors
    python -m experiments.pretrain --from runs/vectors --data text.txt --out runs/second

`--from vectors:glove.txt` of `experiments.pretrain` and `--start vectors:glove.txt` of
`experiments.finetune` do both in one. All other parameters are drawn as `experiments.pretrain`
would. How many pieces of the tokenizer the vectors cover is printed and kept in `result.json`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.cli import parse, run_main
from experiments.compression.runs import write_run
from experiments.folders import check_free
from experiments.runs.assemble import initial_params
from model.config import TransformerConfig
from model.presets import PRESETS, modern_mini
from train.settings import Phase, Settings
from train.text.word_vectors import Coverage, start_with_vectors
from train.tokenizers.tokenizer import Tokenizer, load_tokenizer

# Folded into the seed for the projection, so that its draw is not that of the parameters.
_PROJECTION = 0x3EC


@dataclass(frozen=True)
class WordVectors:
    """What to start from.

    Attributes:
      vectors: file of vectors, see `train.text.word_vectors`.
      tokenizer: as `train.tokenizers.tokenizer.load_tokenizer` takes it, such as the folder of a
        run's.
      out: run to make.
      model: its config; the vocabulary is the tokenizer's.
      sequence_length: of rows, for runs that start from this one.
      seed: of the other parameters.
    """

    vectors: Path = Path("vectors.txt")
    tokenizer: str = "bytes"
    out: Path = Path("runs/vectors")
    model: TransformerConfig = dataclasses.field(default_factory=modern_mini)
    sequence_length: int = 128
    seed: int = 0


def run_command(command: WordVectors) -> list[str]:
    """Writes the run; returns lines to print.

    Raises:
      ValueError: `out` exists, no such tokenizer, and as
        `train.text.word_vectors.start_with_vectors`.
    """
    check_free(command.out)
    coverage = write_vectors(
        command.vectors,
        command.out,
        load_tokenizer(command.tokenizer),
        settings_of(command.model, command.sequence_length, command.tokenizer, command.seed),
    )
    return [str(coverage), f"run: {command.out}"]


def settings_of(
    model: TransformerConfig, sequence_length: int, tokenizer: str, seed: int
) -> Settings:
    """Returns those of a run that word vectors begin; its vocabulary follows the tokenizer."""
    phase = Phase(1, model, batch_size=1, sequence_length=sequence_length)
    return Settings(phases=(phase,), data=(), tokenizer=tokenizer, seed=seed)


def write_vectors(vectors: Path, out: Path, tokenizer: Tokenizer, settings: Settings) -> Coverage:
    """Writes a run of one checkpoint, of step 0, whose embedding begins as word vectors.

    Args:
      vectors: file, see `train.text.word_vectors`.
      out: run to make.
      tokenizer: its own.
      settings: see `settings_of`; the seed draws the other parameters.

    Raises:
      ValueError: `out` exists, and as `train.text.word_vectors.start_with_vectors`.
    """
    given = settings.phases[0].model
    config = dataclasses.replace(given, vocabulary_size=tokenizer.vocabulary_size)
    drawn = jax.jit(lambda: initial_params(settings, config))()
    key = jax.random.fold_in(jax.random.key(settings.seed), _PROJECTION)
    params, coverage = start_with_vectors(drawn, tokenizer, vectors, key)
    facts = {"reason": "word vectors", "from": str(vectors), **coverage._asdict()}
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(Path(name) / "tokenizer")
        write_run(out, config, params, Path(name) / "tokenizer", settings, facts)
    return coverage


def main() -> None:
    """Parses the command line, writes the run, prints the coverage."""
    command = parse(WordVectors, {"model": ("modern_mini", PRESETS)}, description=__doc__ or "")
    print("\n".join(run_command(command)))


if __name__ == "__main__":
    run_main(main)
