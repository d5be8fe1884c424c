"""Runs on meshes: the same numbers as on one device, and checkpoints that move between them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments.methods.table import Freeze
from experiments.runs.execute import Execution, execute
from experiments.runs.layout import idle, mesh_of
from experiments.runs.run import open_run
from model.presets import gpt2_tiny, modern_tiny
from train.loop import LoopSettings
from train.optimizers import AdamW, Muon
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings

QUIET = Execution(LoopSettings(log_every=1, checkpoint_every=2), progress=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


def settings_for(text, **changes):
    phase = Phase(4, modern_tiny(), batch_size=8, sequence_length=16)
    defaults = {
        "phases": (phase,),
        "data": (str(text),),
        "tokenizer": "bytes",
        "optimizer": Muon(),
        "schedule": Linear(),
        "vocabulary_multiple": 8,  # 257 divides by nothing
    }
    return Settings(**defaults | changes)


def losses(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [(row["kind"], row["step"], row["loss"]) for row in rows if "loss" in row]


def on(mesh, *strategies, **changes):
    return dataclasses.replace(QUIET, mesh=mesh, strategies=strategies, **changes)


def assert_close(one, two):
    assert [row[:2] for row in one] == [row[:2] for row in two]
    np.testing.assert_allclose([r[2] for r in one], [r[2] for r in two], rtol=1e-5)


def test_a_run_on_a_mesh_equals_one_on_a_device(tmp_path, text, capsys):
    settings = settings_for(text)
    execute(settings, tmp_path / "one", QUIET)
    outcome = execute(settings, tmp_path / "mesh", on("data=2,fsdp=2,tensor=2", progress=True))
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "mesh"))
    up = outcome.state.params["blocks"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (2, 16, 64)
    printed = capsys.readouterr().out
    for words in ("mesh: data=2, fsdp=2, tensor=2: 8 devices", "optimizer", "temporaries"):
        assert words in printed
    # An opened run has the true vocabulary, whatever the state was padded to.
    table = open_run(tmp_path / "mesh").params["token_embedding"]["embedding"]
    assert table.shape == (257, 32)
    assert outcome.state.params["token_embedding"]["embedding"].shape == (264, 32)


@pytest.mark.slow
def test_a_pipeline_trains_in_bfloat16(tmp_path, text):
    """XLA:CPU aborts on its sums where it may add them up in float32."""
    settings = settings_for(text)
    (phase,) = settings.phases
    model = dataclasses.replace(phase.model, dtype="bfloat16")
    settings = dataclasses.replace(settings, phases=(dataclasses.replace(phase, model=model),))
    execute(settings, tmp_path / "one", QUIET)
    execute(settings, tmp_path / "staged", on("data=2,pipeline=2"))
    found, want = (losses(tmp_path / name)[-1][-1] for name in ("staged", "one"))
    assert found == pytest.approx(want, rel=1e-2)  # bfloat16 has three digits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "strategies"),
    [("data=8", ()), ("fsdp=8", ()), ("data=4,tensor=2", ("zero1", "sequence"))],
)
def test_a_checkpoint_moves_to_another_mesh(tmp_path, text, mesh, strategies):
    """Two steps here and two there; the data goes on where it was."""
    settings = settings_for(text, methods=(Freeze(rules=("token_embedding",)),))
    execute(settings, tmp_path / "one", QUIET)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
    (tmp_path / "moved" / "result.json").unlink()
    execute(settings, tmp_path / "moved", on(mesh, *strategies))
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "moved"))
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "2")
    last = open_run(tmp_path / "moved")  # and back onto one device
    assert last.step == 4
    ours, theirs = (jax.tree.leaves(open_run(tmp_path / name).params) for name in ("one", "moved"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_devices_without_work_are_counted():
    assert idle(mesh_of("fsdp=4")).startswith("4 of 8 devices are idle: the mesh has 4")
    assert idle(mesh_of("")).startswith("7 of 8 devices are idle")
    assert not idle(mesh_of("data=2,fsdp=4"))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "count"), [("fsdp=4", 4), ("", 7)])
def test_a_run_says_which_devices_have_no_work(tmp_path, text, capsys, mesh, count):
    settings = settings_for(text, phases=(Phase(1, gpt2_tiny(), 8, 16),), optimizer=AdamW())
    execute(settings, tmp_path / "some", on(mesh, progress=True))
    assert f"{count} of 8 devices are idle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mesh", "changes", "words"),
    [
        ("data=3,tensor=4", {}, "data=3 * tensor=4 = 12 is not the number of devices, 8"),
        ("tensors=2", {}, "the axes are data, pipeline, fsdp, context, tensor"),
        ("data=8", {"batch": 4}, "a batch of 4 rows does not divide over data=8"),
        ("tensor=8", {}, "4 heads do not divide over tensor=8"),
        ("tensor=2", {"vocabulary_multiple": 1}, "a vocabulary of 257 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, text, mesh, changes, words):
    batch = changes.pop("batch", 8)
    phase = Phase(4, gpt2_tiny(), batch_size=batch, sequence_length=16)
    settings = settings_for(text, phases=(phase,), optimizer=AdamW(), **changes)
    with pytest.raises(ValueError, match=words.replace("*", r"\*")):
        execute(settings, tmp_path / "run", on(mesh))
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_mesh_is_no_part_of_a_runs_identity(tmp_path, text):
    execute(settings_for(text), tmp_path / "run", QUIET)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert "mesh" not in settings
    assert settings["vocabulary_multiple"] == 8
