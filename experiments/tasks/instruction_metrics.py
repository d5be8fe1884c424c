"""Loss of the answers to instructions, and the answers that the model writes itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from train.tasks.chat import Instructions, messages_of
from train.tasks.task import Examples
from train.tokenizers.tokenizer import Tokenizer


def instruction_metrics(
    task: Instructions, examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> dict[str, float]:
    """Returns loss and perplexity of the answers, and the share that is written word for word.

    Args:
      task: of the run.
      examples: a row for each conversation.
      outputs: see `Instructions.outputs`.
      tokenizer: of the run.
    """
    loss = float(outputs["nats"].sum() / max(outputs["count"].sum(), 1))
    rows = list(instruction_predictions(task, examples, outputs, tokenizer))
    same = [row["written"] == " ".join(row["answer"].split()) for row in rows]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "exact_match": 100.0 * sum(same) / max(len(same), 1),
    }


def instruction_predictions(
    task: Instructions, examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yields the conversation up to the last answer, that answer, and what the model writes."""
    written = zip(outputs["answer"], outputs["answer_lengths"], strict=True)
    for row, (ids, length) in zip(examples.rows, written, strict=True):
        *before, last = messages_of(row)
        yield {
            "line": row.line,
            "messages": [{"role": role, "content": text} for role, text in before],
            "answer": last.text,
            "written": " ".join(tokenizer.decode(ids[:length]).split()),
        }
