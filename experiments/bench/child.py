"""The process of one side: builds its subject, then answers a line of JSON for each that it gets.

Started by `experiments.bench.sides.Side`; not for the command line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Subject(NamedTuple):
    """What a side is asked about.

    Attributes:
      facts: what it says of itself at the start.
      asks: question -> function of the arguments, which returns JSON values.
    """

    facts: dict[str, Any]
    asks: Mapping[str, Callable[..., Any]]


# The module and function of each, so that no side imports the library of the other.
SUBJECTS: dict[str, tuple[str, str]] = {
    "train.jax": ("experiments.bench.subjects_jax", "training"),
    "train.torch": ("experiments.bench.subjects_torch", "training"),
    "decode.jax": ("experiments.bench.subjects_jax", "decoding"),
    "decode.torch": ("experiments.bench.subjects_torch", "decoding"),
    "tokenise.ours": ("experiments.bench.tokenise", "ours"),
    "tokenise.tokenizers": ("experiments.bench.tokenise", "theirs"),
    "gpu.step": ("experiments.bench.gpu_step", "subject"),
    "gpu.products": ("experiments.bench.gpu_products", "subject"),
    "gpu.ceilings": ("experiments.bench.gpu_products", "ceilings"),
    "growth": ("experiments.bench.growth", "subject"),
    "ladder": ("experiments.ladder.side", "subject"),
}


def serve(read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answers lines until there are no more; the first names the subject.

    Args:
      read: returns the next line, "" at the end.
      write: takes a line.
    """
    subject: Subject | None = None
    while line := read():
        message = json.loads(line)
        try:
            if subject is None:
                module, function = SUBJECTS[message["subject"]]
                make = getattr(importlib.import_module(module), function)
                subject = make(message["settings"])
                answer = {"answer": subject.facts}
            else:
                answer = {"answer": subject.asks[message["ask"]](**message["arguments"])}
            text = json.dumps(answer)
        except Exception:
            text = json.dumps({"error": traceback.format_exc()})
        write(text + "\n")


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size  # Linux counts in KiB


def main() -> None:
    """Serves on the standard streams; whatever else prints goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(text: str) -> None:
        answers.write(text)
        answers.flush()

    serve(sys.stdin.readline, write)


if __name__ == "__main__":
    main()
