"""Command lines: names pick settings, fields are flags, mistakes are one sentence."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from experiments.cli import parse, run_main
from model.generate import Sampling
from train.optimizers import OPTIMIZERS
from train.schedules import SCHEDULES, Cosine


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
      sampling: how.
      optimizer: which.
      steps: how many.
      from_run: whence.
    """

    sampling: Sampling
    optimizer: Any
    steps: int = 10
    from_run: str | None = None


SAMPLINGS = {"plain": Sampling, "greedy": lambda: Sampling(0.0)}
GROUPS = {"sampling": ("plain", SAMPLINGS), "optimizer": ("adam", OPTIMIZERS)}


def command(text=""):
    return parse(Command, GROUPS, text.split(), "What it does.")


def test_defaults_names_and_fields():
    assert command() == Command(Sampling(), OPTIMIZERS["adam"]())
    found = command("--steps 3 --optimizer adamw --optimizer.b2 0.95 --sampling=greedy")
    expected = dataclasses.replace(OPTIMIZERS["adamw"](), b2=0.95)
    assert found == Command(Sampling(0.0), expected, steps=3)


def test_a_field_may_come_before_the_name_it_belongs_to():
    assert command("--sampling.top-k 5 --sampling greedy").sampling == Sampling(0.0, top_k=5)


@pytest.mark.parametrize("text", ["--from runs/a@3", "--from=runs/a@3", "--from-run runs/a@3"])
def test_from_is_a_flag_though_python_keeps_the_word(text):
    assert command(text).from_run == "runs/a@3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--sampling cold", "no sampling is called 'cold'; there are plain, greedy"),
        ("--optimizer=adamm", "no optimizer is called 'adamm'; there are .*adam, .*muon"),
        ("--steps 3 --sampling", "--sampling needs a name: plain, greedy"),
    ],
)
def test_mistakes_in_names_and_values_are_explained(text, says):
    with pytest.raises(ValueError, match=says):
        command(text)


@pytest.mark.parametrize(
    "text", ["--stepz 3", "--steps many", "--optimizer.b9 1", "--sampling.top-k 0"]
)
def test_unknown_flags_and_values_of_another_kind_are_refused(text, capsys):
    with pytest.raises(SystemExit) as left:
        command(text)
    assert left.value.code == 2
    assert (
        text.split()[0].rpartition(".")[2].strip("-").replace("-", "_") in capsys.readouterr().err
    )


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as left:
        command("--help")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for text in ("What it does.", "--steps", "how many", "--from-run", "plain, greedy", "muon"):
        assert text in shown


def test_every_schedule_can_be_named():
    @dataclass(frozen=True)
    class Schedule:
        schedule: Any

    for name, kind in SCHEDULES.items():
        found = parse(Schedule, {"schedule": ("cosine", SCHEDULES)}, ["--schedule", name])
        assert found.schedule == kind()
    assert parse(Schedule, {"schedule": ("cosine", SCHEDULES)}, []).schedule == Cosine()


@pytest.mark.parametrize("code", [None, 0, 3, 143])
def test_a_command_leaves_with_the_status_of_its_main(code):
    with pytest.raises(SystemExit) as left:
        run_main(lambda: code)
    assert left.value.code == (code or 0)


@pytest.mark.parametrize(
    "error", [ValueError, FileNotFoundError, PermissionError, BlockingIOError, ImportError]
)
def test_an_error_of_the_user_is_one_sentence_and_status_2(error, capsys):
    def main():
        raise error("no such thing; give another")

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; give another\n"


@pytest.mark.parametrize(("note", "says"), [("goes on", "goes on"), ("", "nothing more was saved")])
def test_an_interrupt_is_one_sentence_and_status_130(note, says, capsys):
    def main():
        raise KeyboardInterrupt(*([note] if note else []))

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 130
    assert capsys.readouterr().err == f"interrupted: {says}\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(AssertionError):
        run_main(lambda: (_ for _ in ()).throw(AssertionError("a bug")))
