"""The log: what was appended is there, what was torn is dropped, what is damaged is an error."""

import numpy as np
import pytest

from parallel.parameter_server_log import Disk, Log, frame, pack


def record(number):
    return {"number": np.int64(number), "name": np.str_("ü"), "data": np.full(3, number / 7)}


def numbers(found):
    return [int(each["number"]) for each in found]


def written(folder, count=3):
    log = Log(folder)
    log.open()
    for number in range(count):
        log.append(record(number))
    log.close()
    return folder / "log"


def test_round_trip(tmp_path):
    written(tmp_path)
    log = Log(tmp_path)
    found = log.open()
    assert numbers(found) == [0, 1, 2]
    assert str(found[1]["name"]) == "ü"
    np.testing.assert_array_equal(found[2]["data"], np.full(3, 2 / 7))
    assert log.snapshot() is None
    log.compact(record(7))
    log.append(record(8))
    log.close()
    again = Log(tmp_path)
    assert int(again.snapshot()["number"]) == 7
    assert numbers(again.open()) == [8]


def test_a_torn_last_record_is_dropped_and_written_over(tmp_path):
    """Cut anywhere, or grown with zeros whose content never came."""
    path = written(tmp_path)
    content = path.read_bytes()
    size = len(content) // 3
    for end in [*range(2 * size, 3 * size, 7), 3 * size - 1]:
        for tail in (b"", bytes(3 * size - end)):
            if content[:end] + tail == content:
                continue  # the record ends in zeros itself, and is whole
            path.write_bytes(content[:end] + tail)
            log = Log(tmp_path)
            assert numbers(log.open()) == [0, 1], end
            log.append(record(9))
            log.close()
            again = Log(tmp_path)
            assert numbers(again.open()) == [0, 1, 9], end
            again.close()


def test_damage_before_the_end_is_an_error(tmp_path):
    """Every byte of the first two records, the length in a header among them."""
    path = written(tmp_path)
    content = path.read_bytes()
    for place in [*range(20), *range(20, 2 * len(content) // 3, 11)]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match="is damaged at byte"):
            Log(tmp_path).open()


def test_a_damaged_snapshot_is_an_error(tmp_path):
    log = Log(tmp_path)
    log.open()
    log.compact(record(1))
    log.close()
    path = tmp_path / "snapshot"
    content = path.read_bytes()
    for wrong in (b"", content[:-1], content[:40] + b"?" + content[41:], bytes(len(content))):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="is damaged"):
            Log(tmp_path).snapshot()


def test_after_a_failed_write_the_log_is_closed(tmp_path):
    class Full(Disk):
        def write(self, file, content):
            file.write(content[:30])
            raise OSError("no space left on device")

    written(tmp_path, 1)
    log = Log(tmp_path, Full())
    log.open()
    with pytest.raises(OSError, match="no space"):
        log.append(record(1))
    with pytest.raises(ValueError, match="not open"):
        log.append(record(1))
    again = Log(tmp_path)
    assert numbers(again.open()) == [0]


def test_a_log_belongs_to_one_server_at_a_time(tmp_path):
    log = Log(tmp_path)
    log.open()
    log.append(record(0))
    with pytest.raises(ValueError, match="log is in use by another server"):
        Log(tmp_path).open(patience=0.1)
    log.append(record(1))  # nothing of it was cut off
    log.close()
    again = Log(tmp_path)
    assert numbers(again.open(patience=0)) == [0, 1]
    again.close()


def test_there_is_no_pickle(tmp_path):
    (tmp_path / "log").write_bytes(frame(pack({"a": np.array([{}], dtype=object)})))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Log(tmp_path).open()
