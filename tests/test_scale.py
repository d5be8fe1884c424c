"""The command of the tables about parallelism, at tiny sizes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.runs.layout import Division
from experiments.scale import __main__ as scale
from experiments.scale import (
    compression,
    device,
    diloco,
    equality,
    memory,
    processes,
    server,
    traffic,
    training,
)
from experiments.scale.program import first, program, settings_for, small_model
from experiments.tables.table import Request, Results
from model.presets import modern_tiny


def only(values):
    return Results({"a": {0: values}})


def test_every_table_lists_cells_with_names_and_keys_of_their_own(tmp_path):
    for table in scale.TABLES:
        items = table.cells(Request(tmp_path, seeds=2))
        rows = {(item.name, item.settings.get("seed", 0)) for item in items}
        assert len(rows) == len({item.key for item in items}) == len(items), table.name
        assert json.loads(json.dumps([dict(item.settings) for item in items]))


def test_every_table_renders_nothing_yet(tmp_path):
    for table in scale.TABLES:
        assert isinstance(table.render(Results()), list)
        if table.picture:
            assert table.picture(Results()) is None


def test_at_least_twelve_meshes_over_all_five_axes():
    assert len(equality.CASES) >= 12
    named = {part.split("=")[0] for mesh, *_ in equality.CASES for part in mesh.split(",")}
    assert named == {"data", "fsdp", "tensor", "context", "pipeline"}


@pytest.mark.slow
def test_a_mesh_equals_one_device_and_a_visible_difference_does_not():
    item = equality.cells(Request())[0]
    values = equality.measure({**item.settings, "steps": 3})
    assert equality.equal(values)
    assert values["float64"]["fell"] > 0
    assert "| yes |" in equality.render(only(values))[-1]
    values["float64"]["gradient"] = {"tensor": 1e-9, "worst": "x", "all": 0.0}
    assert not equality.equal(values)
    assert "**no**" in equality.render(only(values))[-1]


def test_distances_name_the_worst_tensor():
    want = {"a": np.ones(4), "b": {"c": np.full(4, 2.0)}}
    got = {"a": np.ones(4), "b": {"c": np.full(4, 2.5)}}
    found = equality.distances(got, want)
    assert (found["tensor"], found["worst"]) == (0.25, "b/c")
    assert found["all"] == pytest.approx(1 / np.sqrt(20))


def test_bytes_on_devices_are_those_of_the_shapes():
    """What is counted on the devices equals what the layout says, and is near one eighth."""
    built = program(settings_for(modern_tiny(vocabulary_size=64)), "fsdp=8")
    state = first(built)
    held = memory.held_by_device(state.params)
    assert len(held) == 8
    want = memory.bytes_per_device(built.shapes.params)
    assert set(held.values()) == {want}
    whole = memory.bytes_of(state.params)
    assert whole / 8 <= want < whole / 4  # norms lie whole on every device


def test_what_lies_whole_is_told_from_what_is_divided():
    """Norms lie whole; matrices are divided by eight to the byte."""
    settings = {"model": "modern_mini", "vocabulary": 4096, "optimizer": "adamw", "mesh": "fsdp=8"}
    values = memory.measure_state({**settings, "placed": False})
    held = values["parameters_per_device"] + values["optimizer_per_device"]
    whole = values["parameters_whole"] + values["optimizer_whole"]
    assert 0 < values["kept_whole"] < held / 50
    assert 8 * (held - values["kept_whole"]) == whole - values["kept_whole"]
    assert "| +0.00% | from shapes | yes |" in "\n".join(memory.render(only(values)))


@pytest.mark.slow
def test_memory_of_attention():
    found = {
        form: memory.measure_attention({"attention": form, "tokens": 512})["temporaries"]
        for form in memory.FORMS
    }
    assert found["ring"] < found["full, divided"] < found["full"]
    results = Results({f: {0: {"form": f, "tokens": 512, "temporaries": 9}} for f in found})
    assert memory.temporaries(results) == {form: {512: 9} for form in found}


@pytest.mark.parametrize("form", list(compression.FORMS))
@pytest.mark.slow
def test_bytes_in_the_program_are_those_of_the_formula(form):
    values = compression.measure_bytes({"form": form, "workers": 4})
    assert values["program"] == pytest.approx(values["formula"], rel=1e-3)
    if form == "int8":
        assert values["program"] <= compression.LARGEST_INT8 * values["plain"]
        assert values["kinds"] == ["all-gather", "all-to-all"]


@pytest.mark.slow
def test_bytes_of_a_meeting_are_those_of_the_formula():
    values = diloco.measure_meeting({})
    assert values["program"] == pytest.approx(values["formula"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["FSDP", "ring"])
def test_no_collective_is_unexplained(case):
    mesh, more = traffic.CASES[case]
    settings = {"case": case, "mesh": mesh, "more": list(more), "backend": "cpu"}
    values = traffic.measure(settings)
    assert values["exact"]
    assert all(row["expected"] == row["found"] for row in values["rows"])
    values = json.loads(json.dumps(values))
    assert summary(case, values).split(" | ")[3] == "0"
    values["rows"][0]["found"] += 3
    assert summary(case, values).split(" | ")[3] == "**3**"


def summary(case, values):
    start = f"| {case} | `{traffic.CASES[case][0]}"
    return next(line for line in traffic.render(only(values)) if line.startswith(start))


def test_each_compiler_has_its_own_unexplained_and_says_what_it_does_otherwise():
    """A TPU's arrays are held against formulas of a TPU, in a table of their own."""
    row = {"kind": "all-reduce", "axes": ["data"], "bytes": 64, "expected": 2, "why": "x"}
    facts = {"sent": 9, "textbook": 9, "departures": ["other"], "case": "data parallel"}
    of = {
        "cpu": {**facts, "backend": "cpu", "rows": [{**row, "found": 2}], "exact": True},
        "tpu": {**facts, "backend": traffic.CHIP, "rows": [{**row, "found": 5}], "exact": False},
    }
    text = "\n".join(traffic.render(Results({name: {0: values} for name, values in of.items()})))
    cpu, tpu = text.split(f"**TPU {traffic.CHIP}**")
    assert "| 2 | 0 | 9 B | 9 B | other |" in cpu
    assert "| 5 | **3** | 9 B | 9 B | other |" in tpu
    assert "All loops of these programs say how often they run" in cpu
    assert "of unknown length was counted once in: data parallel" in tpu
    assert "width 512" in tpu
    assert "Found where" not in cpu
    assert "- data parallel: all-reduce over data of 64 B, 5 for 2 (why?)" in tpu


def test_departures_from_the_textbook_are_those_that_cost_something():
    mesh, cpu = traffic.mesh_of("data=2,pipeline=4"), traffic.SUBJECTS["cpu"]
    words = traffic.DEPARTURES
    of = traffic.departures(cpu.volumes(mesh.shape), (), cpu.backend, mesh)
    assert of == [words["sums_after_loops"]]
    mesh = traffic.mesh_of("fsdp=8")
    of = traffic.departures(cpu.volumes(mesh.shape), (), cpu.backend, mesh)
    assert of == [words["scatters"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["int8", "pipeline", device.SERVER, "tensor-parallel block, sequence"]
)
def test_a_path_is_timed_against_plain_jit(path):
    values = device.measure({"path": path, "pairs": 1, "device": "cpu"})
    assert 0 < values["lowest"] <= values["ratio"] <= values["highest"]
    assert f"| {path} | 1 |" in device.render(Results({path: {0: values}}))[-1]


def test_a_round_of_diloco_is_timed_whole(monkeypatch):
    """A meeting takes place in every tenth call: it must be in every time, not in a tenth."""
    clock = [0.0]
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    number = 0

    def step():
        nonlocal number
        number += 1
        clock[0] += 11.0 if number % 10 == 0 else 1.0

    calls = device.calls_of("DiLoCo, H = 10", "gpu")
    assert device.in_turns([step], 3, calls) == [[2.0] * 3]
    assert device.calls_of("tensor-parallel block, sequence", "gpu") > 10
    items = {item.name: item.settings for item in device.cells(Request())}
    assert items["DiLoCo, H = 10"]["calls"] == 10


@pytest.mark.slow
def test_the_server_trains_as_the_step_that_it_is_held_against():
    """Clipped alike, at the same rate and moments: the same losses."""
    config = device.size("cpu")
    with jax.set_mesh(device.mesh_of("data=1")):
        runs = device.plain_step(config, "cpu"), device.path_step(device.SERVER, config, "cpu")
        ours, theirs = ([float(run()["loss"]) for _ in range(4)] for run in runs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)  # it decays vectors as well
    assert ours[0] - ours[-1] > 0.05


def test_a_plans_memory_stands_beside_the_devices_peak(monkeypatch):
    """Asked for first, as a peak is that of all that ran before."""
    assert device.MEMORY not in [item.name for item in device.cells(Request())]  # a CPU has none
    peaks = iter([0, 10, 3 * 2**20])
    monkeypatch.setattr(device, "peak_bytes", lambda: next(peaks))
    monkeypatch.setattr(device, "plain_step", lambda *given: lambda: 0)
    item = device.cells(Request())[0]
    assert item.name == device.MEMORY
    values = json.loads(json.dumps(item.function(item.settings)))
    planned = device.memory_of(
        device.the_settings(device.size("cpu"), "cpu"),
        dict.fromkeys(device.AXES, 1),
        Division(),
    )
    assert values["planned"] == planned._asdict()
    line = device.render(only(values))[-1]
    assert "3.0 MiB in use at its peak: " in line
    assert f"{planned.total / (3 * 2**20):.2f} times as much" in line
    assert "is not known" in device.memory_line(values | {"before": 3 * 2**20})


def test_losses_are_compared_in_pairs():
    rows = {"none": {0: {"loss": 2.0}, 1: {"loss": 4.0}}, "int8": {1: {"loss": 4.1}}}
    lines = compression.losses(Results(rows))
    line = next(each for each in lines if "| int8 | 1 | 4.1000 |" in each)
    assert "+2.50%" in line
    assert line.endswith("| **no** |")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    size = dataclasses.replace(
        training.SIZE,
        data=(str(path),),
        tokenizer="bytes",
        batch_size=8,
        sequence_length=16,
        layers=2,
        width=32,
    )
    for module in (training, compression):
        monkeypatch.setattr(module, "VOCABULARY", 257)
    for module in (training, diloco, compression):
        monkeypatch.setattr(module, "SIZE", size)
        monkeypatch.setattr(module, "STEPS", 6)
    monkeypatch.setattr(training, "LOOP", training.LoopSettings(log_every=2, evaluate_every=6))
    return tmp_path


@pytest.mark.slow
def test_the_command_measures_writes_and_goes_on(tiny, monkeypatch, capsys):
    monkeypatch.setattr(diloco, "ROUNDS", (2,))
    command = scale.Scale(("diloco",), seeds=1, out=tiny / "out", results=tiny / "results")
    written = scale.run_command(command)
    assert [path.name for path in written] == [
        "scale-cpu.json",
        "scale-cpu.md",
        "scale-cpu-diloco.png",
    ]
    content = json.loads(written[0].read_text())
    assert set(content["tables"]["diloco"]) == {"a meeting", "synchronous", "H = 2"}
    text = written[1].read_text()
    assert "| H = 2 |" in text
    assert (
        "python -m experiments.scale --tables"
        not in text.split("## DiLoCo: bytes")[1].split("##")[0]
    )
    # What is there is not measured again, whether its folder is or not.
    monkeypatch.setattr(training, "run_cells", None)
    again = dataclasses.replace(command, out=tiny / "other")
    assert json.loads(scale.run_command(again)[0].read_text())["cells"] == content["cells"]
    assert "3 cells are finished, 0 run now" in capsys.readouterr().out


def test_tables_that_need_more_devices_are_refused():
    names = tuple(table.name for table in scale.TABLES)
    assert [table.name for table in scale.tables_for(names, 1)] == ["device"]
    with pytest.raises(ValueError, match="equality need 8 devices, and there are 1"):
        scale.tables_for(("equality",), 1)
    with pytest.raises(ValueError, match="no table is called 'equal'; there are equality, memory"):
        scale.run_command(scale.Scale(("equal",)))


def test_the_server_table_counts_updates():
    row = {
        "seed": 0,
        "curve": [[0.0, 0, 5.0], [2.0, 10, 3.0]],
        "loss": 3.0,
        "seconds": 2.0,
        "slowest_step": 0.1,
        "replayed": 3,
        "audit": dict.fromkeys(("acknowledged", "applied", "lost", "unheard", "stale"), 0),
    }
    results = Results({form: {0: {**row, "form": form}} for form in server.runs.FORMS})
    text = "\n".join(server.render(results))
    assert "0 applied = 0 acknowledged + 0" in text
    assert "they differ" not in text
    assert server.render(Results({"killed": {0: row}})) == ["No seed has all three forms yet."]


def test_the_same_loss_is_told_by_standard_errors():
    """A difference counts by how far it exceeds what differs between seeds."""
    alive = [2.0, 2.05, 2.1]
    assert server.same_loss([2.03, 2.03, 2.1], alive).endswith("as far as they can tell")
    assert server.same_loss([2.1, 2.16, 2.2], alive).endswith("3 seeds: **another**")
    assert "no spread" in server.same_loss([2.0], [2.0])


def test_the_processes_table_says_what_is_the_same():
    row = {"case": "2 x 2", "exits": [0, 0], "saved": 4, "against": "1 x 4", "losses": 5}
    rows = [{**row, "difference": 0.0}, {**row, "difference": 2e-7}]
    text = "\n".join(processes.render(only({"rows": rows})))
    assert "the same bits" in text
    assert "2.0e-07" in text


def test_a_division_reaches_the_program():
    built = program(settings_for(small_model()), "data=4,pipeline=2", Division((), 2, 2))
    assert built.layout.pipeline == (2, 2)
