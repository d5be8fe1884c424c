"""What the language model of `experiments.ablate.transfer_sst2` reads, in folders of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.folders import made_at_once
from experiments.grid import Measurement
from train.tasks.classification import Classification


def keep_sentences(
    cells: Path, task: Classification, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the training texts without their labels, a document each, as they are encoded."""
    sentences = list(task.texts())
    content = "".join(json.dumps({"text": text}) + "\n" for text in sentences)
    _keep(cells, settings, "sentences.jsonl", content)
    return {"documents": len(sentences)}


def keep_plays(cells: Path, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the plays."""
    content = path.read_text(encoding="utf-8")
    _keep(cells, settings, "plays.txt", content)
    return {"characters": len(content)}


def _keep(cells: Path, settings: Mapping[str, Any], name: str, content: str) -> None:
    """A folder under the key of what it was made from, as the cells that read it name it."""
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        with made_at_once(out) as folder:
            folder.mkdir(parents=True)
            (folder / name).write_text(content, encoding="utf-8")
