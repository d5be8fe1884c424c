"""Distillation from a cache as a method: the online loss, a cache for many runs, what fails."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.methods.distill import Distil
from experiments.methods.distill_cached import COST, DistilCached
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from model.presets import gpt2_tiny
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.schedules import Linear
from train.settings import Phase, Settings

QUIET = Execution(LoopSettings(log_every=1, checkpoint_every=2), progress=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(folder / "cache"))
        letters = np.random.default_rng(0).integers(97, 123, 3000)
        (folder / "text.txt").write_bytes(letters.astype(np.uint8).tobytes())
        execute(settings_of(folder, seed=9), folder / "teacher", QUIET)
        yield folder


def settings_of(home, *methods, steps=3, seed=0, boundaries="ignore"):
    config = gpt2_tiny(scan_layers=True, dropout=0.0)
    return Settings(
        phases=(Phase(steps, config, batch_size=4, sequence_length=16),),
        data=(str(home / "text.txt"),),
        tokenizer="bytes",
        optimizer=AdamW(learning_rate=1e-2),
        schedule=Linear(),
        methods=methods,
        seed=seed,
        document_boundaries=boundaries,
    )


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_with_nearly_all_tokens_kept_it_is_the_online_teacher(home, tmp_path):
    teacher = str(home / "teacher")
    size = open_run(home / "teacher").model.config.vocabulary_size
    weights = {"teacher": teacher, "hard": (0.25,), "soft": (0.75,), "temperature": 2.0}
    cached = DistilCached(**weights, k=size - 1)
    online = Distil(**{**weights, "temperature": (2.0,)})
    for name, method in (("online", online), ("cached", cached)):
        execute(settings_of(home, method, boundaries="mask"), tmp_path / name, QUIET)
    # Kept numbers are float16.
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "online"), rtol=1e-3)
    assert losses(tmp_path / "cached")[0] != losses(home / "teacher")[0]
    note = json.loads((tmp_path / "cached" / COST).read_text())
    assert note["rows"] == 12
    assert note["seconds"] > 0
    assert note["bytes"] > 12 * 16 * (size - 1) * 4


@pytest.mark.slow
def test_a_cache_of_the_split_serves_other_seeds(home, tmp_path):
    method = DistilCached(str(home / "teacher"), cover="split", k=4, folder=str(tmp_path / "c"))
    execute(settings_of(home, method), tmp_path / "a", QUIET)
    execute(settings_of(home, method, seed=5, steps=4), tmp_path / "b", QUIET)
    first, second = (json.loads((tmp_path / name / COST).read_text()) for name in "ab")
    assert (first["rows"], second["seconds"]) == (second["rows"], 0.0)
    assert first["seconds"] > 0


def test_what_does_not_fit_is_refused(home, tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        execute(settings_of(home, DistilCached()), tmp_path / "a", QUIET)
    for fields, words in (
        ({"soft": (0.0,)}, "soft is 0"),
        ({"cover": "all"}, "'run' or 'split'"),
        ({"k": 0}, "at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"kind": "all"}, "top_k, sampled"),
    ):
        with pytest.raises(ValueError, match=words):
            DistilCached(**fields)
    method = DistilCached(str(home / "teacher"), k=10_000)
    with pytest.raises(ValueError, match="below the vocabulary"):
        execute(settings_of(home, method), tmp_path / "b", QUIET)
    settings = settings_of(home, DistilCached(str(home / "teacher"), k=4))
    longer = dataclasses.replace(settings.phases[0], sequence_length=32)
    with pytest.raises(ValueError, match="rows of one length"):
        execute(
            dataclasses.replace(settings, phases=(settings.phases[0], longer)),
            tmp_path / "c",
            QUIET,
        )


@pytest.mark.slow
def test_another_teacher_in_its_place_is_noticed(home, tmp_path):
    execute(settings_of(home, seed=1), tmp_path / "teacher", QUIET)
    method = DistilCached(str(tmp_path / "teacher"), k=4).resolve(None, open_run)
    other = dataclasses.replace(method, teacher=str(home / "teacher"))
    with pytest.raises(ValueError, match="another teacher now"):
        execute(settings_of(home, other), tmp_path / "run", QUIET)
