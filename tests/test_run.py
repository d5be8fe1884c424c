"""A run end to end: resume is bitwise, a run is what its settings say, and it opens again."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run, read_settings
from model.presets import gpt2_tiny, modern_tiny
from train.loop import LoopSettings
from train.optimizers import OPTIMIZERS
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings, differences, from_json, to_json

QUIET = Execution(LoopSettings(log_every=1, evaluate_every=10, checkpoint_every=10), progress=False)
MEASURED = (
    *("tokens_per_second", "step_seconds", "cpu_seconds", "seconds", "clock", "joules"),
    "utilization",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(0, 26, 4)) for _ in range(20)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[i] for i in draw.integers(0, 20, 1200)))
    return path


def settings_for(text, **changes):
    phase = Phase(20, gpt2_tiny(dropout=0.1), batch_size=4, sequence_length=16)
    defaults = {"data": (str(text),), "tokenizer": "bytes", "schedule": Linear(warmup_steps=2)}
    return Settings(**{"phases": (phase,), **defaults, **changes})


def rows_of(folder):
    rows = list(read_rows(folder / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def bits(tree):
    """Every leaf as raw bytes, typed keys included."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    data = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for _, x in leaves
    ]
    return {
        jax.tree_util.keystr(p): np.asarray(x).tobytes()
        for (p, _), x in zip(leaves, data, strict=True)
    }


@pytest.mark.parametrize(
    "name",
    [n if n in ("adam", "muon") else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)
def test_resume_is_bitwise(tmp_path, text, name):
    """20 steps equal 10, a stop, and 10 more: state, metrics, evaluations."""
    settings = settings_for(text, optimizer=OPTIMIZERS[name]())
    whole = execute(settings, tmp_path / "whole", QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "20")
    (tmp_path / "halves" / "result.json").unlink()
    halves = execute(settings, tmp_path / "halves", QUIET)
    assert bits(halves.state) == bits(whole.state)
    assert rows_of(tmp_path / "halves") == rows_of(tmp_path / "whole")
    assert [r["step"] for r in rows_of(tmp_path / "whole") if r["kind"] == "train"] == list(
        range(1, 21)
    )
    first = next(
        r for r in read_rows(tmp_path / "halves" / "metrics.jsonl") if r["kind"] == "evaluation"
    )
    assert sum(halves.seconds.values()) > first["seconds"]  # the time of both starts counts
    losses = [r["loss"] for r in rows_of(tmp_path / "whole") if r["kind"] == "evaluation"]
    assert losses[-1] < losses[0]


def test_a_finished_run_does_nothing_more(tmp_path, text):
    settings = settings_for(text)
    first = execute(settings, tmp_path / "run", QUIET)
    again = execute(settings, tmp_path / "run", QUIET)
    assert bits(first.state) == bits(again.state)
    assert len(rows_of(tmp_path / "run")) == 22


def test_other_settings_are_refused_by_name(tmp_path, text):
    execute(settings_for(text), tmp_path / "run", QUIET)
    with pytest.raises(ValueError, match=r"(?s)other settings.*seed: 7, not 0"):
        execute(settings_for(text, seed=7), tmp_path / "run", QUIET)


def test_a_folder_is_taken_only_when_the_data_is_there(tmp_path, text):
    with pytest.raises(ValueError, match=r"no source .*nowhere.txt"):
        execute(settings_for(tmp_path / "nowhere.txt"), tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path, text, capsys):
    settings = settings_for(text)
    whole = execute(settings, tmp_path / "run", QUIET)
    file = max((tmp_path / "run" / "checkpoints" / "20").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = execute(settings, tmp_path / "run", QUIET)
    assert "step 20 is damaged" in capsys.readouterr().out
    assert bits(again.state) == bits(whole.state)


def test_target_loss_ends_the_run(tmp_path, text):
    how = dataclasses.replace(QUIET, loop=LoopSettings(evaluate_every=5, target_loss=100.0))
    outcome = execute(settings_for(text), tmp_path / "run", how)
    assert (outcome.reason, int(outcome.state.step)) == ("target", 5)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["reason"] == "target"


def test_phases_change_the_batch_and_compile_once_each(tmp_path, text):
    model = modern_tiny()
    phases = (Phase(5, model, 4, 8), Phase(5, model, 2, 16))
    settings = settings_for(text, phases=phases, schedule=Linear())
    outcome = execute(settings, tmp_path / "run", QUIET)
    assert (outcome.reason, int(outcome.state.step)) == ("finished", 10)
    train_rows = [row for row in rows_of(tmp_path / "run") if row["kind"] == "train"]
    assert [row["tokens"] for row in train_rows] == [32] * 10


def test_an_open_run_holds_what_was_trained(tmp_path, text):
    outcome = execute(settings_for(text), tmp_path / "run", QUIET)
    run = open_run(tmp_path / "run")
    assert run.step == 20
    assert bits(run.params) == bits(outcome.state.params)
    assert run.tokenizer.decode(run.tokenizer.encode("abc")) == "abc"
    assert open_run(tmp_path / "run", 10).step == 10
    named = open_run(f"{tmp_path / 'run'}@10")
    assert (named.step, named.folder) == (10, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 15"):
        open_run(tmp_path / "run", 15)
    with pytest.raises(FileNotFoundError, match="is no run"):
        open_run(tmp_path)


def test_a_run_starts_from_another(tmp_path, text, capsys):
    parent = execute(settings_for(text), tmp_path / "parent", QUIET)
    changes = {"parent": f"{tmp_path / 'parent'}@20", "seed": 5}
    phase = dataclasses.replace(settings_for(text).phases[0], steps=1)
    tiny = OPTIMIZERS["adam"](learning_rate=1e-12)  # a step that moves nothing visibly
    child = execute(
        settings_for(text, phases=(phase,), optimizer=tiny, schedule=Linear(), **changes),
        tmp_path / "child",
        QUIET,
    )
    assert "parameters and tokenizer are kept" in capsys.readouterr().out
    ours, theirs = (jax.tree.leaves(run.state.params) for run in (child, parent))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    other = dataclasses.replace(phase, model=modern_tiny())
    with pytest.raises(ValueError, match="another model: activation: relu_squared, not gelu"):
        execute(
            settings_for(text, phases=(other,), schedule=Linear(), **changes),
            tmp_path / "other",
            QUIET,
        )


def test_settings_survive_json(tmp_path, text):
    for name, kind in OPTIMIZERS.items():
        settings = settings_for(text, optimizer=kind())
        assert from_json(json.loads(json.dumps(to_json(settings)))) == settings, name
    execute(settings_for(text), tmp_path / "run", QUIET)
    assert read_settings(tmp_path / "run") == settings_for(text)
    assert differences(to_json(settings_for(text)), to_json(settings_for(text))) == []


@pytest.mark.variants(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, text, number):
    """The command is stopped while it runs, started again, and ends like an undisturbed one."""

    def command(out):
        arguments = f"--data {text} --tokenizer bytes --model gpt2_tiny --steps 60 --batch-size 4"
        arguments += f" --sequence-length 16 --log-every 1 --optimizer adamw --out {out}"
        return [sys.executable, "-m", "experiments.pretrain", *arguments.split()]

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    subprocess.run(command(tmp_path / "calm"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "run"), env=environment, stdout=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and metrics.stat().st_size > 300:
            break
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate()[0].decode()
    stopped = json.loads((tmp_path / "run" / "result.json").read_text())
    if stopped["reason"] == "finished":
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 128 + number
    assert "saved step" in output
    subprocess.run(command(tmp_path / "run"), check=True, env=environment, capture_output=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "calm")


def test_bits_per_byte_are_left_out_where_first_tokens_are_not_predicted(text, tmp_path):
    """Masked, the bytes of a document's first token would count, and its bits would not."""
    for boundaries, there in (("ignore", True), ("mask", False)):
        settings = dataclasses.replace(settings_for(text), document_boundaries=boundaries)
        out = execute(settings, tmp_path / boundaries, QUIET)
        assert ("bits_per_byte" in out.evaluation) == there
        assert out.evaluation["loss"] > 0
