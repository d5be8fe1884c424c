"""Continues a prompt with a trained run.

python -m experiments.generate --run runs/first --prompt "def main(" --max-new-tokens 200
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from compress.quantization.kv_cache import CACHES
from experiments.adapters import adapted_run
from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.runs.run import check_continues
from model.generate import Sampling, generate


@dataclass(frozen=True)
class Generate:
    """Settings of a generation.

    Attributes:
      run: folder of the run.
      prompt: text to continue; empty starts a new document.
      opening: what the prompt is the start of: "text" anywhere, or a new "document", before which
        stands what ends one in the data. Models of llama2.c have seen no other.
      step: checkpoint; by default the newest, or of a task the best.
      max_new_tokens: at most so many; less where the model's positions end.
      temperature: 0 for greedy.
      top_k: keep the k most probable tokens.
      top_p: keep the most probable tokens up to this probability.
      samples: how many continuations.
      seed: of the draws.
      cache: "int8" keeps keys and values in 8 bits.
      adapters: folders of `experiments.adapters`, put onto the run, each with its weight as
        "FOLDER" or "WEIGHT*FOLDER".
    """

    run: Path
    prompt: str = ""
    opening: Literal["text", "document"] = "text"
    step: int | None = None
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    samples: int = 1
    seed: int = 0
    cache: Literal["float", "int8"] = "float"
    adapters: tuple[str, ...] = ()


def main() -> None:
    """Parses the command line, generates, prints."""
    import tyro

    command = tyro.cli(Generate, description=__doc__)
    if command.samples < 1:
        raise ValueError(f"samples is {command.samples}; it must be at least 1")
    use_compilation_cache()
    run = adapted_run(command.run, command.step, command.adapters)
    check_continues(run)
    ids = run.tokenizer.encode(command.prompt).tolist()
    if command.opening == "document" or not ids:
        ids = [run.tokenizer.end_of_document, *ids]
    positions = run.model.config.max_length
    if len(ids) >= positions:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the model {positions} positions, which leaves "
            f"none for an answer; give a prompt of at most {positions - 1} tokens"
        )
    found = generate(
        run.model,
        run.params,
        [ids] * command.samples,
        key=jax.random.key(command.seed),
        max_new_tokens=min(command.max_new_tokens, positions - len(ids)),
        sampling=Sampling(command.temperature, command.top_k, command.top_p),
        stop_tokens=[run.tokenizer.end_of_document],
        cache=CACHES[command.cache],
    )
    for number, new in enumerate(found.new_tokens(), start=1):
        if command.samples > 1:
            print(f"--- {number}")
        print(command.prompt + run.tokenizer.decode(new))


if __name__ == "__main__":
    run_main(main)
