"""Meshes: sizes, order of the axes, several slices, and what a wrong one is told."""

import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from parallel.mesh import AXES, arrange, axis_sizes, make_mesh, parse_mesh


@dataclass(frozen=True)
class FakeDevice:
    """A device of a machine that is not at hand; slices are what the layout looks at."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"
    process_index: int = 0


def slices_of(sizes):
    """Devices of slices of these sizes, in an order that mixes the slices."""
    devices = [
        FakeDevice(i, s)
        for s, n in enumerate(sizes)
        for i in range(sum(sizes[:s]), sum(sizes[:s]) + n)
    ]
    return devices[::2] + devices[1::2]


def test_every_axis_is_auto_and_all_devices_are_used():
    mesh = make_mesh(data=2, tensor=4)
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.shape["data"] == 2
    assert mesh.shape["tensor"] == 4
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"data": 8}),
        ({"data": 1, "fsdp": -1}, {"fsdp": 8}),
        ({"tensor": 4}, {"data": 2, "tensor": 4}),
        ({"data": 2, "context": 2, "pipeline": -1}, {"data": 2, "context": 2, "pipeline": 2}),
    ],
)
def test_one_axis_takes_what_is_left(asked, expected):
    assert dict(make_mesh(**asked).shape) == {name: expected.get(name, 1) for name in AXES}


def test_tensor_neighbours_are_device_neighbours():
    """And the data axis strides over everything else."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 2, 2)
    assert ids[0, 0].tolist() == [0, 1]
    assert ids[:, 0, 0].tolist() == [0, 4]


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        ({"data": 2, "tensor": 4}, [4, 4]),
        ({"data": 4, "tensor": 2}, [2, 2, 2, 2]),
        ({"data": 4, "tensor": 2}, [4, 4]),
        ({"fsdp": 4, "tensor": 2}, [4, 4]),
        ({"data": 3, "fsdp": 2, "context": 2}, [2] * 6),
        ({"pipeline": 2, "context": 2, "tensor": 2}, [4, 4]),
    ],
)
def test_tensor_and_context_stay_inside_a_slice(sizes, slices):
    sizes = axis_sizes(sizes, sum(slices))
    array = arrange(sizes, slices_of(slices))
    assert array.shape == tuple(sizes.values())
    assert len({d.id for d in array.flat}) == sum(slices)
    inside = array.reshape(-1, sizes["context"] * sizes["tensor"])
    for row in inside:
        assert len({d.slice_index for d in row}) == 1


def test_data_crosses_slices_before_anything_else():
    array = arrange(axis_sizes({"data": 2, "fsdp": 2, "tensor": 2}, 8), slices_of([4, 4]))
    by_data = array.reshape(2, 4)
    assert [{d.slice_index for d in row} for row in by_data] == [{0}, {1}]


def test_slices_that_no_axis_can_divide():
    with pytest.raises(ValueError, match=r"3 slices .* data=2, pipeline=1, fsdp=1.* multiple of 3"):
        arrange(axis_sizes({"data": 2, "tensor": 6}, 12), slices_of([4, 4, 4]))
    with pytest.raises(ValueError, match=r"slices of \[2, 6\] devices"):
        arrange(axis_sizes({"data": 8}, 8), slices_of([2, 6]))


@pytest.mark.parametrize(
    ("asked", "devices", "message"),
    [
        (
            {"data": 3, "tensor": 2},
            8,
            r"data=3 \* tensor=2 = 6 is not the number of devices, 8; .*1, 2, 4, 8",
        ),
        (
            {"data": -1, "tensor": 3},
            8,
            "tensor=3 = 3 does not divide 8 devices, so .* size for data",
        ),
        ({"data": -1, "fsdp": -1}, 8, "-1 for data and fsdp; only one axis"),
        ({"data": 0}, 8, "data=0; a size is at least 1"),
        ({"data": -2}, 8, "data=-2; a size is at least 1"),
    ],
)
def test_sizes_that_do_not_fit_name_the_numbers(asked, devices, message):
    with pytest.raises(ValueError, match=message):
        axis_sizes(asked, devices)


@pytest.mark.parametrize("devices", [1, 6, 8, 12])
def test_sizes_always_multiply_to_the_devices(devices):
    for fsdp in (n for n in range(1, devices + 1) if devices % n == 0):
        assert math.prod(axis_sizes({"data": -1, "fsdp": fsdp}, devices).values()) == devices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("data=2,tensor=4", {"data": 2, "tensor": 4}),
        (" data = 2 , tensor = 4 ", {"data": 2, "tensor": 4}),
        ("tensor=-1", {"tensor": -1, "data": 1}),
        ("data=2,tensor=-1", {"data": 2, "tensor": -1}),
    ],
)
def test_parse(text, expected):
    assert parse_mesh(text) == expected
    assert math.prod(make_mesh(**parse_mesh(text)).shape.values()) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "axis 'model'; the axes are data, pipeline, fsdp, context, tensor"),
        ("data=2,data=4", "'data' twice"),
        ("data=two", "'data' the size 'two'"),
        ("data", "'data' the size ''"),
    ],
)
def test_a_text_that_is_no_mesh(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)
