"""Word vectors: three formats with one content, errors with their line, and what they become."""

import gzip
import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.finetune import Finetune, settings_of
from experiments.json_files import read_json
from experiments.pretrain import Pretrain
from experiments.pretrain import settings_of as pretrain_settings
from experiments.runs.assemble import initial_params
from experiments.runs.execute import execute
from experiments.runs.run import open_run
from experiments.word_vectors import WordVectors, run_command
from model.presets import encoder_decoder_tiny, modern_tiny
from tests.test_run import own_cache  # noqa: F401 (fixture)
from train.optimizers import AdamW
from train.schedules import Constant
from train.tasks.classification import Classification
from train.text.word_vectors import read_vectors, start_with_vectors, to_width
from train.tokenizers.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
WORDS = ("a", "b", ". .", "long", "é")


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(len(WORDS), 4)).astype(np.float32)


def write(folder, vectors, kind):
    path = folder / f"vectors.{kind}"
    lines = [
        f"{w} " + " ".join(map(repr, map(float, v))) for w, v in zip(WORDS, vectors, strict=True)
    ]
    header = f"{len(WORDS)} {vectors.shape[1]}\n"
    if kind == "glove":
        path.write_text("\n".join(lines) + "\n")
    elif kind == "text":
        path.write_text(header + "\n".join(lines) + "\n")
    elif kind == "gz":
        path.write_bytes(gzip.compress((header + "\n".join(lines)).encode()))
    else:  # as word2vec writes it, with line feeds, or as gensim does, without
        end = b"\n" if kind == "bin" else b""
        rows = [
            w.replace(" ", "_").encode() + b" " + struct.pack("<4f", *v) + end
            for w, v in zip(WORDS, vectors, strict=True)
        ]
        path.write_bytes(header.encode() + b"".join(rows))
    return path


@pytest.mark.parametrize("kind", ["glove", "text", "gz", "bin", "bin2"])
def test_every_format_holds_the_same_vectors(tmp_path, vectors, kind):
    path = write(tmp_path, vectors, kind)
    wanted = ("a", ". .", "é") if not kind.startswith("bin") else ("a", "._.", "é")
    words, width, found = read_vectors(path, wanted)
    assert (words, width, sorted(found)) == (5, 4, sorted(wanted))
    for word in wanted:
        row = WORDS.index(word.replace("_", " "))
        np.testing.assert_array_equal(found[word], vectors[row])


def test_covered_pieces_begin_as_their_vectors(tmp_path, vectors):
    """Differences between words stay what they were, but for one scale; the rest stays as drawn."""
    table = 0.02 * jax.random.normal(jax.random.key(0), (BYTES.vocabulary_size + 3, 16))
    params = {"token_embedding": {"embedding": table}, "final_norm": {"scale": jnp.ones(16)}}
    path = write(tmp_path, vectors, "glove")
    new, coverage = start_with_vectors(params, BYTES, path, jax.random.key(1))
    assert new["final_norm"] is params["final_norm"]
    changed = np.flatnonzero((new["token_embedding"]["embedding"] != table).any(axis=1)).tolist()
    assert changed == sorted(BYTES.encode("aAbB").tolist())
    assert (coverage.covered, coverage.lower, coverage.pieces) == (4, 2, BYTES.vocabulary_size)
    assert "4 of" in str(coverage)
    rows = {c: np.asarray(new["token_embedding"]["embedding"])[BYTES.encode(c)[0]] for c in "aAb"}
    np.testing.assert_array_equal(rows["a"], rows["A"])
    entries = np.asarray(new["token_embedding"]["embedding"])[changed]
    size = np.sqrt(np.square(np.asarray(table)[: BYTES.vocabulary_size]).mean())
    np.testing.assert_allclose(np.sqrt(np.square(entries).mean()), size, rtol=1e-5)


def test_widths_keep_distances_as_far_as_they_can():
    vectors = np.random.default_rng(0).normal(size=(20, 6)) * [9, 5, 3, 1e-3, 1e-3, 1e-3]

    def distances(v):
        return np.linalg.norm(v[:, None] - v[None], axis=-1)

    for width in (3, 6, 32):  # three axes hold nearly all
        found = to_width(vectors, width, jax.random.key(0))
        assert found.shape == (20, width)
        np.testing.assert_allclose(distances(found), distances(vectors), atol=1e-2)
        np.testing.assert_array_equal(found, to_width(vectors, width, jax.random.key(0)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a 1 2 3\nb 1 2\n", "line 2 has 2 numbers, and the vectors are of 3"),
        (b"2 3\na 1 2 3\n", "holds 2 words and holds 1"),
        (b"2 3\na 1 2 3\na 1 x 3\nb 1 2 3\n", "holds 2 words and holds 3"),
        (b"a 1 2 3\nb 1 2 x\n", "line 2: could not convert"),
        (b"", "it is empty"),
        (b"so it goes, he said\n", "line 1 is neither.*begins with b'so it goes, he said"),
        (b"PK\x03\x04 glove.6B.50d.txt\n", "a zip archive: unpack it"),
        (b"\x1f\x8b\x08\x00\n", "gzip: call it .gz"),
        (b"a 1 2 3\nb 1 2 nan\n", "line 2 has a number that is not finite"),
        (b"hello\n", "line 1 is neither"),
        (b"2 2\na " + struct.pack("<2f", 1, 2) + b"b \x00\x00", "word 2 has 2 of 8 bytes"),
        (b"1 2\na " + struct.pack("<2f", 1, 2) + b"\nb ", "goes on after its 1 words"),
        (b"long 1 2 3\n", "none of the 1 words"),
    ],
)
def test_damage_is_told_with_its_place(tmp_path, content, words):
    path = tmp_path / "vectors"
    path.write_bytes(content)
    config = modern_tiny()
    params = {"token_embedding": {"embedding": jnp.ones((BYTES.vocabulary_size, config.width))}}
    with pytest.raises(ValueError, match=words):
        start_with_vectors(params, BYTES, path, jax.random.key(0))
    with pytest.raises(ValueError, match="there is no file"):
        start_with_vectors(params, BYTES, tmp_path / "none", jax.random.key(0))
    with pytest.raises(ValueError, match="is a folder"):
        start_with_vectors(params, BYTES, tmp_path, jax.random.key(0))
    path = path.rename(tmp_path / "vectors.gz")
    if content and not content.startswith(b"\x1f\x8b"):
        with pytest.raises(ValueError, match="no whole gzip file"):
            start_with_vectors(params, BYTES, path, jax.random.key(0))


def test_a_run_starts_from_vectors(tmp_path, vectors):
    path = write(tmp_path, vectors, "text")
    config = modern_tiny(scan_layers=True)
    lines = run_command(WordVectors(path, "bytes", tmp_path / "run", config, 16))
    assert lines[0].startswith("word vectors: 4 of 257 pieces")
    run = open_run(tmp_path / "run")
    table = np.asarray(run.params["token_embedding"]["embedding"])
    a, upper, b = (table[BYTES.encode(letter)[0]] for letter in "aAb")
    np.testing.assert_array_equal(a, upper)
    centred = vectors[:2] - vectors[[0, 0, 1, 1]].mean(axis=0)
    ratio = np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(
        ratio, np.linalg.norm(centred[0]) / np.linalg.norm(centred[1]), rtol=1e-4
    )
    with pytest.raises(ValueError, match="nothing is overwritten"):
        run_command(WordVectors(path, "bytes", tmp_path / "run", config, 16))


@pytest.mark.variants(1)
@pytest.mark.parametrize("kind", ["text", "glove", "bin"])
def test_vectors_are_a_start_of_a_task(tmp_path, vectors, kind, capsys):
    """The same run as the command of vectors makes: covered pieces theirs, others as drawn."""
    path = write(tmp_path, vectors, kind)
    rows = "".join(f"{text}\t{label}\n" for text in ("ab", "ba") for label in "xy")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + rows)
    made = Finetune(
        task=Classification(),
        model=modern_tiny(),
        optimizer=AdamW(),
        schedule=Constant(),
        start=f"vectors:{path}",
        data=tuple(f"{split}={tmp_path / split}.tsv" for split in ("train", "valid")),
        tokenizer="bytes",
        out=tmp_path / "out",
        steps=1,
        evaluate_every=1,
        sequence_length=8,
        seed=3,
    )
    settings, _ = settings_of(made)
    assert "word vectors: 4 of 257 pieces" in capsys.readouterr().out
    assert settings.parent == str(tmp_path / "out" / "start")
    run = open_run(settings.parent)
    assert settings.phases[0].model == run.model.config
    drawn = jax.jit(lambda: initial_params(settings, run.model.config))()
    start, before = (np.asarray(p["token_embedding"]["embedding"]) for p in (run.params, drawn))
    changed = np.flatnonzero((start != before).any(axis=1)).tolist()
    assert changed == sorted(BYTES.encode("aAbB").tolist())
    np.testing.assert_array_equal(start[BYTES.encode("A")], start[BYTES.encode("a")])
    for name in set(drawn) - {"token_embedding"}:
        jax.tree.map(np.testing.assert_array_equal, run.params[name], drawn[name])
    settings_of(made)  # again: what is there serves
    assert capsys.readouterr().out == ""
    for change, why in (
        ({"seed": 4}, "another model or seed"),
        ({"model": modern_tiny(layers=1)}, "another model or seed"),
        ({"start": f"vectors:{tmp_path / 'b'}"}, "made of .*vectors"),
        ({"forgetting": "stdlib"}, "nothing to forget"),
        ({"start": str(path)}, "is a file; say what it is: vectors:"),
        ({"start": f"vectors:{tmp_path / 'none'}", "out": tmp_path / "b"}, "there is no file"),
    ):
        other = replace(made, **change)
        if other.start == str(path):
            other = replace(other, tokenizer=None)
        with pytest.raises(ValueError, match=why):
            settings_of(other)


def test_pieces_of_a_start_from_vectors_are_learned_from_the_text(tmp_path, vectors, own_cache):  # noqa: F811
    path = write(tmp_path, vectors, "glove")
    (tmp_path / "text.txt").write_text("a b long words " * 300)
    made = Pretrain(
        model=modern_tiny(),
        optimizer=AdamW(),
        schedule=Constant(),
        data=(str(tmp_path / "text.txt"),),
        tokenizer="sentencepiece:285",
        from_run=f"vectors:{path}",
        out=tmp_path / "out",
        steps=1,
        batch_size=2,
        sequence_length=8,
    )
    settings, execution = pretrain_settings(made)
    run = open_run(tmp_path / "out" / "start")
    assert run.tokenizer.vocabulary_size == 285
    assert read_json(run.folder / "result.json")["covered"] >= 3  # "long" is a piece now
    outcome = execute(settings, made.out, replace(execution, progress=False))
    assert int(outcome.state.step) == 1


@pytest.mark.slow
def test_an_encoder_decoder_starts_from_vectors(tmp_path, vectors):
    path = write(tmp_path, vectors, "glove")
    config = encoder_decoder_tiny()
    run_command(WordVectors(path, "bytes", tmp_path / "run", config, 16))
    table = np.asarray(open_run(tmp_path / "run").params["token_embedding"]["embedding"])
    a, upper = (table[BYTES.encode(letter)[0]] for letter in "aA")
    np.testing.assert_array_equal(a, upper)
