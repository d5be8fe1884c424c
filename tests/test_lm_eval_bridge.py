"""Runs as a model of the harness: its figures against our own evaluation, and a local task."""

import ast
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import Harness, describe, run_command
from experiments.lm_eval_bridge import (
    continuation_scores,
    continue_text,
    generation_of,
    harness_model,
    text_score,
    text_windows,
)
from experiments.runs.execute import Execution, execute
from experiments.runs.run import Run, open_run
from model.flops import abstract_params
from model.generate import Sampling
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.corpus import Split
from train.data import evaluation_batches
from train.evaluate import evaluate
from train.losses import cross_entropy
from train.plugs import State
from train.schedules import Constant
from train.settings import Phase, Settings
from train.step import make_evaluation_step
from train.tokenizers.tokenizer import load_tokenizer

TASK = Path(__file__).parents[1] / "experiments" / "harness_tasks" / "python_syntax.yaml"
TEXT = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def run():
    """A run that was never written, its weights drawn at a scale that shows."""
    tokenizer = load_tokenizer("bytes")
    config = gpt2_tiny(vocabulary_size=tokenizer.vocabulary_size, dropout=0.0)
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    new = [0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, new)
    return Run(Path("none"), Settings(), 0, Transformer(config), params, tokenizer)


def our_loss(run, ids, length, stride):
    """Sum of the losses of our own evaluation, in nats."""
    split = Split(np.array(ids, np.uint16), np.array([0]), len(ids))
    batches = evaluation_batches(split, sequence_length=length, batch_size=3, stride=stride)
    state = State(jnp.int32(0), run.params, (), jax.random.key(0), {})
    step = jax.jit(make_evaluation_step(run.model, [cross_entropy()]))
    means = evaluate(step, state, {}, batches)
    return means["loss"] * means["tokens"]


def test_texts_of_one_shape_are_one_program(run, compilations):
    ids = run.tokenizer.encode(TEXT)[:24].tolist()
    first = text_score(run, ids, length=8)
    before = sum(compilations.values())
    assert text_score(run, ids, length=8) == first
    assert sum(compilations.values()) == before


def test_a_text_is_as_probable_as_our_evaluation_says(run):
    """Windows side by side, whose last is whole: 1 + 3 * 8 tokens."""
    end = run.tokenizer.end_of_document
    ids = run.tokenizer.encode(TEXT)[:24].tolist()
    wanted = -our_loss(run, [end, *ids], 8, 8)
    assert text_score(run, ids, length=8) == pytest.approx(wanted, rel=1e-5)
    short = ids[:19]  # the last window takes more context, and counts its own tokens alone
    by_parts = [([end], short[:8]), (short[7:8], short[8:16])]
    by_parts.append((short[10:16], short[16:]))
    parts = continuation_scores(run, by_parts, length=8)
    assert text_score(run, short, length=8) == pytest.approx(
        sum(score.log_probability for score in parts), rel=1e-5
    )


def test_a_continuation_is_as_probable_as_our_evaluation_says(run):
    ids = run.tokenizer.encode(TEXT)[:20].tolist()
    pairs = [(ids[:1], ids[1:]), (ids[:12], ids[12:]), (ids[:12], ids[12:13]), (ids[:5], [])]
    # Several batch sizes and shapes change nothing.
    found = continuation_scores(run, pairs, batch_size=3)
    assert found[0].log_probability == pytest.approx(-our_loss(run, ids, 19, 19), rel=1e-5)
    first = -our_loss(run, ids[:12], 11, 11)  # p(a b) = p(a) p(b | a)
    whole = found[0].log_probability
    assert found[1].log_probability == pytest.approx(whole - first, rel=1e-4)
    assert found[3] == (0.0, True)
    alone = continuation_scores(run, pairs[2:3], batch_size=1)
    assert alone[0].log_probability == pytest.approx(found[2].log_probability, rel=1e-5)


def test_greedy_is_what_generation_gives(run):
    context = run.tokenizer.encode(TEXT)[:6].tolist()
    said = continue_text(
        run,
        run.tokenizer.decode(context),
        stops=[],
        new_tokens=4,
        sampling=Sampling(0.0),
        seed=0,
    )
    ids = run.tokenizer.encode(said).tolist()
    assert len(ids) == 4  # plain characters, with these weights
    other = [*ids[:3], (ids[3] + 1) % 256]
    found = continuation_scores(run, [(context, ids), (context, other)])
    assert [score.greedy for score in found] == [True, False]
    cut = continue_text(
        run,
        run.tokenizer.decode(context),
        stops=[said[2:]],
        new_tokens=4,
        sampling=Sampling(0.0),
        seed=0,
    )
    assert cut == said[:2]


def test_greedy_flags_follow_the_likeliest_token(run):
    """By the model's own logits: 16 tokens, each tried against the likeliest."""
    ids = run.tokenizer.encode(TEXT)[:8].tolist()
    logits = run.model.apply({"params": run.params}, jnp.array([ids]))[0, -1]
    order = np.argsort(-np.asarray(logits))
    found = continuation_scores(run, [(ids, [int(order[0])]), (ids, [int(order[1])])])
    assert [score.greedy for score in found] == [True, False]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(
        [score.log_probability for score in found], log_p[order[:2]], rtol=1e-5
    )


def test_what_cannot_be_asked(run):
    with pytest.raises(ValueError, match="needs a context"):
        continuation_scores(run, [([], [1])])
    with pytest.raises(ValueError, match="does not fit the 8"):
        continuation_scores(run, [([1], [1] * 9)], length=8)
    with pytest.raises(ValueError, match="32 positions"):
        continuation_scores(run, [([1], [1])], length=64)
    with pytest.raises(ValueError, match="asks for num_beams"):
        generation_of({"num_beams": 4}, 0)
    with pytest.raises(ValueError, match="name a task"):
        run_command(Harness(run.folder, ()))
    with pytest.raises(ValueError, match=r"none\.yaml is not there"):
        run_command(Harness(run.folder, ("none.yaml",)))


def test_the_local_task_is_what_it_says():
    """With the right choice the lines are Python, with no other; places are even."""
    lines = (TASK.with_suffix(".jsonl")).read_text().splitlines()
    documents = [json.loads(line) for line in lines]

    def parses(text):
        try:
            ast.parse(text)
        except SyntaxError:
            return False
        return True

    for one in documents:
        texts = [one["text"] + choice + one["rest"] for choice in one["choices"]]
        assert [parses(text) for text in texts] == [n == one["label"] for n in range(4)], texts
    labels = [one["label"] for one in documents]
    assert {labels.count(n) for n in range(4)} == {len(documents) // 4}
    assert len(set(lines)) == len(lines)


@pytest.mark.slow
def test_the_local_task_runs(tmp_path, monkeypatch):
    """Accuracy by the harness is that of our own scores of the four choices."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "text.txt").write_text(TEXT * 60)
    settings = Settings(
        phases=(Phase(2, gpt2_tiny(max_length=64), batch_size=4, sequence_length=16),),
        data=(str(tmp_path / "text.txt"),),
        tokenizer="bytes",
        schedule=Constant(),
    )
    execute(settings, tmp_path / "run", Execution(progress=False))
    monkeypatch.chdir(TASK.parents[2])
    found = run_command(Harness(tmp_path / "run", (str(TASK),)))
    own = open_run(tmp_path / "run")
    right = []
    for line in TASK.with_suffix(".jsonl").read_text().splitlines():
        one = json.loads(line)
        context = own.tokenizer.encode(one["text"]).tolist()
        pairs = [(context, own.tokenizer.encode(choice).tolist()) for choice in one["choices"]]
        scores = [score.log_probability for score in continuation_scores(own, pairs)]
        right.append(int(np.argmax(scores)) == one["label"])
    assert found["python_syntax"]["acc,none"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_a_local_task_of_the_harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text(TEXT * 60)
    settings = Settings(
        phases=(Phase(2, gpt2_tiny(), batch_size=4, sequence_length=16),),
        data=(str(tmp_path / "text.txt"),),
        tokenizer="bytes",
        schedule=Constant(),
    )
    execute(settings, tmp_path / "run", Execution(progress=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    documents = [{"text": TEXT[:19], "choices": [" dog", " cat"], "label": n % 2} for n in range(4)]
    Path("data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    common = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: data.jsonl\n"
        "test_split: test\n"
    )
    choice = (
        "task: local_choice\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    rolling = (
        "task: local_text\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
    writing = (
        "task: local_writing\noutput_type: generate_until\ndoc_to_text: '{{text}}'\n"
        "doc_to_target: dog\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    files = []
    for name, text in (("choice", choice), ("rolling", rolling), ("writing", writing)):
        Path(f"{name}.yaml").write_text(common + text)
        files.append(f"{name}.yaml")
    found = run_command(Harness(tmp_path / "run", tuple(files), out=tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    own = open_run(tmp_path / "run")
    ids = own.tokenizer.encode(TEXT[:19]).tolist()
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for most in (4, 7, 19, 32):
        theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 256, most, 1))
        assert text_windows(ids, 256, most) == list(theirs)
    bits = -text_score(own, ids) / np.log(2) / 19
    assert found["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    pairs = [(ids, own.tokenizer.encode(word).tolist()) for word in documents[0]["choices"]]
    scores = [score.log_probability for score in continuation_scores(own, pairs)]
    assert found["local_choice"]["acc,none"] == 0.5  # one choice is right in half of them
    asked = type("Request", (), {"args": (TEXT[:19], " dog")})
    model = harness_model(own)
    assert model.loglikelihood([asked])[0][0] == pytest.approx(scores[0], rel=1e-5)
    assert len(describe(found)) == 3
