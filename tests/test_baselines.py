"""The torch baseline: the same start and batches give our losses, and its run reads like ours."""

import dataclasses
import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.baselines import cells as baseline_cells
from experiments.baselines import tune
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
from experiments.execute import Execution, execute
from experiments.prepare import open_data
from experiments.protocol import time_to
from experiments.recipes import DEMO
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
    np.testing.assert_allclose(torch.losses, ours.losses, atol=1e-4)
    bits = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("ours", "torch")]
    assert bits[0]["evaluation"].keys() == bits[1]["evaluation"].keys()
    np.testing.assert_allclose(*(b["evaluation"]["bits_per_byte"] for b in bits), atol=1e-4)


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


def test_bfloat16_on_a_cpu_and_cuda_beside_a_gpu_of_jax_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="bfloat16 is for cuda"):
        TorchBaseline(settings_of(), precision="bfloat16")
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


FOUND = (3.0, 2.5, 2.6, math.nan, 9.0, 3.1, 2.7, 2.6, 2.9, math.inf)
TRIALS = tune.first_round((1e-3, 2e-3, 3e-3, 4e-3, 5e-3), ("linear", "cosine"))
LOSSES = dict(zip(TRIALS, FOUND, strict=True))


def test_the_sweep_tries_every_rate_with_every_schedule_at_one_budget():
    assert len(LOSSES) == 10
    cells = [tune.cell_of(trial, DEMO, 40) for trial in LOSSES]
    assert len({cell.key for cell in cells}) == 10
    assert {cell.baseline.settings.steps for cell in cells} == {40}
    assert {cell.baseline.settings.schedule for cell in cells} == {Linear(2), Cosine(2, 0.1)}
    with pytest.raises(ValueError, match="4 rates and 2 schedules do not tune a baseline"):
        tune.first_round((1.0, 2.0, 3.0, 4.0), ("linear", "cosine"))
    with pytest.raises(ValueError, match="no schedule 'step'; there are linear, cosine, constant"):
        tune.schedule_of("step", 10)


def test_the_second_round_starts_from_the_best_trial_and_edges_are_said():
    best = tune.best_of(LOSSES)
    assert best == tune.Trial(2e-3, "linear")
    second = tune.second_round(best, (0.95, 0.98), (0.0, 0.1))
    assert {(t.learning_rate, t.schedule) for t in second} == {(2e-3, "linear")}
    assert best in second  # which has run already
    losses = dict(zip(second, (2.4, 2.45, 2.6, 2.5), strict=True))
    text = tune.report(tune.Tune(steps=40), (LOSSES, losses))
    assert "| 0.001 | 3.0000 | 3.1000 |" in text
    assert "| 0.002 | **2.5000** | 2.7000 |" in text
    assert "Chosen: **linear 0.002, b2 0.95, decay 0**, 2.4000." in text
    assert text.count("Widen the grid") == 1
    assert "Widen the grid: b2 0.95 is the lowest that was tried." in text
    with pytest.raises(ValueError, match="every trial diverged"):
        tune.best_of({best: math.nan})


@pytest.mark.hf
def test_the_sweep_runs_and_writes(tmp_path, text, monkeypatch, capsys):
    words = f"--steps 4 --rates 1e-3 2e-3 3e-3 4e-3 5e-3 --moments 0.98 --decays 0.1 --data {text}"
    words += f" --layers 1 --width 16 --heads 2 --batch-size 2 --sequence-length 8 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["tune", *words.split(), "--tokenizer", "bytes"])
    tune.main()
    content = json.loads((tmp_path / "tune.json").read_text())
    assert len(content["trials"]) == 10
    assert content["best"]["learning_rate"] in content["command"]["rates"]
    assert (tmp_path / "tune.md").read_text().strip() in capsys.readouterr().out
