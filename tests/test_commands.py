"""The commands over a trained run: generate, evaluate, and opening one."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, generate, pretrain
from experiments.evaluate import protocol_of
from experiments.run_names import parse_parent
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run, phase_at, read_settings
from model.presets import gpt2_tiny, modern_mini
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.schedules import Constant
from train.settings import Phase, Settings

T = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(0, 26, 4)) for _ in range(20)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in draw.integers(0, 20, 600)))
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the commands then leave JAX's own as it is
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text, environment):
    """A run of 8 steps with checkpoints at 4 and 8."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(
        phases=(Phase(8, gpt2_tiny(), 4, T),),
        data=(str(text),),
        tokenizer="bytes",
        schedule=Constant(),
    )
    execute(settings, out, Execution(LoopSettings(checkpoint_every=4), progress=False))
    return out


@pytest.fixture
def call(folder, monkeypatch, capsys):
    def call(module, **flags):
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["command", "--run", str(folder), *words])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_the_same_seed_gives_the_same_text(call):
    flags = {"prompt": "ab", "temperature": 1.0, "max-new-tokens": 12}
    first, again = call(generate, **flags, seed=3), call(generate, **flags, seed=3)
    assert first == again
    assert first.startswith("ab")
    assert len(first) > len("ab\n")
    assert call(generate, **flags, seed=4) != first


def test_several_samples_differ_and_are_numbered(call):
    shown = call(generate, prompt="ab", samples=3, temperature=1.0, **{"max-new-tokens": 12})
    parts = re.split(r"^--- (\d)$\n", shown, flags=re.MULTILINE)
    assert parts[1::2] == ["1", "2", "3"]
    assert len(set(parts[2::2])) == 3
    assert all(part.startswith("ab") for part in parts[2::2])


def test_greedy_text_does_not_depend_on_the_seed(call):
    assert call(generate, prompt="ab", temperature=0) == call(
        generate, prompt="ab", temperature=0, seed=1
    )


def test_generation_ends_where_the_positions_do(call, folder, monkeypatch):
    """Asked for more than fits, it gives what fits; a prompt that fills them all is refused."""
    seen = []
    inner = generate.generate

    def spy(*args, **kwargs):
        found = inner(*args, **kwargs)
        seen.append([len(row) for row in found.new_tokens()])
        return found

    monkeypatch.setattr(generate, "generate", spy)
    biased(monkeypatch, "a")  # never the end of the document
    call(generate, prompt="a" * 30, **{"max-new-tokens": 100})
    assert seen == [[2]]
    with pytest.raises(ValueError, match="the prompt has 32 tokens and the model 32 positions"):
        call(generate, prompt="a" * 32)


def test_a_run_from_another_reads_on_in_its_text_unless_given_one(folder, text):
    ask = pretrain.Pretrain(
        modern_mini(), AdamW(), Constant(), from_run=f"{folder}@4", sequence_length=T
    )
    for data, expected in (((), (str(text),)), (("stdlib",), ("stdlib",))):
        settings, _ = pretrain.settings_of(dataclasses.replace(ask, data=data))
        assert settings.data == expected
    scratch = dataclasses.replace(ask, from_run=None)
    assert pretrain.settings_of(scratch)[0].data == ("stdlib",)


def test_a_prompt_opens_a_document_where_asked(call, folder, monkeypatch):
    seen = []

    def spy(model, params, prompts, **more):
        seen.append(prompts)
        return inner(model, params, prompts, **more)

    inner = generate.generate
    monkeypatch.setattr(generate, "generate", spy)
    end = open_run(folder).tokenizer.end_of_document
    for opening in ("text", "document"):
        call(generate, prompt="ab", opening=opening, **{"max-new-tokens": 1})
    call(generate, opening="document", **{"max-new-tokens": 1})
    assert seen == [[[97, 98]], [[end, 97, 98]], [[end]]]


def biased(monkeypatch, letter):
    """Opens the run with a head that always gives one letter, or for None the end of document."""

    def opened(*args):
        run = open_run(*args)
        wanted = run.tokenizer.end_of_document if letter is None else ord(letter)
        table = run.params["token_embedding"]["embedding"]  # tied: the head's rows
        shift = {**run.params["final_norm"], "bias": 1e4 * table[wanted]}
        return dataclasses.replace(run, params={**run.params, "final_norm": shift})

    monkeypatch.setattr(generate, "adapted_run", lambda folder, step, _: opened(folder, step))


def test_generation_stops_at_the_end_of_the_document(call, monkeypatch):
    biased(monkeypatch, "z")
    assert call(generate, prompt="ab", **{"max-new-tokens": 5}) == "abzzzzz\n"
    biased(monkeypatch, None)
    assert call(generate, prompt="ab", **{"max-new-tokens": 5}) == "ab\n"
    assert call(generate, **{"max-new-tokens": 5}) == "\n"  # an empty prompt begins a document


def nats_by_hand(run, tokens, length, stride):
    """Loss of each token but the first, from the first window of `length` that predicts it."""
    rows, places = [], []
    for target in range(1, len(tokens)):
        start = max(0, math.ceil((target - length) / stride)) * stride
        seen = tokens[start:target]
        rows.append(np.pad(seen, (0, length - len(seen))))  # causal: padding is not seen
        places.append(len(seen) - 1)
    apply = jax.jit(run.model.apply)
    logits = np.asarray(apply({"params": run.params}, jnp.asarray(rows, jnp.int32)), np.float64)
    logits = logits[np.arange(len(rows)), places]
    logits -= logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    return log_z - logits[np.arange(len(rows)), tokens[1:]]


@pytest.mark.parametrize(
    ("protocol", "length", "stride", "printed"),
    [
        (None, T, T, "windows:16"),
        ("windows:10", 10, 10, "windows:10"),
        ("stride:5", T, 5, "stride:5 of 16"),
        ("stride:1", T, 1, "stride:1 of 16"),
    ],
)
def test_evaluation_equals_one_by_hand(call, folder, text, protocol, length, stride, printed):
    run = open_run(folder)
    content = text.read_bytes()
    held_out = content[len(content) * 9 // 10 :]  # the last tenth of a single document
    tokens = np.array([*held_out, run.tokenizer.end_of_document])
    nats = nats_by_hand(run, tokens, length, stride)
    shown = call(evaluate, **({} if protocol is None else {"protocol": protocol}))
    assert f"validation, {len(nats)} tokens, {printed})" in shown
    value = {
        name: float(re.search(rf"^{name} +([\d.]+)", shown, re.MULTILINE)[1])
        for name in ("loss", "perplexity", "bits per byte")
    }
    assert value["loss"] == pytest.approx(nats.mean(), abs=1e-4)
    assert value["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    expected = nats.sum() / math.log(2) / len(held_out)
    assert value["bits per byte"] == pytest.approx(expected, abs=1e-4)


def test_rows_at_a_time_change_figures_by_rounding_alone(call):
    """Alike but for rounding: a product of other shape adds in another order, by processor."""
    one, other = (call(evaluate, **flags).split() for flags in ({}, {"batch-size": 3}))
    assert [word for word in one if not _is_number(word)] == [
        word for word in other if not _is_number(word)
    ]
    numbers = [float(word) for word in one if _is_number(word)]
    assert len(numbers) > 2
    assert numbers == pytest.approx([float(word) for word in other if _is_number(word)], rel=1e-4)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def test_evaluation_of_other_data_and_of_an_earlier_step(call, tmp_path):
    (tmp_path / "other.txt").write_text("xyz " * 200)
    now = call(evaluate, data=tmp_path / "other.txt")
    assert "other.txt" in now
    assert "at step 8" in now
    before = call(evaluate, step=4)
    assert "at step 4" in before
    assert before.split("loss")[1] != call(evaluate).split("loss")[1]


def test_the_data_of_a_run_may_be_a_glob_with_a_weight(call, folder, text, monkeypatch):
    pattern = f"2*{text.parent}/*.txt"

    def opened(*args):
        run = open_run(*args)
        return dataclasses.replace(run, settings=dataclasses.replace(run.settings, data=(pattern,)))

    plain = call(evaluate).split("loss")[1]
    monkeypatch.setattr(evaluate, "open_run", opened)
    assert call(evaluate).split("loss")[1] == plain


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"protocol": "stride"}, "protocol is 'stride'; give windows:N or stride:N"),
        ({"protocol": "windows:0"}, "protocol is 'windows:0'"),
        ({"protocol": "stride:17"}, "stride 17 is more than sequence_length 16"),
        ({"protocol": "windows:33"}, "windows of 33 tokens do not fit the 32 learned positions"),
        ({"split": "test"}, "has no test split"),
        ({"data": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(call, flags, says):
    with pytest.raises(ValueError, match=says):
        call(evaluate, **flags)


def test_protocols_are_read():
    assert protocol_of(None, 64) == (64, 64)
    assert protocol_of("windows:1024", 64) == (1024, 1024)
    assert protocol_of("stride:64", 64) == (64, 64)


def test_phases_are_found_by_step():
    phases = tuple(Phase(steps, gpt2_tiny(), 4, 8) for steps in (10, 5, 1))
    settings = Settings(phases=phases)
    found = [phase_at(settings, step) for step in (0, 9, 10, 14, 15, 16, 99)]
    first, second, third = (0, 0, 10), (1, 10, 15), (2, 15, 16)
    assert found == [first, first, second, second, third, third, third]


def test_parents_are_read():
    assert parse_parent("runs/a") == (Path("runs/a"), None)
    assert parse_parent("runs/a@12") == (Path("runs/a"), 12)
    assert parse_parent("me@home/run") == (Path("me@home/run"), None)
    assert parse_parent("me@home/run@7") == (Path("me@home/run"), 7)


def test_a_run_opens_at_any_of_its_checkpoints(folder):
    newest, earlier = open_run(folder), open_run(str(folder), 4)
    assert (newest.step, earlier.step) == (8, 4)
    assert newest.model.config.vocabulary_size == newest.tokenizer.vocabulary_size
    pairs = zip(jax.tree.leaves(newest.params), jax.tree.leaves(earlier.params), strict=True)
    assert any((a != b).any() for a, b in pairs)


def test_what_cannot_be_opened_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run"):
        open_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
        open_run(folder, 5)
    settings = json.loads((folder / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"colour": "red"}))
    with pytest.raises(ValueError, match=r"unknown settings \['colour'\]"):
        read_settings(tmp_path)
    settings["optimizer"]["name"] = "magic"
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no optimizer 'magic'; there are"):
        read_settings(tmp_path)
