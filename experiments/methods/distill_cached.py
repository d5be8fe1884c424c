"""Distillation from a cache as a method: the teacher reads the data once, and no step waits for it.

    python -m experiments.pretrain --tokenizer runs/teacher/tokenizer --model modern_mini \\
        --method distil_cached --distil-cached.teacher runs/teacher --out runs/student

The cache is written before the first step, unless one for this teacher and data is there already;
what that cost is in `teacher_cache.json` of the run. The loss becomes
`hard * cross-entropy + soft * T^2 KL` of what was kept (`compress.distillation.teacher_targets`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from compress.distillation.logits import check_vocabularies
from compress.distillation.teacher_cache import TeacherCache, open_teacher_cache
from experiments.json_files import write_json
from experiments.methods.cached_answers import Kept, cached_term, with_targets, write_cache
from experiments.methods.distill_terms import over_run, scaled
from experiments.methods.teacher import (
    Teacher,
    check_reads_alike,
    resolve_teacher,
)
from experiments.run_names import folder_of
from model.config import config_from_dict
from train.cache import default_cache
from train.methods import OpenRun, Plugs, Reading, Setup
from train.plugs import LossTerm
from train.tokenizers.tokenizer import Tokenizer
from train.tree_store import tree_hash

COST = "teacher_cache.json"


@dataclass(frozen=True)
class Resolved(Teacher):
    """A teacher whose parameters are known by their hash.

    Attributes:
      hash: of its parameters, `train.tree_store.tree_hash`.
    """

    hash: str = ""


@dataclass(frozen=True)
class DistilCached:
    """Trains on what a teacher has said, read from disk.

    Attributes:
      teacher: "RUN" or "RUN@STEP", a run with the same tokenizer.
      hard: weight of the loss on the data (times its own): one number, or several that
        the run goes through in lines, as in `distil`.
      soft: weight of the divergence from the teacher's distribution.
      kind: what is kept: "top_k" with the mass of the others as one, or "sampled", unbiased draws.
      k: tokens kept of each position.
      temperature: of teacher and student, fixed when the cache is written.
      proposal: exponent of what is drawn from, for "sampled".
      draws: seed of the draws.
      cover: what the teacher reads: "run", the rows of this run's own steps, or "split", every
        window of the training data, which runs of other seeds and lengths then share.
      folder: where the cache lies; by default under the data cache of this machine.
      resolved: filled in at the start of the run.
    """

    name: ClassVar[str] = "distil_cached"
    teacher: str = ""
    hard: tuple[float, ...] = (0.5,)
    soft: tuple[float, ...] = (0.5,)
    kind: Literal["top_k", "sampled"] = "top_k"
    k: int = 16
    temperature: float = 1.0
    proposal: float = 1.0
    draws: int = 0
    cover: Literal["run", "split"] = "run"
    folder: str | None = None
    resolved: Any = None

    def __post_init__(self) -> None:
        for name in ("hard", "soft"):
            knots = getattr(self, name)
            if not knots or not all(0 <= knot < float("inf") for knot in knots):
                raise ValueError(f"{name} is {knots}; give one weight or several, 0 or more")
        if not any(self.soft):
            raise ValueError("soft is 0, so nothing would be learned from the teacher; raise it")
        if self.cover not in ("run", "split"):
            raise ValueError(f"cover is {self.cover!r}; choose 'run' or 'split'")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; keep at least 1 token")
        cached_term(self.kept)
        if isinstance(self.resolved, dict):  # from JSON
            fields = self.resolved | {"model": config_from_dict(self.resolved["model"])}
            object.__setattr__(self, "resolved", Resolved(**fields))

    @property
    def kept(self) -> Kept:
        """What is kept of the teacher's distribution."""
        return Kept(self.kind, self.k, self.temperature, self.proposal, self.draws)

    def resolve(self, saved: DistilCached | None, open_run: OpenRun) -> DistilCached:
        """Returns the settings with the teacher known; see `experiments.methods.distill.Distil`."""

        def of(run: Any) -> Resolved:
            about = (run.model.config, run.step, run.tokenizer.fingerprint())
            return Resolved(*about, hash=tree_hash(run.params))

        known = resolve_teacher(self, saved, open_run, "--distil-cached.teacher", of)
        return dataclasses.replace(self, resolved=known)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a teacher that reads other tokens than the student."""
        if self.resolved is not None:
            check_reads_alike(tokenizer, self.resolved, self.teacher)

    def build(self, setup: Setup) -> Plugs:
        """Puts the soft loss beside the cross-entropy.

        Raises:
          ValueError: a teacher with another vocabulary, or a k that it does not have.
        """
        if self.resolved is None:
            raise ValueError("the teacher is not known yet: call `resolve` first")
        size = setup.config.vocabulary_size
        check_vocabularies(size, self.resolved.model.vocabulary_size)
        if self.kind == "top_k" and self.k >= size:
            raise ValueError(f"k is {self.k}; it must be below the vocabulary of {size}")
        hard, soft = (over_run(knots, setup.steps) for knots in (self.hard, self.soft))

        def terms(so_far: tuple[LossTerm, ...]) -> tuple[LossTerm, ...]:
            return (*(scaled(term, hard) for term in so_far), cached_term(self.kept, weight=soft))

        return Plugs(terms=terms)

    def read(self, reading: Reading) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Opens the cache, or lets the teacher write it; returns `batch -> batch with answers`.

        Raises:
          ValueError: phases of several lengths; a damaged cache; a teacher that has changed.
          FileNotFoundError: no cache, and no teacher to write it.
        """
        lengths = {phase.sequence_length for phase in reading.settings.phases}
        if len(lengths) > 1:
            raise ValueError(
                f"a cache holds rows of one length, and the phases have {sorted(lengths)}; use the "
                "method distil, whose teacher reads along"
            )
        data = self._data(reading)
        identity = {"teacher": self.resolved.hash, **dataclasses.asdict(self.kept), **data}
        folder = Path(self.folder) if self.folder else _place(identity)
        cache, seconds = self._open(folder, identity, reading, data)
        _note(reading.out / COST, folder, cache, seconds)
        return lambda batch: with_targets(cache, batch)

    def _data(self, reading: Reading) -> dict[str, Any]:
        """What says, beside the teacher, which rows a cache holds."""
        settings, phase = reading.settings, reading.settings.phases[0]
        facts = {
            "data": reading.fingerprints,
            "length": phase.sequence_length,
            "boundaries": settings.document_boundaries,
            "cover": self.cover,
        }
        if self.cover == "split":
            return facts
        batches = [[p.steps, p.batch_size] for p in settings.phases]
        return {**facts, "mixture": list(settings.data), "seed": settings.seed, "batches": batches}

    def _open(
        self, folder: Path, identity: dict[str, Any], reading: Reading, data: dict[str, Any]
    ) -> tuple[TeacherCache, float]:
        try:
            return open_teacher_cache(folder, identity), 0.0
        except FileNotFoundError:
            pass
        start = time.perf_counter()
        run = reading.open_run(f"{folder_of(self.teacher)}@{self.resolved.step}")
        if (found := tree_hash(run.params)) != self.resolved.hash:
            raise ValueError(
                f"{self.teacher} is another teacher now (hash {found[:12]}) than when this run was "
                f"set up ({self.resolved.hash[:12]}); put it back, or begin in another folder"
            )
        batches = _steps(reading) if self.cover == "run" else reading.windows()
        cache = write_cache(folder, run.model, run.params, batches, self.kept, data)
        return cache, time.perf_counter() - start


def _steps(reading: Reading) -> Iterator[dict[str, np.ndarray]]:
    first = 0
    for phase in reading.settings.phases:
        dataset = reading.dataset(phase)
        for step in range(first, first + phase.steps):
            yield dataset[step]
        first += phase.steps


def _place(identity: dict[str, Any]) -> Path:
    text = json.dumps(identity, sort_keys=True)
    return default_cache() / "teachers" / hashlib.sha256(text.encode()).hexdigest()[:32]


def _note(path: Path, folder: Path, cache: TeacherCache, seconds: float) -> None:
    """Writes what the cache is and cost; a later start, which finds it there, leaves the note."""
    if path.exists():
        return
    size = sum(file.stat().st_size for file in folder.iterdir())
    facts = {"folder": str(folder), "rows": len(cache.rows), "bytes": size, "seconds": seconds}
    write_json(path, facts)
