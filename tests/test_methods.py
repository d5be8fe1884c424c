"""Methods: what is frozen stays, is saved once, vouched for, and comes back with the run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments.cli import parse_with_methods
from experiments.methods.table import METHODS, Freeze
from experiments.pretrain import Pretrain, settings_of
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run, read_settings
from model.flops import abstract_params
from model.presets import PRESETS, gpt2_tiny
from train.loop import LoopSettings
from train.manifest import read_manifest
from train.methods import FrozenTree, Plugs, Setup, combine
from train.optimizers import OPTIMIZERS, AdamW
from train.plugs import merge
from train.schedules import SCHEDULES, Linear
from train.settings import Phase, Settings, from_json, to_json

QUIET = Execution(LoopSettings(log_every=1, checkpoint_every=3), progress=False)
FREEZE = Freeze(rules=("token_embedding", "blocks/mlp"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return Settings(
        phases=(Phase(6, gpt2_tiny(dropout=0.0), batch_size=4, sequence_length=16),),
        data=(str(path),),
        tokenizer="bytes",
        optimizer=AdamW(),
        schedule=Linear(),
        methods=(FREEZE,),
    )


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_what_is_frozen_stays_and_the_rest_trains(tmp_path, settings):
    outcome = execute(settings, tmp_path / "run", QUIET)
    assert set(outcome.state.params) == {"position_embedding", "blocks", "final_norm"}
    assert set(outcome.state.params["blocks"]) == {"attention", "attention_norm", "mlp_norm"}
    moments = jax.tree_util.tree_leaves_with_path(outcome.state.optimizer)
    assert not [path for path, _ in moments if "token_embedding" in jax.tree_util.keystr(path)]
    start, end = (
        leaves(open_run(tmp_path / "run", step).params)
        for step in (3, 6)  # two checkpoints
    )
    for path in start:
        frozen = "token_embedding" in path or "'mlp'" in path
        # A key bias has no gradient: it shifts all scores of a query alike.
        if "['k']['bias']" not in path:
            assert np.array_equal(start[path], end[path]) == frozen, path


def test_it_is_saved_once_and_resumes_bitwise(tmp_path, settings):
    whole = execute(settings, tmp_path / "whole", QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "6")
    (tmp_path / "halves" / "result.json").unlink()
    halves = execute(settings, tmp_path / "halves", QUIET)
    for path, leaf in leaves(whole.state.params).items():
        assert np.array_equal(leaf, leaves(halves.state.params)[path]), path
    saved = read_manifest(tmp_path / "whole/checkpoints/6")
    assert not [name for name in saved["leaves"] if "token_embedding" in name]
    frozen = read_manifest(tmp_path / "whole/frozen")
    assert "params/token_embedding/embedding" in frozen["leaves"]
    assert saved["info"]["frozen"] == frozen["hash"]


def test_another_runs_frozen_tree_is_refused(tmp_path, settings):
    execute(settings, tmp_path / "a", QUIET)
    execute(dataclasses.replace(settings, seed=1), tmp_path / "b", QUIET)
    shutil.rmtree(tmp_path / "a" / "frozen")
    shutil.copytree(tmp_path / "b" / "frozen", tmp_path / "a" / "frozen")
    with pytest.raises(ValueError, match="put the folder back"):
        open_run(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "frozen")
    with pytest.raises(FileNotFoundError, match="no tree"):
        open_run(tmp_path / "a")


def test_changed_data_is_refused_on_resume(tmp_path, settings):
    execute(settings, tmp_path / "run", QUIET)
    with open(settings.data[0], "a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"(?s)data has changed.*source 1.sha256"):
        execute(settings, tmp_path / "run", QUIET)


def test_methods_survive_json_and_are_part_of_the_identity(tmp_path, settings):
    again = from_json(json.loads(json.dumps(to_json(settings))), METHODS)
    assert again == settings
    with pytest.raises(ValueError, match="no method 'freeze'; there are none"):
        from_json(to_json(settings))
    execute(settings, tmp_path / "run", QUIET)
    assert read_settings(tmp_path / "run") == settings
    with pytest.raises(ValueError, match=r"methods"):
        execute(dataclasses.replace(settings, methods=()), tmp_path / "run", QUIET)


def test_rules_are_checked(settings):
    setup = Setup(gpt2_tiny(), abstract_params(gpt2_tiny()), 10)
    with pytest.raises(ValueError, match="no parameter matches 'nothing'"):
        Freeze(rules=("nothing",)).build(setup)
    with pytest.raises(ValueError, match="each method can be given once, not freeze, freeze"):
        dataclasses.replace(settings, methods=(FREEZE, FREEZE))


def test_freezing_everything_is_refused(tmp_path, settings):
    all_of_it = dataclasses.replace(settings, methods=(Freeze(rules=(".*",)),))
    with pytest.raises(ValueError, match="nothing is left that trains"):
        execute(all_of_it, tmp_path / "run", QUIET)


def test_plugs_combine_in_order():
    doubled = Plugs(terms=lambda terms: terms * 2, split=lambda p: ({"a": p["a"]}, {"b": p["b"]}))
    more = Plugs(
        terms=lambda terms: (*terms, "more"),
        split=lambda p: ({}, p),
        frozen={"teacher": FrozenTree({}, dict)},
    )
    both = combine([doubled, more])
    assert both.terms(("term",)) == ("term", "term", "more")
    params = {"a": 1, "b": 2}
    trained, fixed = both.split(params)
    assert merge(trained, fixed) == params
    assert trained == {}
    with pytest.raises(ValueError, match="names of their own"):
        combine([more, more])
    own = Plugs(gradient=lambda *args: None)
    with pytest.raises(ValueError, match="2 methods bring a gradient function"):
        combine([own, own])


def test_a_command_names_methods():
    groups = {
        "model": ("gpt2_tiny", PRESETS),
        "optimizer": ("adam", OPTIMIZERS),
        "schedule": ("linear", SCHEDULES),
    }
    words = ["--method", "freeze", "--steps", "7", "--sequence-length", "16"]
    words += ["--freeze.rules", "head", "blocks/mlp"]
    command, methods = parse_with_methods(Pretrain, groups, METHODS, words)
    assert methods == (Freeze(rules=("head", "blocks/mlp")),)
    assert (command.steps, settings_of(command, methods)[0].methods) == (7, methods)
    assert parse_with_methods(Pretrain, groups, METHODS, [])[1] == ()
    with pytest.raises(ValueError, match="no method is called 'frieze'; there are freeze"):
        parse_with_methods(Pretrain, groups, METHODS, ["--method=frieze"])
    with pytest.raises(ValueError, match=r"--prune\.sparsity is of the method prune; add --method"):
        parse_with_methods(Pretrain, groups, METHODS, ["--prune.sparsity", "0.5"])
    with pytest.raises(ValueError, match="given twice"):
        parse_with_methods(Pretrain, groups, METHODS, ["--method=freeze", "--method", "freeze"])
