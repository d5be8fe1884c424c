"""What is refused before anything expensive, and that the numbers are named."""

import pytest
from jax.sharding import PartitionSpec as P

from model.flops import abstract_params
from model.presets import gpt2, gpt2_tiny, llama_tiny
from parallel.mesh import make_mesh
from parallel.placement_checks import check_placement
from parallel.placement_strategies import sequence, strategies_for


def check(mesh, config, more=(), **arguments):
    mesh = make_mesh(**mesh)
    arguments = {"rows": 8, "time": 16} | arguments
    strategies = arguments.pop("strategies", None)
    if strategies is None:
        strategies = strategies_for(mesh, abstract_params(config), more)
    check_placement(mesh, config, strategies, **arguments)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 1, "fsdp": 8},
        {"tensor": 4},
        {"data": 2, "context": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"pipeline": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_what_fits_is_let_through(mesh):
    check(mesh, gpt2_tiny(), ("sequence",) if mesh.get("tensor", 1) > 1 else ())


@pytest.mark.parametrize(
    ("mesh", "config", "arguments", "message"),
    [
        ({"tensor": 8}, gpt2_tiny(), {}, "4 heads do not divide over tensor=8; .* 1, 2 or 4"),
        (
            {"tensor": 4},
            llama_tiny(),
            {},
            "2 key/value heads do not divide over tensor=4; for 4 heads and 2 .* can be 1 or 2",
        ),
        (
            {"pipeline": 4},
            gpt2_tiny(layers=6),
            {},
            "6 layers do not divide over pipeline=4; pipeline can be 1, 2, 3 or 6",
        ),
        (
            {"tensor": 4},
            gpt2_tiny(ffn_width=130),
            {},
            "width of 130 does not divide over tensor=4; the next that does is 132",
        ),
        (
            {"tensor": 4},
            gpt2(),
            {},
            "vocabulary of 50257 .* tensor=4; .* 50260 .*--vocabulary-multiple 4",
        ),
        (
            {"data": 1, "fsdp": 8},
            gpt2_tiny(vocabulary_size=257),
            {},
            "has 257 along axis 0, which fsdp=8 does not .*with --vocabulary-multiple 8",
        ),
        (
            {"data": 4, "fsdp": 2},
            gpt2_tiny(),
            {"rows": 12},
            r"12 rows does not divide over data=4 \* fsdp=2 = 8; .* of 8, for instance 16",
        ),
        (
            {"data": 8},
            gpt2_tiny(),
            {"rows": 16, "micro_batches": 4},
            "16 rows in 4 micro-batches does not divide .* multiple of 32, for instance 32",
        ),
        (
            {"context": 8},
            gpt2_tiny(),
            {"time": 20},
            "rows of 20 tokens do not divide over context=8 = 8; .* for instance 24",
        ),
        (
            {"fsdp": 2, "data": 4},
            gpt2_tiny(),
            {"strategies": []},
            r"fsdp=2 divides no parameter \(strategies: none\).* set fsdp=1 and data=8",
        ),
        (
            {"data": 8},
            gpt2_tiny(),
            {"rules": [("no/such", P())]},
            "no parameter matches 'no/such'",
        ),
    ],
)
def test_what_does_not_fit(mesh, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        check(mesh, config, **arguments)


@pytest.mark.parametrize(
    ("mesh", "more", "without"),
    [
        ({"data": 8}, "sequence", "tensor=1"),
        ({"data": 8}, "fsdp", "fsdp=1"),
        ({"data": 8}, "pipeline", "pipeline=1"),
        ({"data": 1, "fsdp": 8}, "zero1", "data=1"),
    ],
)
def test_a_strategy_without_an_axis_is_refused(mesh, more, without):
    with pytest.raises(ValueError, match=f"{more!r} has no effect on a mesh with {without}"):
        check(mesh, gpt2_tiny(vocabulary_size=256), (more,))


def test_sequence_parallel_norms_divide_time_too():
    mesh = {"data": 2, "tensor": 4}
    check(mesh, gpt2_tiny(), ("sequence",), time=16)
    check(mesh, gpt2_tiny(), (), time=18)
    with pytest.raises(ValueError, match=r"18 tokens .* context=1 \* tensor=4 = 4"):
        check(mesh, gpt2_tiny(), ("sequence",), time=18)


def test_sequence_alone_does_not_use_the_axis():
    with pytest.raises(ValueError, match=r"tensor=2 divides no parameter \(strategies: sequence"):
        check({"tensor": 2}, gpt2_tiny(), strategies=[sequence({})])


def test_a_padded_vocabulary_fits():
    check({"tensor": 4}, gpt2(), vocabulary_multiple=4)
