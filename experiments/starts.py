"""What a run starts from, as a run: one of ours, a Hugging Face folder, llama2.c, word vectors.

RUN, RUN@STEP       a run
hf:FOLDER           `config.json` and safetensors of a GPT-2 or Llama model
llama2c:FILE.bin    weights in the first format of llama2.c
vectors:FILE        word vectors (word2vec, GloVe) as the embedding; all else is drawn from the seed
scratch             drawn from the seed
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments import word_vectors
from experiments.convert import from_huggingface, write_converted
from experiments.folders import check_free
from experiments.json_files import read_json
from experiments.run_names import parse_parent
from experiments.runs.prepare import keep_tokenizer
from experiments.runs.run import read_settings
from model import llama2c
from model.config import TransformerConfig
from parallel.agreement import by_main
from train.settings import Phase, Settings
from train.tokenizers.tokenizer import load_tokenizer

SCRATCH = "scratch"
HF, LLAMA2C, VECTORS = "hf", "llama2c", "vectors"
WINDOW = 1024  # that such a run is measured on by default, where its positions allow it
PIECES = "sentencepiece:4096"


@dataclass(frozen=True)
class Fresh:
    """What word vectors do not say of the model that they begin.

    Attributes:
      model: its config; the vocabulary is the tokenizer's.
      sequence_length: of rows.
      seed: of what is drawn.
      texts: that pieces are learned from, for a tokenizer "sentencepiece:N".
    """

    model: TransformerConfig
    sequence_length: int
    seed: int
    texts: Callable[[], Iterable[str]]


def foreign_kind(spec: str) -> str | None:
    """Returns what has to become a run first, None for a run and for scratch.

    >>> foreign_kind("hf:gpt2"), foreign_kind("runs/a@300")
    ('hf', None)
    """
    kind, colon, _ = spec.partition(":")
    return kind if colon and kind in (HF, LLAMA2C, VECTORS) else None


def start_run(
    spec: str, made: Path, tokenizer: str | None = None, fresh: Fresh | None = None
) -> str | None:
    """Returns "RUN" or "RUN@STEP" of a start, None for scratch; what is no run becomes one.

    What word vectors cover is printed when they become a run.

    Args:
      spec: see above.
      made: folder for the run that a foreign model becomes; used again where it is there.
      tokenizer: of a foreign model: see `train.tokenizers.tokenizer.load_tokenizer`; a Hugging Face
        folder has its own. Of word vectors also "sentencepiece:N", by default with N = 4096.
      fresh: for word vectors.

    Raises:
      ValueError: there is no such start, the tokenizer is that of another model, or `made` was made
        of another one.
    """
    if spec == SCRATCH:
        return None
    kind, name = foreign_kind(spec), spec.partition(":")[2]
    if kind is not None:
        if tokenizer is None and kind == LLAMA2C:
            raise ValueError(f"{name} comes without a tokenizer; name it with --tokenizer")
        if kind == VECTORS and fresh is None:
            raise ValueError(f"{spec} says nothing of a model, and none was given")

        def make() -> None:
            there = (made / "settings.json").exists()
            if kind == VECTORS:
                assert fresh is not None
                _make_of_vectors(Path(name), made, tokenizer or PIECES, fresh, there)
                return
            if there:
                _check_made(made, name, tokenizer)
                return
            if not Path(name).exists():
                raise ValueError(f"{name} is not there; nothing is fetched, so download it first")
            if kind == HF:
                from_huggingface(Path(name), made, tokenizer)
            else:
                from_llama2c(Path(name), made, str(tokenizer))

        by_main(make)
        return str(made)
    if tokenizer is not None:
        raise ValueError(f"a start from {spec} keeps its tokenizer; leave --tokenizer out")
    if Path(spec).is_file():
        raise ValueError(
            f"{spec} is a file; say what it is: vectors:{spec} for word vectors, llama2c:{spec} "
            "for weights of llama2.c"
        )
    try:
        read_settings(parse_parent(spec)[0])
    except FileNotFoundError as error:
        raise ValueError(
            f"{error}. A start is a run (RUN or RUN@STEP), hf:FOLDER, llama2c:FILE.bin, "
            "vectors:FILE or scratch"
        ) from None
    return spec


def _make_of_vectors(path: Path, made: Path, tokenizer: str, fresh: Fresh, there: bool) -> None:
    settings = word_vectors.settings_of(fresh.model, fresh.sequence_length, tokenizer, fresh.seed)
    if there:
        _check_made(made, str(path), tokenizer)
        old = read_settings(made)
        vocabulary = old.phases[0].model.vocabulary_size
        model = dataclasses.replace(fresh.model, vocabulary_size=vocabulary)
        if (old.phases[0].model, old.seed) != (model, fresh.seed):
            raise ValueError(f"{made} was made with another model or seed; choose another folder")
        return
    with tempfile.TemporaryDirectory() as folder:
        pieces = keep_tokenizer(tokenizer, Path(folder), fresh.texts)
        print(word_vectors.write_vectors(path, made, pieces, settings))


def _check_made(made: Path, name: str, tokenizer: str | None) -> None:
    """Raises ValueError if `made` was made of something else."""
    ours = (str(Path(name)), str(Path(name)) if tokenizer is None else tokenizer)
    theirs = (read_json(made / "result.json")["from"], read_settings(made).tokenizer)
    if ours != theirs:
        raise ValueError(
            f"{made} was made of {theirs[0]} with the tokenizer of {theirs[1]}, not of {ours[0]} "
            f"with that of {ours[1]}; choose another folder"
        )


def from_llama2c(weights: Path, out: Path, tokenizer: str) -> None:
    """Writes a llama2.c `.bin` file as a run with one checkpoint, of step 0.

    Args:
      weights: the file.
      out: the run to make.
      tokenizer: its own, such as llama2.c's `tokenizer.bin`.

    Raises:
      ValueError: `out` exists, the file is damaged, or the tokenizer is that of another model.
    """
    check_free(out)
    pieces = load_tokenizer(tokenizer)
    config, params = llama2c.load(weights)
    if pieces.vocabulary_size != config.vocabulary_size:
        raise ValueError(
            f"the model in {weights} has {config.vocabulary_size} ids and the tokenizer "
            f"{tokenizer} has {pieces.vocabulary_size}: it is that of another model"
        )
    phase = Phase(1, config, batch_size=1, sequence_length=min(WINDOW, config.max_length))
    settings = Settings(phases=(phase,), data=(), tokenizer=tokenizer)
    write_converted(out, settings, params, pieces, weights)
