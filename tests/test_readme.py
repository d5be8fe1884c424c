"""The README says what the result files say."""

import dataclasses
import shlex

import pytest

from experiments import pretrain
from experiments.ladder.climb import job_of
from experiments.ladder.rungs import RUNGS
from experiments.ladder.scales import SCALES
from experiments.ladder.turns import settings_of
from experiments.readme import ROOT, filled

RECIPE = [rung.name for rung in RUNGS if rung.kept][-1]


def test_the_figures_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text, "run: python -m experiments.readme"
    assert "](experiments/results/demo.png)" in text
    assert (ROOT / "experiments" / "results" / "demo.png").exists()


def test_every_command_is_named():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| for | `NAME` |") :].partition("\n\n")[0]
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py") if _is_command(path)}
    commands |= {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py")}
    assert not {name for name in commands if f"`{name}`" not in table}


def test_the_recipe_as_a_command_is_that_of_the_ladder():
    text = (ROOT / "README.md").read_text()
    (command,) = (block for block in text.split("```") if "--out runs/recipe" in block)
    words = shlex.split(command.replace("\\\n", "").replace("FILE", "stdlib"))
    said, _ = pretrain.settings_of(*pretrain.parsed(words[3:]))
    scale = SCALES["cpu"]
    job = job_of(scale, RECIPE, said.steps * scale.choices.muon_rows * scale.length, said.seed)
    run = settings_of(job)
    rate = run.optimizer.learning_rate  # a product of two choices, which no decimal equals
    assert said.optimizer.learning_rate == pytest.approx(rate, rel=1e-12)
    rounded = dataclasses.replace(said.optimizer, learning_rate=rate)
    assert dataclasses.replace(said, optimizer=rounded) == run


def _is_command(path):
    return "__main__" in path.read_text()


def test_blocks_and_functions_belong_together():
    text = (ROOT / "README.md").read_text()
    stale = text.replace("M parameters write", "M parameters sing")
    assert filled(stale) == text
    with pytest.raises(ValueError, match="blocks"):
        filled(text.replace("<!-- loop -->", "<!-- lop -->"))
    with pytest.raises(ValueError, match="does not end with <!-- /loop -->"):
        filled(text.replace("<!-- /loop -->", ""))
