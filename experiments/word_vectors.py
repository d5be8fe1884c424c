"""Writes a run whose embedding begins as word vectors: word2vec or GloVe files.

    python -m experiments.word_vectors --vectors glove.txt --tokenizer runs/first/tokenizer \\
        --model modern_mini --out runs/vectors
    python -m experiments.pretrain --from runs/vectors --data text.txt --out runs/second

All other parameters are drawn as `experiments.pretrain` would. How many pieces of the tokenizer the
vectors cover is printed and kept in `result.json`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.assemble import initial_params
from experiments.cli import parse, run_main
from experiments.compressed import write_run
from experiments.folders import check_free
from model.config import TransformerConfig
from model.presets import PRESETS, modern_mini
from train.settings import Phase, Settings
from train.tokenizers import load_tokenizer
from train.word_vectors import start_with_vectors

# Folded into the seed for the projection, so that its draw is not that of the parameters.
_PROJECTION = 0x3EC


@dataclass(frozen=True)
class WordVectors:
    """What to start from.

    Attributes:
      vectors: file of vectors, see `train.word_vectors`.
      tokenizer: as `train.tokenizers.load_tokenizer` takes it, such as the folder of a run's.
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
      ValueError: `out` exists, no such tokenizer, and as `train.word_vectors.start_with_vectors`.
    """
    check_free(command.out)
    tokenizer = load_tokenizer(command.tokenizer)
    config = dataclasses.replace(command.model, vocabulary_size=tokenizer.vocabulary_size)
    length = command.sequence_length
    phase = Phase(1, config, batch_size=1, sequence_length=length)
    settings = Settings(phases=(phase,), data=(), tokenizer=command.tokenizer, seed=command.seed)
    drawn = jax.jit(lambda: initial_params(settings, config))()
    key = jax.random.fold_in(jax.random.key(command.seed), _PROJECTION)
    params, coverage = start_with_vectors(drawn, tokenizer, command.vectors, key)
    facts = {"reason": "word vectors", "from": str(command.vectors), **coverage._asdict()}
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(Path(name) / "tokenizer")
        write_run(command.out, config, params, Path(name) / "tokenizer", settings, facts)
    return [str(coverage), f"run: {command.out}"]


def main() -> None:
    """Parses the command line, writes the run, prints the coverage."""
    command = parse(WordVectors, {"model": ("modern_mini", PRESETS)}, description=__doc__ or "")
    print("\n".join(run_command(command)))


if __name__ == "__main__":
    run_main(main)
