"""Word vectors: three formats with one content, errors with their line, and what they become."""

import gzip
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import open_run
from experiments.word_vectors import WordVectors, run_command
from model.presets import modern_tiny
from train.tokenizers import load_tokenizer
from train.word_vectors import read_vectors, start_with_vectors, to_width

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
        (b"a 1 2 x\n", "line 1: could not convert"),
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
