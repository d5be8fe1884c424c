"""Rows of a prepared TFDS dataset, as those of a file: labels and columns by name, errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.tasks.classification import Classification
from train.tasks.rows import RowFormat, content_hash, read_rows
from train.tasks.task import TaskFiles
from train.tasks.translation import Translation
from train.tokenizers.tokenizer import load_tokenizer

COLUMNS = RowFormat((("text", "sentence"), ("label", "sentiment")))
ROWS = {
    "train": [(f"text é {n}", n % 3) for n in range(30)],
    "validation": [("never", 2), ("seen", 0)],
    "unlabelled": [("alone", -1)],
}
NAMES = ["good", "odd", "bad"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Local dataset `feelings`, its labels with names."""
    import tensorflow_datasets as tfds
    from etils import epath

    class Feelings(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Sentences."""

        VERSION = tfds.core.Version("1.0.0")
        name = "feelings"
        code_path = epath.Path(__file__)

        def _info(self):
            features = {
                "sentence": tfds.features.Text(),
                "target": tfds.features.Text(),
                "sentiment": tfds.features.ClassLabel(names=NAMES),
                "parts": tfds.features.Sequence(tfds.features.Text()),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ROWS}

        def _generate_examples(self, split):
            for number, (text, label) in enumerate(ROWS[split]):
                yield (
                    number,
                    {"sentence": text, "target": text[::-1], "sentiment": label, "parts": [text]},
                )

    folder = tmp_path_factory.mktemp("tfds")
    Feelings(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def spec(prepared, split):
    return f"tfds:feelings@{prepared}#{split}"


def test_a_task_reads_its_splits(prepared):
    files = TaskFiles(
        (("train", spec(prepared, "train")), ("valid", spec(prepared, "validation"))), COLUMNS
    )
    task = Classification(files).resolve()
    assert task.labels == ("bad", "good", "odd")
    found = task.examples("train", load_tokenizer("bytes"), 16).rows
    assert sorted((row.columns["text"], row.columns["label"]) for row in found) == sorted(
        (text, NAMES[label]) for text, label in ROWS["train"]
    )
    assert sorted(row.line for row in found) == list(range(1, 31))
    assert task.resolve() == task
    hashes = [content_hash(Path(spec(prepared, split))) for split in ("train", "validation")]
    assert list(task.files.sha256) == hashes
    assert hashes[0] != hashes[1]


def test_one_split_alone_is_divided_and_translations_are_read(prepared):
    form = RowFormat((("source", "sentence"),))
    task = Translation(TaskFiles((("train", spec(prepared, "train")),), form)).resolve()
    rows = [row for split in ("train", "valid", "test") for row in task.rows(split)[0]]
    assert len(rows) == 30
    assert all(row.columns["target"] == row.columns["source"][::-1] for row in rows)


def test_without_tensorflow(prepared):
    code = (
        "import sys; from pathlib import Path; from train.tasks.rows import RowFormat, read_rows\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"rows = list(read_rows(Path({spec(prepared, 'validation')!r}), RowFormat(), ['target']))\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(sorted(row.columns['target'] for row in rows))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['nees', 'reven']"


def test_what_is_not_there_is_listed(prepared):
    def read(text, form=COLUMNS, wanted=("text", "label")):
        return list(read_rows(Path(text), form, wanted))

    for text, why in (
        (spec(prepared, ""), "no split ''; its splits are train, validation, unlabelled"),
        (spec(prepared, "dev"), "no split 'dev'"),
        (f"tfds:absent@{prepared}#train", "no prepared dataset 'absent'"),
        ("tfds:#train", "not of the form"),
    ):
        with pytest.raises(ValueError, match=why):
            read(text)
    with pytest.raises(ValueError, match=r"no column 'body'; it has .*'sentence'"):
        read(spec(prepared, "train"), RowFormat((("text", "body"), ("label", "sentiment"))))
    with pytest.raises(ValueError, match="names its columns"):
        read(spec(prepared, "train"), RowFormat(separator=" "))
    (bad,) = read(spec(prepared, "unlabelled"))
    assert (bad.line, bad.reason[:12]) == (1, "the label -1")
    (bad, *_) = read(spec(prepared, "train"), RowFormat(), ("parts",))
    assert "parts is neither text nor a number" in bad.reason
