"""The record: rows survive kills and resumes, damage is named, and others are shown the numbers."""

import contextlib
import json
import math

import pytest

from train.records import Record, Sink, cut_back, read_rows, tensorboard_sink


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, steps):
    with Record(path) as record:
        for step in steps:
            record.write("train", step, {"loss": step / 2})


def test_rows_come_back_as_they_were_and_a_record_is_continued(path):
    write(path, [1, 2])
    write(path, [3])
    assert list(read_rows(path)) == [
        {"kind": "train", "step": step, "loss": step / 2} for step in (1, 2, 3)
    ]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(path):
    with Record(path) as record:
        record.write("train", 1, {"loss": 2.0})
        assert [row["step"] for row in read_rows(path)] == [1]


def test_a_resumed_record_is_cut_back_to_the_step_of_the_checkpoint(path):
    write(path, [1, 2, 3, 4])
    cut_back(path, 2)
    write(path, [3])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    cut_back(path, 0)
    assert list(read_rows(path)) == []


def test_cutting_back_what_is_not_there_makes_nothing(path):
    cut_back(path, 5)
    assert not path.exists()


@pytest.mark.parametrize("ending", ['{"kind": "train", "st', '{"kind": "trai\xff', "\x00\x00"])
def test_a_last_line_cut_off_by_a_kill_is_passed_over_and_gone_after_a_resume(path, ending):
    write(path, [1, 2])
    with path.open("ab") as file:
        file.write(ending.encode("latin-1"))
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    cut_back(path, 2)
    write(path, [3])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(path):
    write(path, [1, 2, 3])
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is no JSON"):
        list(read_rows(path))
    before = path.read_text()
    with pytest.raises(ValueError, match="line 2"):
        cut_back(path, 1)
    assert path.read_text() == before  # nothing is lost by the attempt


def test_numbers_that_are_not_finite_become_their_names_at_any_depth(path):
    values = {"loss": math.nan, "norms": {"weight": {"head": math.inf, "blocks": [1.0, -math.inf]}}}
    with Record(path) as record:
        record.write("train", 1, values)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["loss"] == "nan"
    assert row["norms"] == {"weight": {"head": "inf", "blocks": [1.0, "-inf"]}}
    assert math.isnan(float(row["loss"]))
    cut_back(path, 1)  # and the names survive a resume
    assert list(read_rows(path)) == [row]


def test_sinks_get_every_row_and_are_closed_at_the_end(path):
    seen = []
    sink = Sink(seen.append, lambda: seen.append("closed"))
    with contextlib.suppress(RuntimeError), Record(path, (sink, Sink(seen.append))) as record:
        row = record.write("evaluation", 7, {"loss": 1.5})
        raise RuntimeError
    assert seen == [row, row, "closed"]
    assert row == {"kind": "evaluation", "step": 7, "loss": 1.5}


def test_tensorboard_receives_the_rows(path, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    with Record(path, (tensorboard_sink(tmp_path / "tensorboard"),)) as record:
        record.write("train", 3, {"loss": 2.5, "norms": {"weight": {"q": [1.0, 2.0]}}})
        record.write("evaluation", 4, {"loss": 2.25, "note": "no number"})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # length, its checksum, an event, its checksum
        size = int.from_bytes(content[:8], "little")
        assert masked_crc32c(content[:8]).to_bytes(4, "little") == content[8:12]
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + size :]
    assert found == {
        "train/loss": (3, 2.5),
        "train/norms/weight/q/0": (3, 1.0),
        "train/norms/weight/q/1": (3, 2.0),
        "evaluation/loss": (4, 2.25),
    }
