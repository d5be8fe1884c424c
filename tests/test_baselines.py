"""The torch baseline: the same start and batches give our losses, and its run reads like ours."""

import dataclasses
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.baselines import cells as baseline_cells
from experiments.baselines.__main__ import OPTIMIZERS, Baseline, baseline_of
from experiments.baselines.cells import BaselineCell, read_baseline, run_baseline, run_baselines
from experiments.baselines.settings import (
    TorchBaseline,
    baseline_from_json,
    baseline_to_json,
    mission,
    tuned,
)
from experiments.compare import read_curve
from experiments.protocol import time_to
from experiments.recipes import DEMO
from experiments.runs.execute import Execution, execute
from experiments.runs.prepare import open_data
from model import huggingface
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer
from train.data import evaluation_batches
from train.loop import LoopSettings
from train.optimizers import Adam, AdamW, Muon
from train.records import read_rows
from train.schedules import Constant, Cosine, Linear
from train.settings import Phase, Settings

STEPS = 24
CONSTANT = Constant()
ADAM = Adam(learning_rate=3e-3)
ADAMW = AdamW(learning_rate=1e-2, weight_decay=0.3, b2=0.95)


@pytest.fixture
def text(tmp_path):
    """Enough words for a training and a held-out split."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(30)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(60)))
    return str(path)


def settings_of(text="stdlib", optimizer=ADAM, schedule=CONSTANT, steps=STEPS, **model):
    config = gpt2_tiny(**{"dropout": 0.0} | model)
    phase = Phase(steps, config, 4, 16)
    return Settings((phase,), (text,), "bytes", optimizer=optimizer, schedule=schedule)


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.hf
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(ADAM, Constant()), (ADAMW, Linear(4)), (replace(ADAMW, clip_norm=0.3), Cosine(2, 0.1))],
)
def test_the_same_start_and_batches_give_the_losses_of_our_own_step(
    tmp_path, text, optimizer, schedule
):
    settings = settings_of(text, optimizer, schedule)
    loop = LoopSettings(log_every=1, evaluate_every=10)
    execute(settings, tmp_path / "ours", Execution(loop, progress=False))
    theirs = TorchBaseline(settings, initial="ours")
    run_baseline(theirs, tmp_path / "torch", loop, progress=False)
    found, expected = losses(tmp_path / "torch"), losses(tmp_path / "ours")
    assert len(found) == STEPS
    assert expected[0] - expected[-1] > 0.5  # they have learned: the optimizers matter
    np.testing.assert_allclose(found, expected, atol=1e-4)
    ours, torch = read_curve(tmp_path / "ours"), read_curve(tmp_path / "torch")
    assert torch.steps == ours.steps == [10, 20, 24]
    np.testing.assert_allclose(torch.values, ours.values, atol=1e-4)
    bits = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("ours", "torch")]
    assert bits[0]["evaluation"].keys() == bits[1]["evaluation"].keys()
    np.testing.assert_allclose(*(b["evaluation"]["bits_per_byte"] for b in bits), atol=1e-4)


@pytest.mark.hf
def test_autocast_on_a_cpu_rounds_products_and_still_learns(tmp_path, text):
    settings, loop = settings_of(text, ADAMW, Linear(4)), LoopSettings(log_every=1)
    for precision in ("float32", "bfloat16"):
        baseline = TorchBaseline(settings, precision=precision, initial="ours")
        run_baseline(baseline, tmp_path / precision, loop, progress=False)
    exact, rounded = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert exact[0] != rounded[0]
    np.testing.assert_allclose(rounded, exact, atol=0.05)
    assert rounded[0] - rounded[-1] > 0.5


@pytest.mark.hf
def test_weights_that_hugging_face_draws_are_spread_as_ours_and_dropout_is_on(tmp_path, text):
    from experiments.baselines.learner import make_learner

    settings = settings_of(text, layers=4, width=64, dropout=0.1)
    config = replace(settings.phases[0].model, vocabulary_size=257)
    spread = []
    for initial in ("huggingface", "ours"):
        learner = make_learner(TorchBaseline(settings, initial=initial), config)
        weights = learner.model.state_dict()
        names = ("transformer.wte.weight", "transformer.h.2.mlp.c_proj.weight")
        spread.append([float(weights[name].std()) for name in names])
    np.testing.assert_allclose(spread[0], spread[1], rtol=0.05)
    batch = learner.place(
        {
            "tokens": np.ones((2, 8), np.int32),
            "targets": np.ones((2, 8), np.int32),
            "weights": np.ones((2, 8), np.float32),
        }
    )
    model = learner.model.train()
    one, two = (model(batch["tokens"]).logits for _ in range(2))
    assert float((one - two).detach().abs().max()) > 1e-3
    one, two = (learner.measure(learner.state, {}, batch) for _ in range(2))
    assert one == two


@pytest.mark.hf
def test_cells_run_once_stop_at_their_target_and_read_like_ours(tmp_path, text):
    loop = LoopSettings(evaluate_every=6, target_loss=5.0)
    baseline = TorchBaseline(settings_of(text, ADAMW, Linear()))
    cell = BaselineCell("tuned", baseline, loop)
    assert run_baselines([cell], tmp_path, progress=False, max_minutes=0) == []
    (result,) = run_baselines([cell], tmp_path, progress=False)
    assert result.reason == "target"
    assert result.step in (6, 12, 18)
    assert result.folder == tmp_path / cell.key
    time = time_to(result, 5.0)
    assert (time.name, time.reached, time.tokens) == ("tuned", True, result.step * 4 * 16)
    assert 0 < time.training < time.total
    assert set(result.seconds) == {"compile", "data", "step", "evaluation"}
    stamp = (result.folder / "result.json").stat().st_mtime_ns
    (again,) = run_baselines([cell], tmp_path, progress=False)
    assert (again.folder / "result.json").stat().st_mtime_ns == stamp
    assert again.evaluations == result.evaluations
    with pytest.raises(ValueError, match=r"holds a run of other settings.*\n  mode: compile"):
        run_baseline(replace(baseline, mode="compile"), result.folder, loop, progress=False)


@pytest.mark.hf
@pytest.mark.slow
def test_compiled_is_the_same_as_eager(tmp_path, text):
    baseline = TorchBaseline(settings_of(text, ADAMW, Linear(), steps=6))
    loop = LoopSettings(log_every=1)
    for mode in ("eager", "compile"):
        run_baseline(replace(baseline, mode=mode), tmp_path / mode, loop, progress=False)
    np.testing.assert_allclose(losses(tmp_path / "eager"), losses(tmp_path / "compile"), atol=1e-4)


@pytest.mark.hf
def test_kept_weights_are_those_that_were_evaluated(tmp_path, text):
    baseline = TorchBaseline(settings_of(text, ADAMW, Linear(), steps=6), keep="weights")
    outcome = run_baseline(baseline, tmp_path / "run", progress=False)
    config, params = huggingface.load(tmp_path / "run" / "model")
    tokenizer, corpora = open_data((text,), "bytes", tmp_path / "data")
    model = Transformer(config)
    logits_of = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    total = count = 0.0
    split = corpora[0][0].split("validation")
    for batch in evaluation_batches(split, sequence_length=16, batch_size=4):
        logp = jax.nn.log_softmax(logits_of(batch["tokens"]))
        picked = np.take_along_axis(np.asarray(logp), batch["targets"][..., None], -1)[..., 0]
        total -= (picked * batch["weights"]).sum()
        count += batch["weights"].sum()
    assert outcome.evaluation["tokens"] == count
    np.testing.assert_allclose(total / count, outcome.evaluation["loss"], atol=1e-5)


@pytest.mark.hf
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, text):
    baseline = TorchBaseline(settings_of(text, Adam(learning_rate=1e30)))
    outcome = run_baseline(baseline, tmp_path / "run", progress=False)
    assert outcome.reason == "nonfinite"
    stamp = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    again = run_baseline(baseline, tmp_path / "run", progress=False)  # has ended already
    assert (again.reason, int(again.state.step)) == ("nonfinite", int(outcome.state.step))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "run" / "result.json").read_text())["reason"] == "nonfinite"


def test_cells_are_named_by_all_that_they_are():
    settings = settings_of()
    baseline = TorchBaseline(settings)
    cells = [
        BaselineCell("a", baseline),
        BaselineCell("a", replace(baseline, mode="compile")),
        BaselineCell("a", replace(baseline, initial="ours")),
        BaselineCell("a", TorchBaseline(replace(settings, seed=1))),
        BaselineCell("a", baseline, LoopSettings(target_loss=2.0)),
    ]
    assert len({cell.key for cell in cells}) == len(cells)
    assert BaselineCell("another", baseline).key == cells[0].key
    same = json.loads(json.dumps(baseline_to_json(cells[1].baseline)))
    assert baseline_from_json(same) == cells[1].baseline


def test_a_cell_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    cell = BaselineCell("mission", mission(DEMO, 5))
    stopped = dataclasses.make_dataclass("Outcome", ["reason"])("signal")
    monkeypatch.setattr(baseline_cells, "run_baseline", lambda *args, **named: stopped)
    with pytest.raises(KeyboardInterrupt, match="mission was stopped; the same command begins it"):
        run_baselines([cell], tmp_path)
    assert read_baseline(cell, tmp_path) is None


def test_the_two_baselines_are_the_ones_of_the_claim():
    one = mission(DEMO, 10, seed=3).settings
    assert (one.optimizer, one.schedule, one.seed) == (Adam(learning_rate=1e-4), Constant(), 3)
    assert one.phases[0].model.dropout == 0.1
    two = tuned(DEMO, 10, optimizer=AdamW(learning_rate=4e-3), schedule=Cosine(2)).settings
    assert two.phases[0].model == replace(one.phases[0].model, dropout=0.0)
    assert (two.optimizer.learning_rate, two.schedule) == (4e-3, Cosine(2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": Muon()}, "knows Adam and AdamW, not Muon"),
        ({"optimizer": AdamW(cautious=True)}, "torch's AdamW has no cautious=True"),
        ({"optimizer": AdamW(decay_rules=((".*", True),))}, "torch's AdamW has no decay_rules"),
        ({"z_loss": 1e-4}, "does not know z_loss=0.0001; leave it out"),
        ({"phases": (Phase(1, gpt2_tiny(), 2, 8),) * 2}, "one phase, not 2"),
        ({"phases": (Phase(1, llama_tiny(), 2, 8),)}, "model is none: kv_heads is 2, positions is"),
    ],
)
def test_what_the_baseline_does_not_know_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        TorchBaseline(replace(settings_of(), **changes))


def test_cuda_beside_a_gpu_of_jax_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cpu"):
        run_baseline(TorchBaseline(settings_of(), device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_is_the_missions_baseline_by_default():
    command = Baseline(mission(DEMO, 1).settings.phases[0].model, OPTIMIZERS["adam"](), Constant())
    baseline, loop = baseline_of(replace(command, steps=7, learning_rate=3e-4, target_loss=2.0))
    assert baseline.settings.optimizer == Adam(learning_rate=3e-4)
    assert baseline_of(command)[0].settings.optimizer.learning_rate == 1e-4
    assert baseline.settings.phases[0].model.dropout == 0.1
    assert (baseline.settings.steps, loop.target_loss) == (7, 2.0)
