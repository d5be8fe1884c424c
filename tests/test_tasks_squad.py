"""Extractive question answering: windows, targets, the head, a run from start to open questions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.open_qa import OpenQa, answer_open, run_command
from experiments.retrieval import build_index
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from experiments.task_report import report_task
from experiments.tasks.squad_metrics import squad_scores
from model.presets import gpt2_tiny
from model.transformer import Transformer, features
from tests.squad_cases import article, colours, write_squad
from train.loop import LoopSettings
from train.losses import counts_of, loss_function
from train.losses_span import span_losses
from train.optimizers import AdamW
from train.plugs import Context
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.rows import RowFormat
from train.tasks.squad import Squad, span_logits, windows_of
from train.tasks.squad_reading import mark_ids
from train.tasks.task import TEST, TRAIN, VALID, TaskFiles
from train.tokenizers.tokenizer import load_tokenizer

T = 48
BYTES = load_tokenizer("bytes")
CONFIG = gpt2_tiny(vocabulary_size=BYTES.vocabulary_size, max_length=T, dropout=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    return write_squad(folder / "a.json", [colours(seed) for seed in range(4)])


@pytest.fixture(scope="module")
def task(path):
    thirds = ((TRAIN, 0.5), (VALID, 0.25), (TEST, 0.25))
    return Squad(TaskFiles(((TRAIN, str(path)),)), thirds, stride=9).resolve()


@pytest.mark.parametrize(
    ("count", "room", "stride"), [(1, 5, 3), (23, 5, 3), (23, 5, 9), (5, 5, 1)]
)
def test_windows_cover_every_piece(count, room, stride):
    windows = windows_of(count, room, stride)
    assert set().union(*(range(*window) for window in windows)) == set(range(count))
    assert max(b - a for a, b in windows) <= room
    assert all(b == count for _, b in windows[-1:])
    assert len({b for _, b in windows}) == len(windows)  # none is inside another


def test_rows_hold_question_and_window_and_point_at_the_answer(task):
    """In windows from every piece on, so that some end within an answer."""
    examples = dataclasses.replace(task, stride=1).examples(TRAIN, BYTES, T)
    arrays, seen = examples.arrays, set()
    for n in range(examples.size):
        row = examples.rows[arrays["row"][n]].columns
        ids, first = arrays["tokens"][n], arrays["first"][n]
        assert ids[0] == ids[first - 1] == BYTES.end_of_document
        assert BYTES.decode(ids[1 : first - 1]) == row["question"]
        window = BYTES.decode_bytes(ids[first : arrays["lengths"][n]])
        at = arrays["pieces"][n, first]
        assert row["paragraph"].encode()[at : at + len(window)] == window
        answer = json.loads(row["answers"])[0]
        if arrays["exact"][n]:
            span = ids[arrays["starts"][n] : arrays["ends"][n] + 1]
            assert BYTES.decode(span) == answer
            seen.add(row["id"])
        else:
            assert arrays["starts"][n] == arrays["ends"][n] == first - 1
            assert f" {answer}.".encode() not in window
    assert seen == {row.columns["id"] for row in examples.rows}


def test_marks_stand_before_shared_words_and_move_no_answer(task):
    plain, marked = (
        dataclasses.replace(task, stride=200, mark=mark).examples(TRAIN, BYTES, 120)
        for mark in (False, True)
    )
    assert plain.size == marked.size == len(plain.rows)  # a window each
    mark = mark_ids(BYTES)[0]
    for n, row in enumerate(plain.rows):
        first, length = (marked.arrays[name][n] for name in ("first", "lengths"))
        ids = marked.arrays["tokens"][n, :length]
        at = np.flatnonzero(ids == mark)
        behind = [bytes(ids[a + 1 : a + 5].tolist()).decode(errors="ignore") for a in at]
        name = row.columns["question"].split()[2]
        # "What does Ann like?" shares "Ann" with the paragraph, and the stem of "likes".
        assert [text[: len(name)] for text in behind if text != "like"] == [name, name]
        assert behind.count("like") == 1 + 3
        assert (at < first).sum() == 2
        whole = slice(plain.arrays["lengths"][n])
        np.testing.assert_array_equal(ids[ids != mark], plain.arrays["tokens"][n, whole])
        for arrays in (plain.arrays, marked.arrays):
            span = slice(arrays["starts"][n], arrays["ends"][n] + 1)
            assert BYTES.decode(arrays["tokens"][n, span]) == json.loads(row.columns["answers"])[0]
            bytes_ = row.columns["paragraph"].encode()
            again = [bytes_[piece] for piece in arrays["pieces"][n, span]]
            np.testing.assert_array_equal(again, arrays["tokens"][n, span])


def test_the_sentences_that_share_most_come_first_and_no_span_crosses_two(task):
    task = dataclasses.replace(task, order="shared", most_windows=1)
    examples = task.examples(TRAIN, BYTES, T)
    arrays = examples.arrays
    assert examples.size == len(examples.rows)  # one row each, whatever does not fit
    ranks = mark_ids(BYTES)[1:]
    for n, row in enumerate(examples.rows):
        read = slice(arrays["first"][n], arrays["lengths"][n])
        ids, sentences = (arrays[name][n, read] for name in ("tokens", "sentences"))
        name = row.columns["question"].split()[2]
        assert ids[0] == ranks[0]
        assert f"{name} likes" in BYTES.decode(ids[sentences == 1][1:])
        assert (np.diff(sentences) >= 0).all()
        begins = np.flatnonzero(np.isin(ids, ranks))
        assert ids[begins].tolist() == ranks[: len(begins)].tolist()
        span = slice(arrays["starts"][n], arrays["ends"][n] + 1)
        answer = BYTES.decode(arrays["tokens"][n, span])
        assert answer == json.loads(row.columns["answers"])[0]
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    outputs = jax.jit(task.outputs(Transformer(CONFIG)))(weights_of(task), batch)
    rows = np.arange(examples.size)
    start, stop = (np.asarray(outputs[name]) for name in ("start", "stop"))
    assert (stop > start).any()
    assert (arrays["sentences"][rows, start] == arrays["sentences"][rows, stop]).all()


def test_an_answer_over_two_sentences_is_not_in_their_row(tmp_path):
    text = "Ann left. Bob came. Eve is here."
    asked = [("1", "Who is here?", ["left. Bob"]), ("2", "Who is here?", ["Bob"])]
    path = write_squad(tmp_path / "a.json", [article("A", [(text, asked)]), colours(0)])
    halves = ((TRAIN, 0.5), (VALID, 0.5))
    files = TaskFiles(((TRAIN, str(path)),))
    task = Squad(files, halves, (("A", TRAIN),), order="shared").resolve()
    arrays = task.examples(TRAIN, BYTES, 96).arrays
    inside = arrays["starts"] >= arrays["first"]
    assert inside.tolist() == [False, True]
    assert arrays["exact"].tolist() == [0, 1]
    first = arrays["first"][0]
    assert BYTES.decode(arrays["tokens"][0, first + 1 :][: len("Eve is here.")]) == "Eve is here."


def test_windows_may_be_the_first_ones_alone(task):
    whole = task.examples(TRAIN, BYTES, T)
    assert whole.size > 2 * len(whole.rows)
    few = dataclasses.replace(task, most_windows=2).examples(TRAIN, BYTES, T)
    assert np.bincount(few.arrays["row"]).tolist() == [2] * len(whole.rows)
    here = np.flatnonzero(whole.arrays["row"] == 0)[:2]
    np.testing.assert_array_equal(few.arrays["tokens"][:2], whole.arrays["tokens"][here])


def test_one_file_serves_three_splits_that_share_no_paragraph(task):
    assert [split for split, _ in task.files.paths] == [TRAIN, VALID, TEST]
    parts = [{q.paragraph for q in task.questions(s)[0]} for s in (TRAIN, VALID, TEST)]
    assert [len(part) for part in parts] == [6, 3, 3]
    assert len(set().union(*parts)) == 12
    assert set(task.texts()) > parts[0]
    assert task.resolve() == task


def test_long_questions_are_cut_and_counted(task):
    short = dataclasses.replace(task, question_length=5)
    examples = short.examples(VALID, BYTES, T)
    assert examples.cut == len(examples.rows)
    assert set(examples.arrays["first"].tolist()) == {7}


def weights_of(task, seed=0):
    key = jax.random.key(seed)
    params = Transformer(CONFIG).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten({**params, **task.head(key, CONFIG)})
    keys = jax.random.split(key, len(leaves))
    new = [0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_only_full_attention_sees_what_follows(task, attention, strict):
    task = dataclasses.replace(task, attention=attention)
    arrays = task.examples(VALID, BYTES, T)[0]
    batch = {name: jnp.asarray(a[:4]) for name, a in arrays.items()}
    assert ("prefix" in batch) == (attention == "full")
    weights, model = weights_of(task), Transformer(CONFIG)
    last = int(batch["lengths"].min()) - 1

    @jax.jit
    def logits(tokens):
        more = {name: batch[name] for name in ("prefix",) if name in batch}
        return span_logits(weights, features(model, weights, tokens, **more).final)

    changed = batch["tokens"].at[:, last].set(7)
    moved = np.abs(np.asarray(logits(batch["tokens"]) - logits(changed))).max(axis=(0, 2))
    assert moved[last] > 1e-3
    assert (moved[:last] > 1e-5).all() if attention == "full" else (moved[:last] == 0).all()

    outputs = jax.jit(task.outputs(model))(weights, batch)
    wanted = span_losses(logits(batch["tokens"]), batch)
    np.testing.assert_allclose(outputs["loss"], wanted, rtol=1e-5)
    terms = task.terms(model, 0.0)
    ones = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
    loss, _ = jax.jit(loss_function(model, terms))(weights, batch, ones)
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "about"),
    [
        ({"attention": "none"}, "'causal' or 'full'"),
        ({"stride": 0}, "stride is 0"),
        ({"order": "best"}, "text, shared"),
        ({"most_windows": 0}, "most_windows is 0"),
        ({"shares": (("dev", 1.0),)}, "no split is called 'dev'"),
    ],
)
def test_fields_that_cannot_be(fields, about):
    with pytest.raises(ValueError, match=about):
        Squad(**fields)


def test_files_that_do_not_go_together(path, tmp_path):
    def resolved(*paths, form=RowFormat()):  # noqa: B008 (frozen)
        return Squad(TaskFiles(tuple((s, str(p)) for s, p in paths), form)).resolve()

    other = write_squad(tmp_path / "b.json", [colours(3)])
    with pytest.raises(ValueError, match="a paragraph of Colours 3 is in valid and"):
        resolved((TRAIN, path), (VALID, other))
    with pytest.raises(ValueError, match="leave columns, separator and names out"):
        resolved((TRAIN, path), form=RowFormat(separator=","))
    with pytest.raises(ValueError, match="no valid file"):
        resolved((TRAIN, path), (TEST, other))
    fresh = write_squad(tmp_path / "c.json", [colours(9)])
    task = resolved((TRAIN, path), (VALID, fresh))
    for changes in (
        {"articles": (("Colours 9", TRAIN),)},
        {"shares": ((TRAIN, 0.5), (VALID, 0.5))},
        {"fold": 1},
    ):
        with pytest.raises(ValueError, match="divide a file that splits share"):
            dataclasses.replace(task, **changes).resolve()
    write_squad(fresh, [colours(10)])
    with pytest.raises(ValueError, match=r"c\.json has changed"):
        task.resolve()


def test_what_is_no_question_stops_or_is_counted(tmp_path):
    broken = colours(7)
    broken["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "mauve"
    path = write_squad(tmp_path / "a.json", [*(colours(seed) for seed in range(3)), broken])
    files = TaskFiles(((TRAIN, str(path)),))
    with pytest.raises(ValueError, match=r"question 7-0-.*'mauve' does not occur.*--bad-rows skip"):
        Squad(files, ((TRAIN, 0.5), (VALID, 0.5))).resolve()
    skipping = dataclasses.replace(files, form=RowFormat(bad_rows="skip"))
    task = Squad(skipping, ((TRAIN, 0.5), (VALID, 0.5))).resolve()
    examples = [task.examples(split, BYTES, T) for split in (TRAIN, VALID)]
    assert [len(one.bad) for one in examples] == [1, 0]  # of one file, so it is told once
    assert sum(len(one.rows) for one in examples) == 4 * 9 - 1


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    settings = Settings(
        phases=(Phase(4, CONFIG, batch_size=8, sequence_length=T),),
        data=(),
        tokenizer="bytes",
        optimizer=AdamW(learning_rate=3e-3),
        schedule=Linear(),
        task=task,
    )
    loop = LoopSettings(log_every=1, evaluate_every=2, checkpoint_every=2, watch=task.watch)
    execute(settings, out, Execution(loop, progress=False))
    report_task(out)
    return out


def test_a_run_writes_its_answers(run, task):
    figures = json.loads((run / "task.json").read_text())["test"]
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").open(encoding="utf-8")]
    assert len(lines) == len(task.questions(TEST)[0])
    answers = {line["id"]: line["prediction"] for line in lines}
    references = {line["id"]: line["answers"] for line in lines}
    assert all(line["prediction"] in line["paragraph"] for line in lines)
    scores = squad_scores(answers, references)
    assert {name: figures[name] for name in scores} == pytest.approx(scores)


def test_open_questions_with_one_paragraph_are_what_the_reader_says(run, path, tmp_path):
    """Where BM25 finds the own paragraph alone, the answers are those of the task's predictions."""
    pytest.importorskip("bm25s")
    opened = open_run(run)
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").open(encoding="utf-8")]
    index = build_index([lines[0]["paragraph"]])
    same = [line for line in lines if line["paragraph"] == lines[0]["paragraph"]]
    # The best checkpoint gave the predictions; the newest opens here by default.
    best = json.loads((run / "task.json").read_text())["step"]
    found, hits = answer_open(
        open_run(run, best), index, [line["question"] for line in same], k=3, weight=1.0
    )
    assert hits.passages.tolist() == [[0]] * len(same)
    assert [one.text for one in found] == [line["prediction"] for line in same]
    np.testing.assert_allclose([f.score for f in found], [x["score"] for x in same], atol=1e-4)
    nothing, _ = answer_open(opened, index, ["xyzzy?"], k=1, weight=0.5)
    assert (nothing[0].text, nothing[0].passage, nothing[0].rank) == ("", -1, 0)
    out = tmp_path / "answers.jsonl"
    moved = tmp_path / "moved.json"  # known by its content
    moved.write_bytes(path.read_bytes())
    said = run_command(OpenQa(run, moved, k=2, out=out))
    assert said[0] == "9 questions, 12 paragraphs, 2 read for each"
    assert len(out.read_text().splitlines()) == 9
    text = tmp_path / "notes.txt"
    text.write_text("Ann paid the bill.\n\nBob left\nearly.\n")
    said = run_command(OpenQa(run, text, question="Who left?"))
    assert said[0] in "Bob left early."
    assert said[1] == "    in: Bob left early."
    with pytest.raises(ValueError, match="ask with --question"):
        run_command(OpenQa(run, text))


def test_several_references_train_on_the_most_frequent(tmp_path):
    asked = [("1", "Who?", ["Ann", "Ann Lee", "Ann Lee"])]
    made = [article("A", [("Ann Lee left.", asked)]), colours(0)]
    path = write_squad(tmp_path / "a.json", made)
    task = Squad(
        TaskFiles(((TRAIN, str(path)),)), ((TRAIN, 0.5), (VALID, 0.5)), (("A", TRAIN),)
    ).resolve()
    arrays = task.examples(TRAIN, BYTES, T).arrays
    n = int(np.flatnonzero(arrays["row"] == 0)[0])
    assert (
        BYTES.decode(arrays["tokens"][n][arrays["starts"][n] : arrays["ends"][n] + 1]) == "Ann Lee"
    )


def test_an_answer_begins_behind_its_mark(tmp_path):
    asked = [("1", "Is it dark what Ann likes?", ["dark red"])]
    made = [article("A", [("Ann likes dark red.", asked)]), colours(0)]
    path = write_squad(tmp_path / "a.json", made)
    halves = ((TRAIN, 0.5), (VALID, 0.5))
    task = Squad(TaskFiles(((TRAIN, str(path)),)), halves, (("A", TRAIN),), mark=True).resolve()
    arrays = task.examples(TRAIN, BYTES, 64).arrays
    n = int(np.flatnonzero(arrays["row"] == 0)[0])
    start = arrays["starts"][n]
    assert arrays["tokens"][n, start - 1] == mark_ids(BYTES)[0]
    assert BYTES.decode(arrays["tokens"][n, start : arrays["ends"][n] + 1]) == "dark red"
