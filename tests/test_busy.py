"""The warning of a busy machine."""

import os

import pytest

from experiments import busy


@pytest.mark.parametrize(
    ("ticks", "share"), [("30 0 20 50 0 0 0 0 9 9", 0.5), ("0 0 0 40 60 0 0 0", 0)]
)
def test_busy_cores_are_what_worked_of_all_ticks(tmp_path, monkeypatch, ticks, share):
    stat = tmp_path / "stat"
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1 1\n")
    monkeypatch.setattr(busy.time, "sleep", lambda seconds: stat.write_text(f"cpu  {ticks}\n"))
    assert busy.busy_cores(stat=stat) == pytest.approx(share * (os.cpu_count() or 1))


def test_where_nothing_is_said_nothing_is_claimed(tmp_path):
    assert busy.busy_cores(stat=tmp_path / "none") is None


@pytest.mark.parametrize(("found", "warned"), [(None, False), (0.1, False), (1.3, True)])
def test_the_warning(monkeypatch, capsys, found, warned):
    monkeypatch.setattr(busy, "busy_cores", lambda: found)
    busy.warn_if_busy()
    assert ("1.3 of" in capsys.readouterr().err) == warned
