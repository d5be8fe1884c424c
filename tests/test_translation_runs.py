"""Runs that translate: trained, resumed, opened, laid out on meshes, adapted, quantized."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.quantize import quantize_params
from experiments import chat
from experiments.methods.lora import Lora
from experiments.runs.execute import execute
from experiments.runs.execution import Execution
from experiments.runs.run import check_continues, open_run
from experiments.task_report import report_task
from model.build import build_model
from model.generate import Sampling
from model.presets import encoder_decoder_tiny, modern_tiny
from model.transformer import features
from train.loop import LoopSettings
from train.optimizers import Muon
from train.settings import Phase, Settings
from train.tasks.task import TaskFiles
from train.tasks.translation import Translation

PAIRS = [("ab", "BA"), ("cd", "DC"), ("ea", "AE"), ("fg", "GF"), ("ij", "JI"), ("kl", "LK")] * 4
LOOP = LoopSettings(1, 2, 2, watch="-bleu")


@pytest.fixture
def task(tmp_path):
    for name, side in zip(("a.en", "a.de.gz"), zip(*PAIRS, strict=True), strict=True):
        content = "".join(f"{text}\n" for text in side).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    text = f"{tmp_path}/a.en,{tmp_path}/a.de.gz"
    return Translation(TaskFiles((("train", text), ("valid", text)))).resolve()


def settings(task, **changes):
    make = encoder_decoder_tiny if task.form == "encoder_decoder" else modern_tiny
    return Settings(
        **{
            "phases": (Phase(4, make(dropout=0.1), 8, 8),),
            "data": (),
            "tokenizer": "bytes",
            "optimizer": Muon(),
            "label_smoothing": 0.1,
            "task": task,
        }
        | changes
    )


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def run(settings, folder, mesh="", **loop):
    how = Execution(dataclasses.replace(LOOP, **loop), mesh=mesh, progress=False)
    return execute(settings, folder, how)


def test_a_run_is_trained_measured_opened_and_talked_to(task, tmp_path):
    out = run(settings(task), tmp_path / "run")
    assert out.reason == "finished"
    figures = report_task(tmp_path / "run")
    assert {"loss", "bleu", "chrf"} <= set(figures["valid"])
    assert "tok:13a" in figures["notes"]["bleu"]
    lines = (tmp_path / "run" / "predictions-valid.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["source"], row["reference"]) for row in rows] == PAIRS
    opened = open_run(tmp_path / "run", figures["step"])
    assert chat.mode_of(opened, None) == "translation"
    with pytest.raises(ValueError, match="has an encoder and continues no text"):
        check_continues(opened)
    talk = chat.open_talk(opened, Sampling(temperature=0), 20)
    found = ["".join(answer) for answer in chat.answers(talk, "translation", ["ab", "ij"])]
    told = {row["source"]: row["translation"] for row in rows}
    assert [" ".join(text.split()) for text in found] == [told["ab"], told["ij"]]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["encoder_decoder", "prefix_lm"])
def test_meshes_train_it_alike(form, task, tmp_path):
    task = dataclasses.replace(task, form=form)
    make = encoder_decoder_tiny if form == "encoder_decoder" else modern_tiny
    sizes = {"vocabulary_multiple": 8, "phases": (Phase(3, make(dropout=0.0), 8, 8),)}
    expected = None
    for mesh in ("", "data=2", "fsdp=2", "data=2,fsdp=2,tensor=2"):
        run(settings(task, **sizes), tmp_path / f"run{mesh}", mesh)
        found = losses(tmp_path / f"run{mesh}")
        expected = found if expected is None else expected
        np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.slow
def test_low_rank_factors_train_beside_both_stacks(task, tmp_path):
    whole = settings(task, phases=(Phase(2, encoder_decoder_tiny(dropout=0.0), 8, 8),))
    run(whole, tmp_path / "base")
    parent = str(tmp_path / "base")
    tuned = dataclasses.replace(whole, methods=(Lora(rank=2),), parent=parent)
    out = run(tuned, tmp_path / "tuned")
    paths = jax.tree_util.tree_leaves_with_path(out.state.params)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}
    assert "decoder/blocks/cross_attention/q/lora/kernel/a" in names
    assert "encoder/blocks/mlp/up/lora/kernel/b" in names
    assert all("/lora/" in name for name in names)
    assert open_run(tmp_path / "tuned").step == 2


@pytest.mark.slow
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(task, tmp_path):
    whole = settings(task)
    run(whole, tmp_path / "whole")
    run(whole, tmp_path / "again", target_loss=1e9)  # stops at the first evaluation
    run(whole, tmp_path / "again")
    one, two = (open_run(tmp_path / name).params for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_rules_quantize_both_stacks():
    model = build_model(encoder_decoder_tiny(dropout=0.0, zero_init_projections=False))
    tokens = jnp.arange(6)[None] % 5
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    packed = quantize_params(params, (("blocks/.*/kernel", "q8_0"),))
    kernel = packed["decoder"]["blocks"]["cross_attention"]["k"]["kernel"]
    assert not isinstance(kernel, jax.Array)
    assert not isinstance(packed["encoder"]["blocks"]["mlp"]["up"]["kernel"], jax.Array)
    exact, rounded = (
        np.asarray(features(model, p, tokens, source=tokens).final) for p in (params, packed)
    )
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
