"""What a fine-tuning starts from, as a run: one of ours, a Hugging Face folder, llama2.c weights.

RUN, RUN@STEP       a run
hf:FOLDER           `config.json` and safetensors of a GPT-2 or Llama model
llama2c:FILE.bin    weights in the first format of llama2.c
scratch             drawn from the seed
"""

from __future__ import annotations

from pathlib import Path

from experiments.convert import from_huggingface, write_converted
from experiments.folders import check_free
from experiments.run import parse_parent, read_json, read_settings
from model import llama2c
from parallel.agreement import by_main
from train.settings import Phase, Settings
from train.tokenizers import load_tokenizer

SCRATCH = "scratch"
WINDOW = 1024  # that such a run is measured on by default, where its positions allow it


def start_run(spec: str, made: Path, tokenizer: str | None = None) -> str | None:
    """Returns "RUN" or "RUN@STEP" of a start, None for scratch; what is no run becomes one.

    Args:
      spec: see above.
      made: folder for the run that a foreign model becomes; used again where it is there.
      tokenizer: of a foreign model: see `train.tokenizers.load_tokenizer`; a Hugging Face folder
        has its own.

    Raises:
      ValueError: there is no such start, the tokenizer is that of another model, or `made` was made
        of another one.
    """
    if spec == SCRATCH:
        return None
    kind, colon, name = spec.partition(":")
    if colon and kind in ("hf", "llama2c"):
        if tokenizer is None and kind == "llama2c":
            raise ValueError(f"{name} comes without a tokenizer; name it with --tokenizer")

        def make() -> None:
            if (made / "settings.json").exists():
                _check_made(made, name, tokenizer)
                return
            if not Path(name).exists():
                raise ValueError(f"{name} is not there; nothing is fetched, so download it first")
            if kind == "hf":
                from_huggingface(Path(name), made, tokenizer)
            else:
                from_llama2c(Path(name), made, str(tokenizer))

        by_main(make)
        return str(made)
    if tokenizer is not None:
        raise ValueError(f"a start from {spec} keeps its tokenizer; leave --tokenizer out")
    try:
        read_settings(parse_parent(spec)[0])
    except FileNotFoundError as error:
        raise ValueError(
            f"{error}. A start is a run (RUN or RUN@STEP), hf:FOLDER, llama2c:FILE.bin or scratch"
        ) from None
    return spec


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
