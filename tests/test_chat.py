"""Decoding by steps, conversations as a task, and the chat command."""

import dataclasses
import io
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import chat
from experiments.runs.run import Run
from experiments.tasks.instruction_metrics import instruction_metrics, instruction_predictions
from model.beam import Beam
from model.build import build_model
from model.generate import Sampling, generate
from model.presets import encoder_decoder_tiny, gpt2_tiny, modern_tiny
from model.stack import apart, together
from model.stream import begin, draw, read
from model.transformer import features, head
from train.losses import counts_of, loss_function
from train.plugs import Context
from train.settings import Phase, Settings
from train.tasks.chat import ChatTemplate, Instructions, Message, encode, messages_of
from train.tasks.classification import Classification
from train.tasks.rows import RowFormat
from train.tasks.squad import Squad
from train.tasks.task import DIVIDED, SPLITS, TaskFiles, task_evaluation_batches
from train.tasks.translation import Translation, translate
from train.tokenizers.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
END = TOKENIZER.end_of_document
GREEDY = Sampling(temperature=0)
CHATS = [
    [("user", "hi"), ("assistant", "yo")],
    [("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "dd")],
    [("user", "u"), ("assistant", "v")],
]


def built(make=modern_tiny, **changes):
    sizes = {"vocabulary_size": TOKENIZER.vocabulary_size, "dropout": 0.0, "max_length": 96}
    model = build_model(make(**sizes | changes))
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    # Redrawn where it starts at zero; peaked, so that ties do not decide.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [a + 0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(structure, drawn)


def talk_of(model, params, task=None, folder="run"):
    settings = Settings(phases=(Phase(1, model.config),), task=task)
    return chat.open_talk(Run(folder, settings, 1, model, params, TOKENIZER), GREEDY, 12)


def said(talk, mode, lines):
    return ["".join(answer) for answer in chat.answers(talk, mode, lines)]


@pytest.mark.variants(1)
@pytest.mark.parametrize("make", [gpt2_tiny, modern_tiny])
def test_steps_give_what_generation_gives(make, strict):
    model, params = built(make)
    prompt = list(range(5, 45))  # longer than a chunk
    decoding, weights, found = begin(model, 96), apart(params), []
    decoding = read(model, weights, decoding, prompt)
    for _ in range(6):
        found.append(draw(decoding, jax.random.key(0), GREEDY))
        decoding = read(model, weights, decoding, found[-1:])
    key = jax.random.key(0)
    expected = generate(model, params, [prompt], key=key, max_new_tokens=6, sampling=GREEDY)
    assert found == expected.new_tokens()[0]
    assert decoding.length == 46
    with pytest.raises(ValueError, match="room"):
        read(model, weights, decoding, list(range(51)))


def test_layers_apart_come_together_again():
    _, params = built(encoder_decoder_tiny)
    again = together(apart(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow  # a run in tests/test_translation_runs.py is talked to in the same way
@pytest.mark.parametrize("form", ["encoder_decoder", "prefix_lm"])
def test_lines_are_translated_as_by_the_task(form, strict):
    model, params = built(encoder_decoder_tiny if form == "encoder_decoder" else modern_tiny)
    task = Translation(form=form)
    found = said(talk_of(model, params, task), "translation", ["ab cd", "", "xyz"])
    assert found[1] == ""
    for line, text in zip(["ab cd", "xyz"], found[::2], strict=True):
        ids = TOKENIZER.encode(line).tolist()
        if form == "encoder_decoder":
            source = jnp.array([[*ids, END]])
            batch = {"source": source, "source_segments": jnp.ones_like(source)}
            prompt = [END]
        else:
            batch, prompt = {}, [END, *ids, END]
        batch |= {"prompt": jnp.array([prompt]), "prompt_lengths": jnp.array([len(prompt)])}
        expected = translate(model, 1, 0.0, params, batch)
        length = int(expected["translation_lengths"][0])
        whole = TOKENIZER.decode(np.asarray(expected["translation"])[0, : min(length, 12)])
        assert text == whole
    one = talk_of(model, params, task)._replace(beam=Beam(1, 0.0, 12))
    assert said(one, "translation", ["xyz"]) == found[2:]


def test_a_conversation_is_answered_from_the_cache_as_if_read_anew(strict):
    model, params = built()
    talk, template = talk_of(model, params), ChatTemplate()
    found = said(talk, "chat", ["hi", "and", "", "hi"])
    assert found[2] == ""
    assert found[3] != "" or found[0] == ""
    so_far = []
    for number, (line, text) in enumerate(zip(["hi", "and"], found, strict=False)):
        so_far.append(Message("user", line))
        ids = encode(template, so_far, TOKENIZER).ids.tolist()
        expected = "".join(chat.written(chat._numbered(talk, number), ids, {}))
        assert text == expected
        so_far.append(Message("assistant", text.strip()))
        if not text.strip():
            so_far = so_far[:-2]


def test_an_answer_that_its_template_writes_otherwise_is_read_anew(monkeypatch):
    """A tab in place of the space: as many ids, and others."""
    model, params = built()
    begun = []
    monkeypatch.setattr(chat, "begin", lambda *args: begun.append(1) or begin(*args))
    for first, wanted in (" ", 1), ("\t", 2):
        begun.clear()
        drawn = iter(2 * [*TOKENIZER.encode(f"{first}hi").tolist(), TOKENIZER.end_of_document])
        monkeypatch.setattr(chat, "draw", lambda *_, drawn=drawn: next(drawn))
        assert said(talk_of(model, params), "chat", ["a", "b"]) == 2 * [f"{first}hi"]
        assert len(begun) == wanted


@pytest.mark.slow
def test_where_positions_end_the_oldest_questions_go():
    model, params = built(max_length=48)
    lines = ["one two three", "four five six", "seven eight nine", "ten"]
    assert len(said(talk_of(model, params), "chat", lines)) == 4
    with pytest.raises(ValueError, match="48 positions"):
        said(talk_of(model, params), "chat", ["x" * 60])


def test_an_answer_has_room_where_positions_end(monkeypatch):
    model, params = built(max_length=64)
    (letter,) = TOKENIZER.encode("a")
    monkeypatch.setattr(chat, "draw", lambda *_: letter)
    # With what was said before, the second question would leave 11 positions.
    assert said(talk_of(model, params), "chat", ["hi", "hi"]) == 2 * ["a" * 12]


def test_half_a_character_waits():
    shown = ""
    pieces = []
    ids = []
    for byte in "aé!".encode():
        ids.append(byte)
        piece, shown = chat.fresh(TOKENIZER, ids, shown)
        pieces.append(piece)
    assert pieces == ["a", "", "é", "!"]


def test_modes_follow_the_task_and_what_cannot_be_is_refused():
    model, params = built()
    run = talk_of(model, params).run
    assert chat.mode_of(run, None) == "continuation"
    assert chat.mode_of(talk_of(model, params, Instructions()).run, None) == "chat"
    assert chat.mode_of(talk_of(model, params, Translation()).run, None) == "translation"
    for task, command in ((Classification(), "predict"), (Squad(), "open_qa")):
        tuned = talk_of(model, params, task).run
        with pytest.raises(ValueError, match=f"which experiments.{command} does"):
            chat.mode_of(tuned, None)
        assert chat.mode_of(tuned, "continuation") == "continuation"
    with pytest.raises(ValueError, match="not trained to translate"):
        chat.mode_of(run, "translation")
    two = talk_of(*built(encoder_decoder_tiny), Translation()).run
    with pytest.raises(ValueError, match="encoder-decoder"):
        chat.mode_of(two, "chat")


def test_the_command_reads_lines_and_prints_answers(monkeypatch, capsys):
    model, params = built()
    run = talk_of(model, params).run
    monkeypatch.setattr(chat, "adapted_run", lambda *args: run)
    monkeypatch.setattr(
        "sys.argv", ["chat", "--run", "x", "--max-new-tokens", "3", "--temperature", "0"]
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\r\ncd\n"))
    chat.main()
    expected = said(chat.open_talk(run, GREEDY, 3), "continuation", ["ab", "cd"])
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def files(folder, rows=CHATS, bad_rows="stop"):
    path = folder / "chats.jsonl"
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in row]})
        if isinstance(row, list)
        else row
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return TaskFiles((("train", str(path)), ("valid", str(path))), RowFormat(bad_rows=bad_rows))


SHORT = ChatTemplate("{text}", "{text}", ">", "{text}")


def test_the_loss_is_on_the_answers_alone_and_conversations_do_not_meet(tmp_path, strict):
    task = Instructions(files(tmp_path), SHORT, answer_tokens=4).resolve()
    packed = task.examples("train", TOKENIZER, 20).arrays
    assert len(packed["tokens"]) < len(CHATS)
    scored = packed["targets"][packed["weights"] > 0].tolist()
    texts = [text for row in CHATS for role, text in row if role == "assistant"]
    answers = [token for text in texts for token in (*text.encode(), END)]
    assert sorted(scored) == sorted(answers)
    model, params = built()
    terms = task.terms(model, 0.0)
    loss = jax.jit(loss_function(model, terms))
    names = ("tokens", "targets", "weights", "segments", "positions")

    def value(arrays):
        batch = {name: jnp.asarray(arrays[name]) for name in names}
        context = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
        return float(loss(params, batch, context)[0])

    examples = task.examples("valid", TOKENIZER, 20)
    np.testing.assert_allclose(value(packed), value(examples.arrays), rtol=1e-5)
    # One conversation by hand.
    ids = encode(SHORT, [Message(*m) for m in CHATS[0]], TOKENIZER).ids
    assert ids.tolist() == [END, *b"hi>yo", END]

    @jax.jit
    def log_probabilities(ids):
        final = features(model, params, ids[None]).final[0]
        return jax.nn.log_softmax(head(model, params, final), axis=-1)

    logp = log_probabilities(ids[:-1])
    by_hand = -sum(float(logp[place, ids[place + 1]]) for place in (3, 4, 5))
    outputs = jax.jit(task.outputs(model))
    batch = next(task_evaluation_batches(examples.arrays, batch_size=4))
    found = {name: np.asarray(a)[:3] for name, a in outputs(params, batch).items()}
    np.testing.assert_allclose(found["nats"][0], by_hand, rtol=1e-4)
    figures = instruction_metrics(task, examples, found, TOKENIZER)
    np.testing.assert_allclose(figures["loss"], value(packed), rtol=1e-5)
    rows = list(instruction_predictions(task, examples, found, TOKENIZER))
    assert [row["answer"] for row in rows] == ["yo", "dd", "v"]
    assert rows[1]["messages"][-1] == {"role": "user", "content": "c"}


def test_bad_conversations_are_named_or_skipped(tmp_path):
    bad = {
        "{": "no JSON object",
        '{"messages": [{"role": "user"}]}': "no JSON object with messages",
        json.dumps({"messages": [{"role": "user", "content": "a"}]}): "no answer",
    }
    for text, reason in bad.items():
        with pytest.raises(ValueError, match=f"line 2: .*{reason}"):
            Instructions(files(tmp_path, [CHATS[0], text])).resolve().examples(
                "train", TOKENIZER, 20
            )
    for wrong, reason in (
        ([("user", "a"), ("assistant", " ")], "message 2, of the assistant, is empty"),
        ([("robot", "a"), ("assistant", "b")], "role 'robot'"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "follows on the user's"),
        ([("user", "a"), ("system", "b"), ("assistant", "c")], "speaks first"),
    ):
        with pytest.raises(ValueError, match=reason):
            Instructions(files(tmp_path, [CHATS[0], wrong])).resolve().examples(
                "train", TOKENIZER, 20
            )
    task = Instructions(files(tmp_path, [CHATS[0], *bad], "skip")).resolve()
    found = task.examples("train", TOKENIZER, 20)
    assert ([row.line for row in found.rows], [row.line for row in found.bad]) == ([1], [2, 3, 4])
    with pytest.raises(ValueError, match="no answer fits"):
        task.examples("train", TOKENIZER, 2)
    lone = '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant"}]}'
    first = Instructions(
        files(tmp_path, ["{", lone.replace("}]", ', "content": "a"}]'), CHATS[0]], "skip")
    )
    found = first.resolve().examples("train", TOKENIZER, 20)
    assert [row.line for row in found.bad] == [1, 2]
    named = dataclasses.replace(task.files, form=RowFormat((("prompt", "question"),)))
    with pytest.raises(ValueError, match="leave columns, separator and names out"):
        dataclasses.replace(task, files=named).examples("train", TOKENIZER, 20)


def test_prompts_and_answers_may_be_columns(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("prompt\tanswer\n2 + 2?\t4\n")
    task = Instructions(TaskFiles((("train", str(path)), ("valid", str(path))))).resolve()
    found = task.examples("valid", TOKENIZER, 64)
    text = TOKENIZER.decode(found.arrays["tokens"][0, : found.arrays["lengths"][0]])
    assert text == "User: 2 + 2?\nAssistant: 4"
    assert dataclasses.asdict(task)["template"]["user"] == "User: {text}\n"
    with pytest.raises(ValueError, match=r"has no \{text\}"):
        ChatTemplate(user="User:")
    with pytest.raises(ValueError, match="decoder-only"):
        task.terms(build_model(encoder_decoder_tiny()), 0.0)


def test_answers_to_one_question_lie_in_one_split(tmp_path):
    """Whether they are conversations or prompts with answers, and in both forms the same one."""
    questions = [f"{n} + {n}?" for n in range(60)]
    talks = [[("user", q), ("assistant", str(n))] for q in questions for n in (1, 2)]
    path = Path(files(tmp_path, talks).paths[0][1])
    pairs = tmp_path / "pairs.csv"
    lines = [f"{talk[0][1]},{talk[1][1]}" for talk in talks]
    pairs.write_text("\n".join(["prompt,answer", *lines]) + "\n")
    asked = []
    for file in (path, pairs):
        paths = tuple((split, str(file)) for split in SPLITS)
        task = Instructions(TaskFiles(paths, shares=DIVIDED))
        asked.append(
            [{messages_of(row)[0].text for row in task._rows(split)[0]} for split in SPLITS]
        )
    assert asked[0] == asked[1]
    assert all(not a & b for a, b in itertools.combinations(asked[0], 2))
    assert set.union(*asked[0]) == set(questions)
