"""Which split a run is evaluated on while it trains."""

import dataclasses

import numpy as np
import pytest

from experiments.ladder.climb import job_of
from experiments.ladder.command import Ladder, scale_of
from experiments.ladder.scales import CPU
from experiments.runs.execute import Execution, execute
from experiments.runs.prepare import open_data
from model.presets import gpt2_tiny
from train.corpus import Split
from train.data import evaluation_batches
from train.loop import LoopSettings
from train.schedules import Linear
from train.settings import Phase, Settings

QUIET = Execution(LoopSettings(log_every=1, evaluate_every=2), progress=False)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of sixty documents, enough for three splits, of more and more of one letter."""
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for number in range(60):
        letters = draw.integers(0, 3 + number // 3, 80)
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(chr(97 + c) for c in letters))
    return str(tmp_path / "texts")


def test_evaluations_are_of_the_split_that_is_asked_for(tmp_path, texts):
    phase = Phase(2, gpt2_tiny(), batch_size=4, sequence_length=16)
    settings = Settings(phases=(phase,), data=(texts,), tokenizer="bytes", schedule=Linear())
    counts = {}
    for split in ("validation", "test"):
        chosen = dataclasses.replace(settings, held_out=split)
        outcome = execute(chosen, tmp_path / split, QUIET)
        ((corpus, _),) = open_data((texts,), "bytes", tmp_path / split)[1]
        held_out: Split = corpus.split(split)
        batches = evaluation_batches(held_out, sequence_length=16, batch_size=4)
        counts[split] = sum(float(batch["weights"].sum()) for batch in batches)
        assert outcome.evaluation["tokens"] == counts[split]
    assert counts["test"] != counts["validation"]


def test_a_split_that_is_not_there_is_refused_before_anything_trains(tmp_path, texts):
    (tmp_path / "one.txt").write_text("a b c " * 200)
    phase = Phase(2, gpt2_tiny(), batch_size=4, sequence_length=16)
    settings = Settings(
        phases=(phase,), data=(str(tmp_path / "one.txt"),), tokenizer="bytes", held_out="test"
    )
    with pytest.raises(ValueError, match="no test split"):
        execute(settings, tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_ladder_opens_the_test_split_where_it_is_told_to_alone(tmp_path):
    (tmp_path / "one.txt").write_text("a b c " * 200)
    for split, fields in (("validation", {}), ("test", {"held_out": "test"})):
        for name in ("torch-tuned", "muon"):
            scale = scale_of(Ladder(scale="cpu", cells=tmp_path, **fields))
            job = job_of(scale, name, CPU.tokens, 0)
            settings = job.baseline.settings if name == "torch-tuned" else job.settings
            assert settings.held_out == split
    test = Ladder(scale="cpu", cells=tmp_path, held_out="test")
    with pytest.raises(ValueError, match=r"is split in two, .* and has no test split"):
        scale_of(dataclasses.replace(test, data=(str(tmp_path / "one.txt"),)))
    (tmp_path / "many.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    many = dataclasses.replace(test, data=(str(tmp_path / "many.jsonl"),))
    assert scale_of(many).held_out == "test"
