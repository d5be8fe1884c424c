"""Fine-tuning end to end: a run like any other, its heads, its best checkpoint, its report."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.finetune import Finetune, settings_of
from experiments.methods.lora import Lora
from experiments.methods.table import Freeze
from experiments.runs.execute import Execution, execute
from experiments.runs.run import best_step, open_run
from experiments.starts import start_run
from experiments.task_report import report_task
from model.llama2c import load
from model.presets import gpt2_tiny, modern_mini
from tests import test_llama2c
from tests.test_run import bits, own_cache, rows_of  # noqa: F401 (fixture)
from train.loop import LoopSettings, out_of_patience
from train.optimizers import AdamW
from train.schedules import Constant, Linear
from train.settings import Phase, Settings
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.task import TaskFiles
from train.tokenizers.tokenizer import train_sentencepiece

pytest.importorskip("sklearn")
T = 12
LOOP = LoopSettings(log_every=1, evaluate_every=4, checkpoint_every=4, watch="-accuracy")
QUIET = Execution(LOOP, progress=False)


@pytest.fixture
def files(tmp_path):
    draw = np.random.default_rng(0)
    paths = []
    for split, count in (("train", 21), ("valid", 11), ("test", 7)):
        path = tmp_path / f"{split}.tsv"
        lines = ["text\tlabel"]
        for _ in range(count):
            label = int(draw.integers(2))
            word = "".join(draw.choice(list("abcd" if label else "wxyz"), 6))
            lines.append(f"{word}\t{'good' if label else 'bad'}")
        path.write_text("\n".join(lines) + "\n")
        paths.append((split, str(path)))
    return TaskFiles(tuple(paths))


def settings_for(files, task=Classification, **changes):
    defaults = {
        "phases": (Phase(8, gpt2_tiny(dropout=0.1), batch_size=4, sequence_length=T),),
        "data": (),
        "tokenizer": "bytes",
        "optimizer": AdamW(learning_rate=3e-3),
        "schedule": Linear(),
        "task": task(files, dropout=0.1),
    }
    return Settings(**defaults | changes)


@pytest.fixture
def parent(tmp_path):
    """A language model of 2 steps, with a text of its own."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    settings = Settings(
        phases=(Phase(2, gpt2_tiny(), batch_size=2, sequence_length=T),),
        data=(str(text),),
        tokenizer="bytes",
        schedule=Constant(),
    )
    execute(settings, tmp_path / "parent", Execution(progress=False))
    return tmp_path / "parent"


def test_a_library_that_is_missing_is_named_before_anything_trains(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"need scikit-learn: pip install -e '.\[tasks\]'"):
        execute(settings_for(files), tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_resume_is_bitwise(files, tmp_path):
    """8 steps equal 4, a stop, and 4 more: state, metrics, evaluations."""
    settings = settings_for(files)
    whole = execute(settings, tmp_path / "whole", QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "8")
    (tmp_path / "halves" / "result.json").unlink()
    halves = execute(settings, tmp_path / "halves", QUIET)
    assert bits(whole.state) == bits(halves.state)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "halves")
    assert {"loss", "accuracy", "f1", "matthews"} <= set(whole.evaluation)
    facts = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert [(f["split"], f["examples"]) for f in facts] == [
        ("train", 21),
        ("valid", 11),
        ("test", 7),
    ]


def test_a_mesh_of_two_gives_the_same_numbers(files, tmp_path):
    settings = settings_for(files, phases=(Phase(4, gpt2_tiny(dropout=0.0), 4, T),))
    one = execute(settings, tmp_path / "one", QUIET)
    two = execute(settings, tmp_path / "two", dataclasses.replace(QUIET, mesh="data=2"))
    for a, b in zip(*(rows_of(tmp_path / name) for name in ("one", "two")), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    for name in one.evaluation:
        np.testing.assert_allclose(one.evaluation[name], two.evaluation[name], rtol=1e-4)


def test_what_trains_beside_a_frozen_model_is_the_head(files, parent, tmp_path):
    settings = settings_for(
        files, methods=(Freeze(rules=(".*",)),), parent=str(parent), optimizer=AdamW()
    )
    outcome = execute(settings, tmp_path / "run", QUIET)
    assert jax.tree.map(jnp.shape, outcome.state.params) == {"score": {"kernel": (32, 2)}}
    moments = [a.shape for a in jax.tree.leaves(outcome.state.optimizer) if a.ndim]
    assert set(moments) == {(32, 2)}
    opened, before = open_run(tmp_path / "run"), open_run(parent)
    head = opened.params.pop("score")
    assert bits(opened.params) == bits(before.params)
    text = str(parent.parent / "text.txt")
    figures = report_task(tmp_path / "run", text)
    assert figures["trained_parameters"] == 64
    assert figures["gradient_bytes"] == 256
    assert figures["forgetting"]["before"] == figures["forgetting"]["after"]
    assert np.abs(np.asarray(head["kernel"])).max() > 0


def test_adapters_train_with_the_head_and_open_again(files, parent, tmp_path, capsys):
    """And a classifier starts another: with its head for the same labels, without it for others."""
    settings = settings_for(files, methods=(Lora(rank=1),), parent=str(parent))
    outcome = execute(settings, tmp_path / "run", QUIET)
    trained = set(outcome.state.params)
    assert trained == {"blocks", "score"}
    text = str(parent.parent / "text.txt")
    figures = report_task(tmp_path / "run", text)
    assert figures["forgetting"]["before"] != figures["forgetting"]["after"]
    rows = [json.loads(line) for line in (tmp_path / "run/predictions-test.jsonl").open()]
    assert len(rows) == 7
    right = np.mean([row["prediction"] == row["label"] for row in rows])
    assert right == pytest.approx(figures["test"]["accuracy"])

    one = Phase(1, gpt2_tiny(dropout=0.1), batch_size=4, sequence_length=T)
    still = AdamW(learning_rate=1e-30, weight_decay=0.0)
    again = settings_for(files, phases=(one,), parent=str(tmp_path / "run"), optimizer=still)
    step = execute(again, tmp_path / "again", QUIET).state
    kept = open_run(tmp_path / "run").params["score"]["kernel"]
    np.testing.assert_allclose(step.params["score"]["kernel"], kept, atol=1e-12)
    words = tuple((split, path) for split, path in files.paths)
    other = Classification(TaskFiles(words), labels=("bad", "good", "neither"))
    fresh = execute(dataclasses.replace(again, task=other), tmp_path / "fresh", QUIET).state
    assert fresh.params["score"]["kernel"].shape == (32, 3)

    said = capsys.readouterr().out
    assert "its head (score) is left out: labels ('bad', 'good') there" in said
    assert "--task.rename" in said

    grams = dataclasses.replace(again.task, pool="mean", grams=2, buckets=16)
    first = execute(dataclasses.replace(again, task=grams), tmp_path / "grams", QUIET)
    wider = dataclasses.replace(again, task=dataclasses.replace(grams, buckets=32))
    wider = dataclasses.replace(wider, parent=str(tmp_path / "grams"))
    larger = execute(wider, tmp_path / "wider", QUIET)
    sizes = [o.state.params["score"]["grams"]["embedding"].shape for o in (first, larger)]
    assert sizes == [(16, 2), (32, 2)]
    said = capsys.readouterr().out
    assert "pool 'last' there, 'mean' here (--task.pool)" in said
    assert "its score is of other shapes than this run's and left out" in said
    assert open_run(tmp_path / "wider").params["score"]["grams"]["embedding"].shape == (32, 2)


def test_patience_ends_a_run_and_the_best_checkpoint_is_kept(files, tmp_path):
    """Two more evaluations without a better one; started again, it has ended already."""
    still = AdamW(learning_rate=1e-30)
    settings = settings_for(
        files, phases=(Phase(60, gpt2_tiny(), batch_size=4, sequence_length=T),), optimizer=still
    )
    loop = dataclasses.replace(LOOP, evaluate_every=2, checkpoint_every=2, patience=2)
    how = dataclasses.replace(QUIET, loop=loop, keep_last=1)
    outcome = execute(settings, tmp_path / "run", how)
    assert outcome.reason == "patience"
    assert int(outcome.state.step) == 6
    assert json.loads((tmp_path / "run/result.json").read_text())["reason"] == "patience"
    before = rows_of(tmp_path / "run")
    again = execute(settings, tmp_path / "run", how)
    assert (again.reason, int(again.state.step)) == ("patience", 6)
    (tmp_path / "run/result.json").unlink()  # killed between its end and its result
    again = execute(settings, tmp_path / "run", how)
    assert (again.reason, int(again.state.step)) == ("patience", 6)
    assert rows_of(tmp_path / "run") == before
    assert best_step(tmp_path / "run") in (2, 4, 6)
    longer = dataclasses.replace(how, loop=dataclasses.replace(loop, patience=3))
    assert int(execute(settings, tmp_path / "run", longer).state.step) == 8


@pytest.mark.parametrize(
    ("values", "patience", "over"),
    [
        ([], 1, False),
        ([1.0], 1, False),
        ([1.0, 1.0], 1, True),  # as good is not better
        ([2.0, 1.0, 3.0], 2, False),
        ([2.0, 1.0, 3.0, 1.5], 2, True),
        ([1.0, 2.0, 3.0], None, False),
    ],
)
def test_patience_counts_from_the_best(values, patience, over):
    assert out_of_patience(values, patience) is over


def test_what_is_watched_has_to_be_there(files, tmp_path):
    how = dataclasses.replace(QUIET, loop=dataclasses.replace(LOOP, watch="-bleu"))
    with pytest.raises(ValueError, match=r"no 'bleu' to watch; it has loss, accuracy"):
        execute(settings_for(files), tmp_path / "run", how)


@pytest.mark.slow
def test_regression_and_words_end_to_end(files, tmp_path):
    words = settings_for(files, task=lambda f, dropout: Classification(f, by="words"))
    outcome = execute(words, tmp_path / "words", QUIET)
    assert "score" not in outcome.state.params
    report_task(tmp_path / "words")
    path = tmp_path / "numbers.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{'ab' * n}\t{n}\n" for n in range(1, 6)))
    numbers = TaskFiles((("train", str(path)), ("valid", str(path))))
    loop = dataclasses.replace(LOOP, watch="loss")
    how = dataclasses.replace(QUIET, loop=loop)
    outcome = execute(settings_for(numbers, task=Regression), tmp_path / "numbers", how)
    assert {"loss", "pearson", "spearman"} <= set(outcome.evaluation)
    report_task(tmp_path / "numbers")


# The command


def command(files, out, **changes):
    data = tuple(f"{split}={path}" for split, path in files.paths)
    defaults = {
        "task": Classification(),
        "model": gpt2_tiny(),
        "optimizer": AdamW(),
        "schedule": Linear(),
        "data": data,
        "tokenizer": "bytes",
        "out": out,
        "batch_size": 4,
        "sequence_length": T,
    }
    return Finetune(**defaults | changes)


def test_epochs_and_evaluations_follow_the_rows(files, tmp_path):
    settings, execution = settings_of(command(files, tmp_path / "run", epochs=2.0, patience=3))
    assert settings.steps == 10  # 21 rows are 5 whole batches
    assert execution.loop.evaluate_every == execution.loop.checkpoint_every == 1
    assert (execution.loop.watch, execution.loop.patience) == ("-accuracy", 3)
    assert settings.task.labels == ("bad", "good")
    assert settings.parent is None
    named, _ = settings_of(command(files, tmp_path / "two", steps=7, evaluate_every=2))
    assert named.steps == 7


def test_a_start_brings_model_and_tokenizer(files, parent, tmp_path):
    made = command(
        files, tmp_path / "run", start=str(parent), tokenizer=None, dropout=0.2, steps=1,
        evaluate_every=1,
    )  # fmt: skip
    made = dataclasses.replace(made, model=modern_mini())  # the default: none was named
    settings, _ = settings_of(made)
    assert settings.parent == str(parent)
    assert settings.phases[0].model.dropout == 0.2
    with pytest.raises(ValueError, match="keeps its tokenizer"):
        settings_of(dataclasses.replace(made, tokenizer="bytes"))
    with pytest.raises(ValueError, match="keeps its model"):
        settings_of(dataclasses.replace(made, model=gpt2_tiny(width=64)))
    with pytest.raises(ValueError, match=r"is no run.*hf:FOLDER"):
        settings_of(dataclasses.replace(made, start=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="nothing to forget"):
        settings_of(command(files, tmp_path / "b", forgetting="stdlib", steps=1))


def test_a_start_with_other_pieces_is_refused(files, tmp_path):
    """As many ids, each of another piece: nothing else would tell."""
    pieces = train_sentencepiece([f"{a}{b}" for a in "abcdwxyz" for b in "abcdwxyz"], 280)
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    pieces.save(ours)
    train_sentencepiece(["to be or not to be, that is the question"] * 9, 280).save(theirs)
    first = settings_for(files, tokenizer=str(theirs))
    execute(first, tmp_path / "first", QUIET)
    settings = settings_for(files, tokenizer=str(ours), parent=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=r"another tokenizer.*first/tokenizer"):
        execute(settings, tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_command_lines_that_say_nothing_are_refused(files, tmp_path):
    for change, why in (
        ({"data": ("train",)}, "give NAME=VALUE"),
        ({"data": ("train=a", "train=b")}, "names train more than once"),
        ({"data": ("trian=a", "valid=b")}, "no split is called 'trian'"),
        ({"data": ()}, "no train file"),
        ({"epochs": 0.0}, "epochs is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"task": Classification(TaskFiles(share=0.5))}, "from --data.*give those"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
    ):
        with pytest.raises(ValueError, match=why):
            settings_of(command(files, tmp_path / "run", **change))


def test_llama2c_weights_become_a_run(tmp_path, monkeypatch):
    """A file in its format, with drawn numbers: the run holds its parameters."""
    monkeypatch.setattr(test_llama2c, "VOCABULARY", 260)
    tensors = test_llama2c.tensors_of(np.random.default_rng(0), True)
    path = test_llama2c.write(tmp_path / "a.bin", tensors, True)
    vocabulary = tmp_path / "tokenizer.bin"
    vocabulary.write_bytes(test_llama2c.vocabulary(["ab"]))
    spec = start_run(f"llama2c:{path}", tmp_path / "run", str(vocabulary))
    assert spec is not None
    run = open_run(spec)
    assert run.model.config == load(path)[0]
    assert bits(run.params) == bits(load(path)[1])
    assert start_run(f"llama2c:{path}", tmp_path / "run", str(vocabulary)) == spec  # made once
    shutil.copy(path, tmp_path / "b.bin")
    with pytest.raises(ValueError, match=r"run was made of .*a\.bin.*not of .*b\.bin"):
        start_run(f"llama2c:{tmp_path / 'b.bin'}", tmp_path / "run", str(vocabulary))
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        start_run(f"llama2c:{path}", tmp_path / "other")
    with pytest.raises(ValueError, match="has 260 ids and the tokenizer bytes has 257"):
        start_run(f"llama2c:{path}", tmp_path / "other", "bytes")


def test_forgetting_is_checked_before_anything_trains(files, parent, tmp_path):
    given = command(files, tmp_path / "run", start=str(parent), tokenizer=None, model=modern_mini())
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        settings_of(dataclasses.replace(given, forgetting=str(tmp_path / "nowhere.txt")))
