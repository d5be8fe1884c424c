"""Bad input from the command line: one sentence, exit status 2, and nothing is lost.

Each case says what was given and what would fit. A first start that is refused leaves nothing that
the corrected command would meet; a run that is there stays as it is.
"""

import gzip
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import compare, convert, evaluate, generate, pretrain
from experiments.cli import run_main
from experiments.runs.run import open_run
from model.presets import PRESETS
from train.optimizers import OPTIMIZERS
from train.schedules import SCHEDULES

TINY = {
    "--data": "text.txt",
    "--tokenizer": "bytes",
    "--model": "gpt2_tiny",
    "--optimizer": "sgd",
    "--steps": "4",
    "--batch-size": "2",
    "--sequence-length": "16",
    "--checkpoint-every": "2",
    "--out": "run",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all: what it holds is named by content, and the same step is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """A working folder with text and with files that are no text."""
    monkeypatch.setenv("ACCELERANDO_CACHE", str(cache))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_text(folder / "text.txt")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 400)
    (folder / "no_field.jsonl").write_text('{"content": "x"}\n')
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text\n')
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"hello " * 500)[:-12])
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "no_text").mkdir()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """A run of four steps with checkpoints of the last two, made once."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(cache))
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pretrain", *flags()])
        assert pretrain.main() == 0
    return folder / "run"


@pytest.fixture
def run(trained, here):
    shutil.copytree(trained, here / "run")
    return here / "run"


@pytest.fixture
def call(here, monkeypatch, capsys):
    """Runs a command as `python -m` does, and returns its exit status and what it printed."""

    def command(module, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_main(module.main)
        printed = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, out=printed.out, err=printed.err)

    return command


def write_text(path):
    draw = np.random.default_rng(0)
    path.write_text(" ".join(["abcd", "efgh", "ijkl"][i] for i in draw.integers(0, 3, 400)))


def flags(changes=()):
    return [word for pair in {**TINY, **dict(changes)}.items() if pair[1] for word in pair]


def refused(result, *words):
    assert result.code == 2, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert not result.out
    for word in words:
        assert word in result.err


FIRST_START = {
    "missing file": ({"--data": "nowhere.txt"}, "'nowhere.txt'", "no such file", "text.txt"),
    "empty file": ({"--data": "empty.txt"}, "empty.txt is empty"),
    "file shorter than a window": ({"--data": "short.txt"}, "short.txt has 4 tokens", "of 16 and"),
    "undecodable bytes": ({"--data": "latin.txt"}, "latin.txt", "0xe9 at offset 3", "iconv"),
    "folder without text": ({"--data": "no_text"}, "no_text", ".jsonl"),
    "unknown field": ({"--data": "no_field.jsonl"}, "no field 'text'", "'content'", "PATH#FIELD"),
    "broken line": ({"--data": "broken.jsonl"}, "broken.jsonl, line 2"),
    "cut gzip": ({"--data": "cut.txt.gz"}, "cut.txt.gz is not an intact gzip file"),
    "odd shard": ({"--data": "odd.bin"}, "odd.bin has 3 bytes"),
    "weight of nothing": ({"--data": "0*text.txt"}, "'0*text.txt'", "positive"),
    "unknown preset": ({"--model": "gpt3"}, "'gpt3'", *PRESETS),
    "unknown optimizer": ({"--optimizer": "adamm"}, "'adamm'", *OPTIMIZERS),
    "unknown schedule": ({"--schedule": "cosin"}, "'cosin'", *SCHEDULES),
    "unknown tokenizer": ({"--tokenizer": "nope"}, "'nope'", "bytes; gpt2:FOLDER; sentencepiece:N"),
    "too many pieces": ({"--tokenizer": "sentencepiece:9999"}, "=9999 is more", "or fewer"),
    "too few pieces": ({"--tokenizer": "sentencepiece:9"}, "=9 leaves no room", "512 or more"),
    "more tokens than positions": (
        {"--sequence-length": "64"},
        "64 tokens",
        "32 learned positions",
    ),
    "batch does not divide": ({"--micro-batches": "3"}, "batch_size 2", "a multiple of 3"),
    "no micro-batches": ({"--micro-batches": "0"}, "micro_batches is 0", "at least 1"),
    "no steps": ({"--steps": "0"}, "steps is 0", "at least 1"),
    "no epochs": ({"--epochs": "0"}, "epochs is 0", "at least 1"),
    "no batch": ({"--batch-size": "0"}, "batch_size is 0", "at least 1"),
    "negative seed": ({"--seed": "-1"}, "seed is -1", "at least 0"),
    "negative rate": ({"--learning-rate": "-1"}, "learning_rate", "not -1.0"),
    "warm-up beyond the end": (
        {"--schedule": "cosine", "--schedule.warmup-steps": "9"},
        "warmup_steps",
        "not 9",
    ),
    "too much smoothing": ({"--label-smoothing": "2"}, "label_smoothing is 2.0", "below 1"),
    "negative z-loss": ({"--z-loss": "-1"}, "z_loss is -1.0", "at least 0"),
    "empty chunk": ({"--loss-chunk": "0"}, "loss_chunk is 0", "at least 1"),
    "profile of words": ({"--profile": "x"}, "'x'", "as in 20:22"),
    "profile backwards": ({"--profile": "3:2"}, "from step 3 to 2"),
    "profile past the end": ({"--profile": "5:6"}, "step 5", "has 4"),
    "no parent": ({"--from": "nowhere", "--model": "", "--tokenizer": ""}, "nowhere is no run"),
    "folder that is a file": ({"--out": "text.txt"}, "Not a directory: ", "text.txt"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in FIRST_START.items()]
)
def test_a_first_start_is_refused_and_blocks_nothing(case, here, call):
    changes, *words = case
    refused(call(pretrain, *flags(changes)), *words)
    left = [path.name for path in (here / "run").glob("*")]
    assert left in ([], ["checkpoints"])
    assert not list((here / "run").glob("checkpoints/[0-9]*"))


@pytest.mark.slow
def test_the_corrected_command_works_and_takes_nothing_from_the_wrong_one(here, call):
    """The wrong one got as far as a tokenizer; the run must have its own."""
    refused(call(pretrain, *flags({"--data": "latin.txt"})))
    refused(call(pretrain, *flags({"--schedule": "linear", "--schedule.warmup-steps": "9"})))
    one = {"--steps": "1", "--tokenizer": "sentencepiece:280"}
    assert call(pretrain, *flags(one)).code == 0
    assert open_run("run").tokenizer.vocabulary_size == 280


@pytest.mark.parametrize(
    ("mistyped", "words"),
    {
        ("--batch-sizes", "3"): ["--batch-sizes", "--batch-size INT"],
        ("--optimizer.b9", "3"): ["--optimizer.b9"],
        ("--steps", "many"): ["--steps", "'many'"],
        ("--document-boundaries", "maybe"): ["'maybe'", "ignore", "mask"],
        ("--model",): ["--model needs a name", "gpt2_tiny"],
    }.items(),
)
def test_mistyped_flags_are_named(mistyped, words, here, call):
    result = call(pretrain, *flags(), *mistyped)
    assert result.code == 2
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert not (here / "run").exists()


def test_another_runs_folder_is_refused_by_the_fields_that_differ(run, call):
    before = sorted(path.name for path in run.rglob("*"))
    result = call(pretrain, *flags({"--seed": "4", "--steps": "6"}))
    assert result.code == 2
    assert result.err.splitlines()[1:] == ["  phases.0.steps: 6, not 4", "  seed: 4, not 0"]
    assert sorted(path.name for path in run.rglob("*")) == before


def damage(run, step, how, part="params"):
    files = (run / "checkpoints" / str(step) / f"part.{part}").rglob("*")
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-7] if how == "cut" else content)
    return path.name


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, run, call, monkeypatch):
    name = damage(run, 4, how)
    result = call(generate, "--run", "run", "--prompt", "ab", "--max-new-tokens", "2")
    assert result.code == 0
    assert result.out.startswith("ab")
    assert "checkpoint of step 4 is damaged" in result.err
    assert name in result.err
    refused(call(generate, "--run", "run", "--step", "4"), "step 4", name)

    damage(run, 2, how)
    refused(call(generate, "--run", "run"), "no intact checkpoint", "step 4", "step 2", name)
    result = call(pretrain, *flags())
    assert result.code == 2
    assert "no intact checkpoint" in result.err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "lock"]


@pytest.mark.slow
def test_training_goes_on_from_the_newest_intact_checkpoint(run, call):
    before = open_run(run).params
    name = damage(run, 4, "changed")
    result = call(pretrain, *flags())
    assert result.code == 0
    assert "checkpoint of step 4 is damaged" in result.out
    assert name in result.out.replace("\n", "")
    assert "Going on from step 2 of 4" in result.out
    np.testing.assert_array_equal(
        open_run(run).params["final_norm"]["scale"], before["final_norm"]["scale"]
    )


def test_a_full_disk_keeps_the_checkpoint_before(here, call, monkeypatch):
    """The second save fails; the run ends with a sentence and goes on later from the first."""
    import train.checkpoints

    real, calls = train.checkpoints.write_manifest, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoints, "write_manifest", full)
        result = call(pretrain, *flags())
    assert result.code == 2
    assert result.err.startswith("error: checkpoint of step 4 in ")
    assert "the disk is full. Whatever was there before is intact" in result.err
    assert "Traceback" not in result.err
    assert sorted(path.name for path in (here / "run/checkpoints").iterdir()) == ["2", "lock"]
    assert open_run("run").step == 2
    result = call(pretrain, *flags())
    assert result.code == 0
    assert "Going on from step 2 of 4" in result.out
    assert open_run("run").step == 4


RUN_FILES = {
    "settings.json": (generate, ["--run", "run"], "settings.json is damaged"),
    "tokenizer/kind.json": (generate, ["--run", "run"], "kind.json is not a tokenizer's record"),
    "result.json": (pretrain, flags(), "result.json is damaged"),
    "data.json": (pretrain, flags(), "data.json is damaged"),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_file_of_a_run_is_named(name, run, call):
    module, arguments, words = RUN_FILES[name]
    (run / name).write_text("{")
    result = call(module, *arguments)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_settings_of_another_version_are_refused_by_name(run, call):
    fields = json.loads((run / "settings.json").read_text())
    fields["phases"][0]["colour"] = "red"
    (run / "settings.json").write_text(json.dumps(fields))
    refused(call(generate, "--run", "run"), "settings.json", "colour", "version")


OPEN_RUN = {
    "no run": (generate, "--run nowhere", "nowhere is no run"),
    "no such step": (generate, "--run run --step 3", "no checkpoint of step 3", "[2, 4]"),
    "cold": (generate, "--run run --temperature -1", "temperature is -1.0", "0 (greedy) or more"),
    "top-p": (generate, "--run run --top-p 2", "top_p is 2.0", "at most 1"),
    "no samples": (generate, "--run run --samples 0", "samples is 0", "at least 1"),
    "long prompt": (generate, f"--run run --prompt {'a' * 32}", "has 32 tokens", "at most 31"),
    "no data": (evaluate, "--run run --data nowhere", "no source 'nowhere'"),
    "protocol": (evaluate, "--run run --protocol x:3", "'x:3'", "windows:N or stride:N"),
    "long windows": (evaluate, "--run run --protocol windows:64", "64 tokens", "32 learned"),
    "long stride": (evaluate, "--run run --protocol stride:64", "stride 64", "sequence_length 16"),
    "no test split": (evaluate, "--run run --split test", "text.txt has no test split"),
    "nothing to compare": (compare, "run nowhere", "nowhere is no run"),
    "parent's step": (pretrain, "--from run@3 --out new", "no checkpoint of step 3", "[2, 4]"),
    "parent's model": (pretrain, "--from run --model llama_tiny --out new", "leave --model out"),
    "parent's pieces": (pretrain, "--from run --tokenizer bytes --out new", "tokenizer; leave it"),
    "parent's positions": (
        pretrain,
        "--from run --sequence-length 64 --out new",
        "32 learned positions",
    ),
}


@pytest.mark.parametrize("case", OPEN_RUN.values(), ids=OPEN_RUN)
def test_what_a_run_cannot_do_is_refused(case, run, call, here):
    module, arguments, *words = case
    refused(call(module, *arguments.split()), *words)
    assert not (here / "new").exists()


def test_more_tokens_than_positions_are_cut_short(run, call):
    result = call(generate, "--run", "run", "--prompt", "ab", "--max-new-tokens", "500")
    assert result.code == 0
    assert result.out.startswith("ab")


def test_hugging_face_folders_of_other_kinds_are_refused(here, call):
    folder = here / "theirs"
    folder.mkdir()
    command = ["--hf", "theirs", "--out", "new", "--tokenizer", "bytes"]
    refused(call(convert, *command), "theirs holds neither model.safetensors", "nothing")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(call(convert, *command), "pickled (pytorch_model.bin)", "save_pretrained")
    save_file({"a": np.zeros(3, np.float32)}, folder / "model.safetensors")
    refused(call(convert, *command), "theirs/config.json: model_type 'bert'", "gpt2, llama")
    (folder / "model.safetensors").write_bytes(b"x")
    refused(call(convert, *command), "model.safetensors is not an intact safetensors file")
    refused(call(convert, "--hf", "text.txt", *command[2:]), "text.txt is not a folder")
    assert not (here / "new").exists()


def test_a_folder_with_files_of_somebody_elses_is_left_alone(here, call):
    (here / "run" / "tokenizer").mkdir(parents=True)
    (here / "run" / "data.json").write_text("[1, 2]")
    refused(call(pretrain, *flags()), "run is no run but holds data.json, tokenizer")
    assert (here / "run" / "data.json").read_text() == "[1, 2]"
    assert (here / "run" / "tokenizer").is_dir()
