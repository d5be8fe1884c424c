"""The translation task: its files, its rows, its loss, and what it translates."""

import dataclasses
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.translation_metrics import scored, signatures, translation_metrics
from experiments.tasks.translation_metrics import translation_predictions as predictions
from model.build import build_model
from model.presets import encoder_decoder_tiny, gpt2_tiny, modern_tiny
from model.transformer import Transformer
from train.losses import counts_of, loss_function
from train.plugs import Context
from train.tasks.rows import RowFormat
from train.tasks.task import TaskFiles, task_batches, task_evaluation_batches
from train.tasks.translation import Translation
from train.tokenizers.tokenizer import load_tokenizer

PAIRS = [("a b", "B A"), ("cd", "DC"), ("e", "E!"), ("f g h", "HG F"), ("ij", "J"), ("k", "KK")]
TOKENIZER = load_tokenizer("bytes")
END = TOKENIZER.end_of_document
FORMS = {"encoder_decoder": encoder_decoder_tiny, "prefix_lm": modern_tiny}


def files(folder, pairs=PAIRS, bad_rows="stop", name="train"):
    sides = [
        b"".join(b"%s\n" % (t if isinstance(t, bytes) else t.encode()) for t in side)
        for side in zip(*pairs, strict=True)
    ]
    (folder / f"{name}.en").write_bytes(sides[0])
    (folder / f"{name}.de.gz").write_bytes(gzip.compress(sides[1]))
    text = f"{folder / name}.en,{folder / name}.de.gz"
    form = RowFormat(bad_rows=bad_rows)
    return TaskFiles((("train", text), ("valid", text), ("test", text)), form)


def model_for(form, **changes):
    config = FORMS[form](
        vocabulary_size=TOKENIZER.vocabulary_size,
        dropout=0.0,
        max_length=128,
        zero_init_projections=False,
        **changes,
    )
    model = build_model(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    # Peaked, so that what is found is clear.
    return model, jax.tree.map(lambda a: 3 * a, params)


@pytest.mark.parametrize("form", FORMS)
def test_packed_rows_hold_every_pair_once_with_its_target_alone_in_the_loss(form, tmp_path):
    task = Translation(files(tmp_path), form=form).resolve()
    found = task.examples("train", TOKENIZER, 16)
    a = found.arrays
    assert found.cut == 0
    assert len(a["tokens"]) < len(PAIRS)
    seen = set()
    for row in range(len(a["tokens"])):
        for segment in range(1, a["segments"][row].max() + 1):
            here = (a["segments"][row] == segment) & (a["weights"][row] > 0)
            target = a["targets"][row, here].tolist()
            assert target[-1] == END
            if form == "encoder_decoder":
                source = a["source"][row, a["source_segments"][row] == segment].tolist()
                assert source.pop() == END
                first = a["tokens"][row, a["segments"][row] == segment][0]
                assert first == END
            else:
                prompt = a["tokens"][row, (a["segments"][row] == segment) & (a["prefix"][row] > 0)]
                assert prompt[[0, -1]].tolist() == [END, END]
                source = prompt[1:-1].tolist()
            seen.add((TOKENIZER.decode(source), TOKENIZER.decode(target[:-1])))
    assert seen == set(PAIRS)
    assert a["weights"].sum() == sum(len(t) + 1 for _, t in PAIRS)
    batches = task_batches(a, seed=1, batch_size=2)
    np.testing.assert_array_equal(
        batches[3]["tokens"], task_batches(a, seed=1, batch_size=2)[3]["tokens"]
    )


def test_a_share_is_one_of_pairs_not_of_packed_rows(tmp_path):
    pairs = [(f"s {n}", f"t {n}") for n in range(40)]
    held = files(tmp_path, pairs)
    seen = []
    for share in (0.05, 0.25):
        part = dataclasses.replace(held, share=share)
        task = Translation(part).resolve()
        found = task.examples("train", TOKENIZER, 64)
        assert len(found.rows) == share * len(pairs)
        assert int((found.arrays["tokens"] == END).sum()) == len(found.rows)
        assert len(task.examples("valid", TOKENIZER, 64).rows) == len(pairs)
        seen.append({row.line for row in found.rows})
    assert seen[0] < seen[1]


@pytest.mark.variants(1)
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_packed_rows_is_that_of_the_pairs_apart(form, tmp_path, strict):
    task = Translation(files(tmp_path), form=form).resolve()
    model, params = model_for(form)
    terms = task.terms(model, 0.0)
    loss = jax.jit(loss_function(model, terms))
    names = {"tokens", "targets", "weights", "segments", "positions", "prefix"}
    names |= {"source", "source_segments", "source_positions"}

    def value(split):
        arrays = task.examples(split, TOKENIZER, 16).arrays
        batch = {name: jnp.asarray(a) for name, a in arrays.items() if name in names}
        context = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
        return float(loss(params, batch, context)[0])

    packed = value("train")
    np.testing.assert_allclose(packed, value("valid"), rtol=1e-5)
    # The same by what the evaluation reports.
    examples = task.examples("valid", TOKENIZER, 16)
    outputs = jax.jit(task.outputs(model))
    batch = next(task_evaluation_batches(examples.arrays, batch_size=8))
    found = {name: np.asarray(a)[:6] for name, a in outputs(params, batch).items()}
    figures = translation_metrics(task, examples, found, TOKENIZER)
    np.testing.assert_allclose(figures["loss"], packed, rtol=1e-5)
    rows = list(predictions(task, examples, found, TOKENIZER))
    assert [(row["source"], row["reference"]) for row in rows] == PAIRS
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_what_is_cut_has_no_end_and_is_counted(tmp_path):
    task = Translation(files(tmp_path, [("abcdef", "ABCDEF"), ("a", "A")])).resolve()
    found = task.examples("train", TOKENIZER, 5)
    assert found.cut == 1
    ends = found.arrays["targets"][found.arrays["weights"] > 0] == END
    assert ends.sum() == 1
    prefix = dataclasses.replace(task, form="prefix_lm").examples("train", TOKENIZER, 8)
    assert prefix.cut == 1
    assert prefix.arrays["weights"].sum() == 3 + 2


def test_bad_lines_are_named_or_skipped_and_counted(tmp_path):
    pairs = [PAIRS[0], ("x", " "), ("y", b"\xe9t\xe9"), PAIRS[1]]
    with pytest.raises(ValueError, match="line 2: the target is empty"):
        Translation(files(tmp_path, pairs)).resolve().examples("train", TOKENIZER, 16)
    task = Translation(files(tmp_path, pairs, "skip")).resolve()
    found = task.examples("valid", TOKENIZER, 16)
    assert [(row.line, row.reason.split(":")[0]) for row in found.bad] == [
        (2, "the target is empty"),
        (3, "the target is no UTF-8 (byte 0)"),
    ]
    assert [row.line for row in found.rows] == [1, 4]


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    given = files(tmp_path)
    task = Translation(given).resolve()
    (tmp_path / "train.en").write_text("one line\n")
    with pytest.raises(ValueError, match=r"1 lines and .* has 6"):
        task.examples("train", TOKENIZER, 16)
    with pytest.raises(ValueError, match="has changed"):
        task.resolve()
    (tmp_path / "train.de.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="no whole gzip"):
        task.examples("train", TOKENIZER, 16)
    with pytest.raises(ValueError, match="not there"):
        Translation(TaskFiles((("train", "a,b"), ("valid", "a,b")))).resolve()


def test_one_file_of_columns_will_do(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("en\ttarget\n" + "".join(f"{s}\t{t}\n" for s, t in PAIRS))
    form = RowFormat(columns=(("source", "en"),))
    task = Translation(TaskFiles((("train", str(path)), ("valid", str(path))), form)).resolve()
    assert list(task.texts())[:2] == list(PAIRS[0])


def test_a_model_of_the_other_form_is_refused():
    for form, other in (("encoder_decoder", "prefix_lm"), ("prefix_lm", "encoder_decoder")):
        with pytest.raises(ValueError, match="form"):
            Translation(form=form).terms(build_model(FORMS[other]()), 0.0)
    with pytest.raises(ValueError, match="width is 0"):
        Translation(beams=0)


def test_bleu_is_sacrebleus_with_its_signature():
    text = ["ein Mann steht auf der Straße", "zwei Hunde laufen schnell"]
    assert scored(text, text)["bleu"] == pytest.approx(100)
    half = scored(["ein Mann steht auf einer Straße", "zwei Hunde"], text)
    assert 0 < half["bleu"] < 100
    assert half["length_ratio"] == pytest.approx(8 / 10)
    assert "tok:13a" in signatures()["bleu"]


def test_learned_positions_leave_room_for_the_translation(tmp_path):
    """A source as long as a row is cut, and every other row keeps its own."""
    long, short = "x" * 60, "ab"
    task = Translation(files(tmp_path, [(long, "AB"), (short, "AB")]), form="prefix_lm").resolve()
    config = gpt2_tiny(vocabulary_size=257, max_length=64)
    model = Transformer(config)
    batch = {k: jnp.asarray(v) for k, v in task.examples("valid", TOKENIZER, 64).arrays.items()}
    params = model.init(jax.random.key(0), batch["tokens"][:, :4])["params"]
    found = jax.jit(task.outputs(model))(params, batch)
    assert found["translation"].shape[1] == 64 // 3
    alone = jax.jit(task.outputs(model))(
        params, {k: v[1:, :16] if v.ndim > 1 else v[1:] for k, v in batch.items()}
    )
    n = int(alone["translation_lengths"][0])
    same = min(n, 64 // 3)
    np.testing.assert_array_equal(found["translation"][1, :same], alone["translation"][0, :same])
