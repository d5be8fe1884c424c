"""Tables of distillation, structure and training at tiny size: cells that fit, and what is read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.distillation.features import LAYER_MAPS
from compress.distillation.students import spread_layers
from compress.lowrank import LowRank
from experiments.ablate import base, compress_distil, compress_structured, compress_training, steps
from experiments.ablate.compress_students import KINDS, folder_of, student
from experiments.methods.lowrank import LowRankKernels
from experiments.recipes import Size
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from experiments.tables.table import Gathered, Request, Results, complete
from model.config import TransformerConfig
from model.flops import abstract_params, block_flops, head_flops
from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from train.loop import LoopSettings
from train.methods import Setup
from train.optimizers import AdamW
from train.settings import Phase, Settings


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """All tables on a text of a few lines, at two or three steps."""
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and one more.\n" * 400)
    size = Size((str(tmp_path / "text.txt"),), "bytes", 4, 16, 2, width=32, heads=2)
    monkeypatch.setattr(base, "SIZE", size)
    monkeypatch.setattr(base, "STEPS", 2)
    monkeypatch.setattr(base, "LOOP", LoopSettings(log_every=1))
    monkeypatch.setattr(compress_distil, "STEPS", 2)
    monkeypatch.setattr(compress_structured, "STEPS", 2)
    training = {"STEPS": 4, "MOST": 6, "EVERY": 2, "TEACHER_STEPS": 2, "SHRINK_AT": 2}
    training |= {"REPEATS": 2, "SIZE": size, "EARLIER": (2,)}
    training |= {"LOOP": LoopSettings(log_every=1, evaluate_every=2)}
    for name, value in training.items():
        monkeypatch.setattr(compress_training, name, value)
    monkeypatch.setitem(
        compress_training.PLAIN,
        "RigL, half of the weights",
        compress_training.Rewire(sparsity=0.5, every=2, until=4),
    )
    return Request(tmp_path / "cells", seeds=1)


def run(table, request, names=None):
    gathered = Gathered({})
    chosen = table.cells(request)
    if names is not None:
        chosen = [item for item in chosen if item.name in names]
    some = dataclasses.replace(table, cells=lambda request: chosen)
    complete([some], request, gathered)
    return gathered.results(table.name)


def keys(table, request):
    return {(item.name, item.key) for item in table.cells(request)}


TRAINED = (compress_distil.TABLES[0], compress_structured.TABLES[0], compress_training.TABLES[0])


def test_cells_are_told_apart_and_named_by_what_they_are(tiny, tmp_path):
    elsewhere = dataclasses.replace(tiny, cells=tmp_path / "other")
    three = dataclasses.replace(tiny, seeds=3)
    for table in TRAINED:
        found = keys(table, three)
        assert len({key for _, key in found}) == len(found) == len(table.cells(three))
        assert keys(table, elsewhere) == keys(table, tiny) < found


@pytest.mark.slow
def test_a_student_is_half_of_its_teacher(tiny):
    teacher = dataclasses.replace(base.base_cell(0), name="teacher")
    made = {kind: student(tiny.cells, teacher, kind) for kind in KINDS}
    gathered = Gathered({})
    table = dataclasses.replace(TRAINED[0], cells=lambda request: list(made.values()))
    complete([table], tiny, gathered)
    whole = open_run(tiny.cells / teacher.key)
    shapes = {
        kind: (run.model.config.layers, run.model.config.ffn_width_)
        for kind, item in made.items()
        if (run := open_run(folder_of(tiny.cells, item)))
    }
    assert list(shapes.values()) == [(1, 128), (1, 64), (2, 64)]
    spread = open_run(folder_of(tiny.cells, made["half of the layers, spread"]))
    ours, theirs = (r.params["blocks"]["mlp"]["up"]["kernel"] for r in (spread, whole))
    np.testing.assert_array_equal(ours[0], theirs[0])
    for values in gathered.results("distil").by_name.values():
        assert values[0]["parameters"] < values[0]["parameters before"]
        assert values[0]["loss before"] > 0
        assert 0 <= values[0]["top-1 agreement"] <= 1


@pytest.mark.slow
def test_distillation_runs_from_its_teacher_and_its_layers(tiny):
    table = compress_distil.TABLES[0]
    chosen = ["all parts", "without the teacher's layers", "no teacher, its layers"]
    results = run(table, tiny, chosen)
    assert list(results.by_name) == chosen
    text = "\n".join(table.render(results))
    assert "-3.69" in text
    assert "its cosine of hidden states is that of the last ones, ours the mean" in text
    assert "one seed" in text


@pytest.mark.slow
def test_structured_pruning_recovers_and_is_timed(tiny, monkeypatch):
    monkeypatch.setattr(compress_structured, "LENGTH", 16)
    monkeypatch.setattr(compress_structured, "DECODED", 2)
    monkeypatch.setattr(compress_structured, "REPEATS", 2)
    config = gpt2_tiny(dropout=0.0)
    monkeypatch.setattr(compress_structured, "shapes", lambda: {"speed, tiny": config})
    table = compress_structured.TABLES[0]
    text = "\n".join(table.render(run(table, tiny)))
    assert "then distilled" in text
    assert "whole model, decoding 8" in text


@pytest.mark.slow
def test_training_reads_its_costs_and_curves(tiny):
    table = compress_training.TABLES[0]
    results = run(table, tiny)
    text = "\n".join(table.render(results))
    assert "| dense | 1.00x (1.00 to 1.00) | 4 |" in text
    for name in compress_training.ROWS:
        assert f"| {name} |" in text
    assert [
        row["step"] for row in compress_training.curve(results, "progressive shrinking", 0)
    ] == [
        2,
        4,
        6,
    ]
    assert table.picture(results) is not None


def test_what_is_said_of_the_distilled_layers_is_so():
    teacher = base.SIZE.layers
    kept = spread_layers(teacher, teacher // 2)
    assert f"{kept[0]} and {kept[1]} of four" in compress_distil.__doc__
    assert teacher == 4
    pairs = LAYER_MAPS[compress_distil.WHOLE.layers](teacher // 2, teacher)
    assert pairs == ((1, 2), (2, 4))  # the first against the second, the last against the last


def loss_rows(*pairs):
    return [{"step": step, "loss": loss} for step, loss in pairs]


def test_a_target_is_read_off_the_line():
    rows = loss_rows((10, 4.0), (20, 3.0), (30, 3.5), (40, 1.5))
    assert compress_training.crossing(rows, 3.25) == pytest.approx(17.5)
    assert compress_training.crossing(rows, 2.0) == pytest.approx(37.5)
    assert compress_training.crossing(rows, 4.5) == 10
    assert compress_training.crossing(rows, 1.0) is None
    assert compress_training.crossing(loss_rows((10, math.nan)), 1.0) is None


def test_seconds_count_what_is_shrunk_and_what_comes_before(monkeypatch):
    costs = {
        "steps": {
            name: {"seconds": seconds}
            for name, seconds in {
                "dense": 1.0,
                "progressive shrinking": 0.5,
                "smaller teacher": 0.25,
                "taught by it, online": 1.5,
                "taught by it, cached": 1.25,
            }.items()
        },
        "look-up": 0.25,
        "cache": 0.125,
        "shrink": 3.0,
    }
    monkeypatch.setattr(compress_training, "SHRINK_AT", 8)
    monkeypatch.setattr(compress_training, "TEACHER_STEPS", 16)
    monkeypatch.setattr(compress_training, "MOST", 32)
    to, besides = compress_training.seconds_to, compress_training.besides
    assert to(4, "progressive shrinking", costs) == 4
    assert to(12, "progressive shrinking", costs) == 8 + 2
    assert to(10, "taught by it, cached", costs) == 15
    assert besides("dense", costs) == 0
    assert besides("taught by it, online", costs) == 4
    assert besides("taught by it, cached", costs) == 4 + 4
    assert besides("progressive shrinking", costs) == 3
    assert besides("progressive shrinking", costs, 8.0) == 0  # it has not shrunk yet
    assert besides("progressive shrinking", costs, 8.5) == 3


def test_the_training_table_pairs_seeds_and_says_what_was_not_reached(monkeypatch):
    monkeypatch.setattr(compress_training, "EARLIER", (120,))
    curves = {
        "dense": {0: loss_rows((120, 4.0), (240, 3.0)), 1: loss_rows((120, 4.0), (240, 3.0))},
        "int8 products, forward and input gradient": {
            0: loss_rows((120, 3.0), (240, 2.0)),
            1: loss_rows((120, 5.0), (360, 3.5)),
        },
        "taught by it, online": {0: loss_rows((120, 3.0), (240, 2.0))},
    }
    step = {"seconds": 1.0, "ratio": 1.0, "quartiles": [1.0, 1.0]}
    slower = {"seconds": 2.0, "ratio": 2.0, "quartiles": [2.0, 2.0]}
    by_row = dict.fromkeys(curves, slower) | {"dense": step, "smaller teacher": step}
    costs = {"steps": by_row, "look-up": 0, "cache": 0, "shrink": 0}
    by_name = {
        name: {seed: {"evaluations": rows} for seed, rows in seeds.items()}
        for name, seeds in curves.items()
    }
    results = Results({**by_name, "costs of a step": {0: costs}})
    lines = compress_training.render(results)
    (dense,) = (line for line in lines if line.startswith("| dense | 1.00x (1"))
    assert "| 240 | 240.0 | 1.00x ± 0.00 |" in dense
    row = "| {} | 2.00x (2.00 to 2.00) |"
    (int8,) = (line for line in lines if line.startswith(row.format(list(curves)[1])))
    assert "| 120 | 240.0 | 1.00x (1 of 2 seeds) |" in int8
    (taught,) = (line for line in lines if line.startswith(row.format(list(curves)[2])))
    assert "| 120 | 240.0 | 1.00x | 120.0 | 0.67x |" in taught  # 240 of (240 + the teacher's 120)


def test_half_of_a_model_by_flops():
    whole = gpt2_tiny(layers=4)
    half = compress_structured.halved(whole)
    assert (half.layers, half.ffn_width, half.width) == (2, 64, 32)
    blocks = compress_structured._flops(whole, 16)
    assert blocks[0] == 16 * block_flops(whole, 16)
    decoded = compress_structured._flops(whole, 16, heads=2, decoded=2)
    per_token = 2 * 4 * 12 * 32**2 + 4 * 4 * 32 * 15.5  # keys of the last two of 16 tokens
    assert decoded[0] == pytest.approx(2 * (per_token + head_flops(whole)))
    assert decoded[0] / decoded[1] < blocks[0] / blocks[1] < 3


def test_random_steps_change_the_state(tiny):
    config = modern_tiny(layers=1)
    settings = Settings(phases=(Phase(4, config, 2, 8),), tokenizer="bytes", optimizer=AdamW())
    found = steps.step_times({"a": (settings, config)}, 2, "a")
    assert found["a"]["ratio"] == 1
    assert found["a"]["seconds"] > 0
    call = steps.stepper(settings, config)
    losses = [float(call()["loss"]) for _ in range(3)]
    assert losses[2] < losses[0]


def low_rank(config, **fields):
    plugs = LowRankKernels(**fields).build(Setup(config, abstract_params(config), 4))
    return plugs.split


@pytest.mark.variants(1)
@pytest.mark.parametrize("preset", [modern_tiny, gpt2_tiny])
def test_low_rank_kernels_are_factors_that_can_train(preset):
    config: TransformerConfig = preset(layers=1)
    model = Transformer(config)
    tokens = jnp.arange(8)[None] % 64
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    split = low_rank(config, share=0.5)
    low, fixed = jax.jit(split)(params)
    assert fixed == {}
    up = low["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(up, LowRank)
    assert up.rank == int(0.5 * 32 * 128 / (32 + 128))
    left, values, right = jnp.linalg.svd(params["blocks"]["mlp"]["up"]["kernel"])
    best = (left[..., : up.rank] * values[:, None, : up.rank]) @ right[:, : up.rank]
    np.testing.assert_allclose(up.full(), best, atol=1e-5)
    grads = jax.grad(lambda p: model.apply({"params": p}, tokens).var())(low)
    for name in ("o", "down"):  # zero at the start of the modern block
        part = "attention" if name == "o" else "mlp"
        kernel = grads["blocks"][part][name]["kernel"]
        assert jnp.abs(kernel.b).max() > 0
    if config.zero_init_projections:
        np.testing.assert_array_equal(low["blocks"]["mlp"]["down"]["kernel"].full(), 0)


def test_low_rank_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"share is 1.5; it must be above 0 and at most 1"):
        LowRankKernels(share=1.5)
    with pytest.raises(ValueError, match="has ranks from 1 to 32"):
        low_rank(gpt2_tiny(), rules=(("mlp/up/kernel", 33),))


@pytest.mark.slow
def test_a_low_rank_run_resumes_and_opens(tiny, tmp_path):
    settings = dataclasses.replace(base.base_cell(0).settings, methods=(LowRankKernels(share=0.5),))
    quiet = Execution(LoopSettings(log_every=1, checkpoint_every=1), progress=False)
    execute(settings, tmp_path / "run", quiet)
    run = open_run(tmp_path / "run")
    assert isinstance(run.params["blocks"]["mlp"]["up"]["kernel"], LowRank)
