"""Every form of a step through the compiler of TPUs, where it is installed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.methods.parallel import CompressedReduce, Delayed, Diloco
from experiments.plan.command import (
    MODELS,
)
from experiments.plan.compile import (
    FITS,
    NO_MEMORY,
    Request,
    child_environment,
    compile_elsewhere,
)
from experiments.plan.search import estimate
from experiments.runs.layout import Division
from model.presets import modern_tiny
from parallel.chips import chip_named
from parallel.mesh import AXES
from train.optimizers import AdamW
from train.settings import Phase, Settings, to_json

ONE = dict.fromkeys(AXES, 1)
TINY = modern_tiny(scan_layers=True, layers=4, heads=8, width=64, vocabulary_size=128)


def settings_for(config, rows=16, time=32, **more):
    return Settings(phases=(Phase(1, config, rows, time),), optimizer=AdamW(), **more)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the compiler for TPUs: pip install -c constraints.txt -e '.[tpu-plan]'",
)

FORMS = [
    ("data=8", (), ()),
    ("data=8", ("zero1",), ()),
    ("data=1,fsdp=8", (), ()),
    ("data=1,tensor=8", (), ()),
    ("data=1,tensor=8", ("sequence",), ()),
    ("data=1,context=8", (), ()),
    ("data=2,pipeline=4", (), ()),
    ("data=2,fsdp=2,tensor=2", ("sequence",), ()),
    ("fsdp=2,context=2,tensor=2,data=1", (), ()),
    ("data=2,pipeline=2,tensor=2", (), ()),
    ("data=2,pipeline=2,context=2", (), ()),
    ("data=2,pipeline=4", (), Division((), 4, 2)),
    ("data=8", (), CompressedReduce("none")),
    ("data=8", (), CompressedReduce("int8")),
    ("data=8", (), CompressedReduce("top_k")),
    ("data=8", (), CompressedReduce("powersgd")),
    ("data=8", (), Diloco(every=2)),
    ("data=8", (), Delayed(steps=2)),
]
"""Mesh, strategies, and the passes of a pipeline or a method."""


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "strategies", "more"), FORMS)
def test_every_mesh_form_compiles_for_a_tpu(mesh, strategies, more):
    passes = more if isinstance(more, Division) else Division()
    methods = (more,) if more and passes is not more else ()
    config = dataclasses.replace(TINY, layers=8) if passes.pipeline_rounds > 1 else TINY
    request = Request(
        to_json(settings_for(config, methods=methods)),
        "v5e",
        mesh,
        strategies,
        pipeline_micro_batches=passes.pipeline_micro_batches,
        pipeline_rounds=passes.pipeline_rounds,
    )
    result = compile_elsewhere(request, 600)
    assert result.verdict == FITS, result.message
    assert result.collectives


@needs_libtpu
@pytest.mark.slow
def test_every_shard_map_path_compiles_for_a_tpu():
    child = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "tpu_programs.py"), "v5e", "8"],
        env=child_environment(chip_named("v5e")),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert set(found.values()) == {""}, found
    assert len(found) == 5


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_says_itself_what_is_too_much():
    config = MODELS["llama3-8b"](dtype="bfloat16", scan_layers=True, remat="full")
    settings = settings_for(config, 8, 1024, vocabulary_multiple=128)
    result = compile_elsewhere(Request(to_json(settings), "v5e", "data=8"), 900)
    assert result.verdict == NO_MEMORY, result.message
    assert (
        estimate(settings, ONE | {"data": 8}, Division(), chip_named("v5e")).memory.total
        > 16 * 2**30
    )
