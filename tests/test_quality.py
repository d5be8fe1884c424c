"""Text quality: each filter on documents made for it, the command end to end."""

import json

import pytest

from experiments.quality import Quality, run_command
from train.text.quality import (
    contamination,
    exact,
    grams,
    held_out_grams,
    judged,
    language,
    length,
    near,
)
from train.text.sources import open_source

LONG = " ".join(f"word{n}" for n in range(60))


def fates(documents, *filters):
    return [found.filter for found in judged(documents, filters)]


def test_length_and_exact_duplicates():
    found = list(judged(["one two", "x", "One\n two ", "x", "three"], [length(2, 8), exact()]))
    assert [d.filter for d in found] == [None, "length", "exact", "length", None]
    assert found[2].reason == "equal to original 1"
    assert fates(["a" * 9, "a" * 8], length(0, 8)) == ["length", None]


def test_near_duplicates_by_shared_n_grams():
    """Changing one word of 60 leaves about 50 of 61 n-grams; half of the words leaves none."""
    pytest.importorskip("datasketch")
    changed = LONG.replace("word30", "other")
    half = " ".join(w if n % 2 else f"new{n}" for n, w in enumerate(LONG.split()))
    a, b = grams(LONG, 5), grams(changed, 5)
    assert 0.8 < len(a & b) / len(a | b) < 0.85
    documents = [LONG, half, changed, LONG + " end", "short", "short", "shorter"]
    assert fates(documents, near(0.7)) == [None, None, "near", "near", None, "near", None]
    assert fates(documents, near(0.999))[2] is None
    again = [d.reason for d in judged(documents, [near(0.7)])]
    assert again == [d.reason for d in judged(documents, [near(0.7)])]
    assert "like original 1" in again[3]
    with pytest.raises(ValueError, match="at most 1"):
        near(1.5)


def test_languages():
    pytest.importorskip("py3langid")
    english = "The cat sat on the mat and looked at the people who were passing by the window."
    german = "Die Katze saß auf der Matte und sah den Leuten zu, die am Fenster vorbeigingen."
    assert fates([english, german], language(["en"])) == [None, "language"]
    assert fates([english, german], language(["de", "en"])) == [None, None]
    with pytest.raises(ValueError, match="no language is called klingon"):
        language(["klingon"])


def test_contamination_by_common_n_grams():
    held = held_out_grams([LONG, "other words that nobody trains on here", "hi"], 6)
    assert (held.documents, held.too_short) == (3, 1)
    met = set()
    inside = "before. Word10, word11 word12 WORD13 word14 word15 and after"
    few = "before word10 word11 word12 word13 word14 and after"
    assert fates([inside, few], contamination(held, met)) == ["contaminated", None]
    assert met == {0}


def test_the_command_writes_a_source_and_counts(tmp_path):
    pytest.importorskip("datasketch")
    documents = [LONG, LONG.upper(), LONG.replace("word30", "x"), "", "unlike all the others"]
    data, evaluation = tmp_path / "in.jsonl", tmp_path / "eval.jsonl"
    data.write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in [*documents, "a held out text"])
    )
    evaluation.write_text(json.dumps({"text": "it is a held out text."}) + "\n")
    command = Quality(
        (str(data),),
        tmp_path / "out",
        3,
        near_duplicates=0.7,
        evaluation=(str(evaluation),),
        overlap=4,
    )
    lines = run_command(command)
    kept = list(open_source(str(tmp_path / "out" / "text.jsonl")).documents())
    assert kept == [LONG, "unlike all the others"]
    facts = json.loads((tmp_path / "out" / "quality.json").read_text())
    counts = {name: each["documents"] for name, each in facts["counts"].items()}
    # The empty document is none: sources leave those out.
    assert counts == {"read": 5, "length": 0, "exact": 1, "near": 1, "contaminated": 1, "kept": 2}
    assert facts["evaluation"]["met_in_training_data"] == 1
    removed = [json.loads(x) for x in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert [r["document"] for r in removed] == [2, 3, 5]
    assert "1 of 1 evaluation documents" in lines[-1]
    with pytest.raises(ValueError, match="nothing is overwritten"):
        run_command(command)
    with pytest.raises(ValueError, match="no document is left"):
        run_command(Quality((str(data),), tmp_path / "none", 10**6, near_duplicates=None))
    assert not (tmp_path / "none").exists()
