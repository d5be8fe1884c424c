"""Compiled steps against the textbook, array by array: nothing unexplained."""

import dataclasses
import importlib.util

import pytest

from experiments.plan.compile import Request, traffic_elsewhere
from experiments.plan.step import abstract_step
from experiments.runs.layout import Division
from model.presets import llama_tiny, modern_tiny
from parallel.mesh import make_mesh, parse_mesh
from parallel.traffic import Collective, collectives
from parallel.traffic_formulas import (
    CPU,
    TEXTBOOK,
    TPU,
    Expected,
    expected,
    explain,
    explained_table,
    unexplained,
    volumes,
)
from train.optimizers import AdamW
from train.settings import Phase, Settings, to_json

ROWS, TIME = 16, 32
MODERN = modern_tiny(scan_layers=True, layers=4, heads=8, width=64, vocabulary_size=128)
LLAMA = llama_tiny(
    scan_layers=True, layers=4, heads=8, kv_heads=4, width=64, ffn_width=160, vocabulary_size=128
)


def rows_of(config, text, more=(), parts=None):
    mesh = make_mesh(**{"data": 1, **parse_mesh(text)})
    settings = Settings(phases=(Phase(1, config, ROWS, TIME),), optimizer=AdamW())
    division = Division(more, pipeline_micro_batches=parts)
    compiled = abstract_step(settings, mesh, division).lower().compile()
    v = volumes(config, mesh.shape, rows=ROWS, time=TIME, parts=parts)
    found = collectives(compiled.as_text(), mesh)
    assert all(each.exact for each in found)
    return explain(found, expected(v, more))


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("tensor=8", ("sequence",)),
        ("data=8", ()),
        ("data=8", ("zero1",)),
        ("fsdp=8", ()),
        ("tensor=8", ()),
        ("context=8", ()),
        ("pipeline=4,data=2", ()),
        ("data=2,fsdp=2,tensor=2", ()),
    ],
)
def test_nothing_in_a_compiled_step_is_unexplained(text, more):
    rows = rows_of(MODERN, text, more)
    assert not unexplained(rows), "\n" + explained_table(rows)
    assert sum(row.found > 0 for row in rows if row.bytes) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("text", "more"), [("tensor=4,data=2", ()), ("fsdp=8", ())])
def test_grouped_queries_and_a_gate_are_counted(text, more):
    rows = rows_of(LLAMA, text, more)
    assert not unexplained(rows), "\n" + explained_table(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("tensor=8", ("sequence",)),
        ("data=8", ("zero1",)),
        ("fsdp=8", ()),
        ("data=2,fsdp=2,tensor=2", ()),
    ],
)
def test_a_table_of_pairs_is_whole_on_every_device(text, more):
    rows = rows_of(dataclasses.replace(MODERN, bigram_rows=512, bigram_width=16), text, more)
    assert not unexplained(rows), "\n" + explained_table(rows)


@pytest.mark.slow
def test_more_parts_make_more_hops_of_less():
    rows = rows_of(MODERN, "pipeline=4,data=2", parts=8)
    assert not unexplained(rows), "\n" + explained_table(rows)


def test_what_no_formula_asks_for_is_unexplained():
    found = [
        Collective("all-gather", 2, 64, ("data",), 8, True, "", (64,)),
        Collective("all-reduce", 1, 104, ("data",), 8, True, "", (100, 4)),
    ]
    assert not unexplained(
        explain(
            found,
            [
                Expected("all-gather", ("data",), 2, 64, "a kernel"),
                Expected("all-reduce", ("data",), 1, 100, "its gradient"),
            ],
        )
    )
    wrong = [Expected("all-gather", ("data",), 1, 64, "a kernel")]
    rows = unexplained(explain(found, wrong))
    assert [(row.bytes, row.expected, row.found) for row in rows] == [(64, 1, 2), (100, 0, 1)]
    assert "UNEXPLAINED" in explained_table(rows)


def test_what_is_sent_of_a_row_or_two_is_among_the_single_numbers():
    found = [Collective("collective-permute", 1, 8, ("tensor",), 8, True, "", (8,))]
    formula = Expected("collective-permute", ("tensor",), 1, 8, "the token before")
    assert not unexplained(explain(found, [formula]))


def test_the_textbook_sends_what_the_papers_say():
    """ZeRO-3 sends 1.5 times what data parallelism does; scattered sums send what plain ones do."""

    def sent(sizes, more=(), backend=TEXTBOOK):
        config = MODERN.__class__(**{**vars(MODERN), "qk_norm": False, "norm": "rmsnorm"})
        v = volumes(config, sizes, rows=ROWS, time=TIME)
        made = [
            Collective(e.kind, e.times, e.bytes, e.axes, 8, True, "")
            for e in expected(v, more, backend)
            if "token_embedding" not in e.why and "head" not in e.why and "norm" not in e.why
        ]
        return sum(each.sent for each in made)

    assert sent({"fsdp": 8}) == pytest.approx(1.5 * sent({"data": 8}))
    tokens, without = {"tensor": 8}, ("sequence",)
    extra = sent(tokens) - sent(tokens, without)
    # What is left between them is one sum of the embedded tokens, which sequence takes from a
    # gathered table, and the loss is the same in both.
    assert extra == pytest.approx(2 * 7 / 8 * ROWS * TIME * MODERN.width * 4)
    assert sent({"fsdp": 8}, backend=CPU) > sent({"fsdp": 8})


def test_gpipe_sums_its_gradients_once_and_xla_on_a_cpu_at_every_step():
    """Textbook and TPU: each kernel of a stage once; CPU: M v + n - 1 times."""
    for parts, rounds, steps in ((4, 1, 7), (8, 1, 11), (4, 4, 19)):
        sizes = {"data": 2, "pipeline": 4}
        config = modern_tiny(layers=16, width=64, heads=8)
        v = volumes(config, sizes, rows=ROWS, time=TIME, parts=parts, rounds=rounds)
        assert v.steps == steps
        assert v.blocks == steps * 4 // rounds

        def sums(backend, v=v):
            rows = [e for e in expected(v, (), backend) if e.why == "gradient of mlp/up"]
            return sum(e.times for e in rows)

        assert sums(TEXTBOOK) == sums(TPU) == 4
        assert sums(CPU) == v.blocks
        hops = [e.times for e in expected(v) if "to the next stage" in e.why]
        assert hops == [2 * steps]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the compiler for TPUs: pip install -c constraints.txt -e '.[tpu-plan]'",
)
@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("data=8", ()),
        ("data=8", ("zero1",)),
        ("data=1,fsdp=8", ()),
        ("data=1,tensor=8", ()),
        ("data=1,tensor=8", ("sequence",)),
    ],
)
def test_the_compiler_for_tpus_has_real_reduce_scatters(text, more):
    """At widths that fill its tiles; narrower ones it pads, or sums whole and cuts."""
    config = modern_tiny(
        scan_layers=True, layers=4, heads=8, width=512, vocabulary_size=1024, dtype="bfloat16"
    )
    settings = Settings(phases=(Phase(1, config, 16, 128),), optimizer=AdamW())
    found = traffic_elsewhere(Request(to_json(settings), "v5e", text, more), 600)
    v = volumes(config, parse_mesh(text), rows=16, time=128)
    rows = explain(found, expected(v, more, TPU))
    assert not unexplained(rows), "\n" + explained_table(rows)
    scatters = any(row.kind == "reduce-scatter" for row in rows)
    assert scatters == (text == "data=1,fsdp=8" or bool(more))
