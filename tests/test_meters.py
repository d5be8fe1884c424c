"""Seconds by kind, joules from a counter that wraps, utilization, and the progress bar."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from train import meters
from train.meters import PEAK_FLOPS, Clock, Energy, utilization
from train.progress import progress_bar


def test_a_clock_adds_up_by_name_also_what_fails(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock()
    with clock("step"):
        now[0] += 2
    with clock("data"):
        now[0] += 3
    with contextlib.suppress(RuntimeError), clock("step"):
        now[0] += 4
        raise RuntimeError
    now[0] += 5  # nobody's
    assert clock.seconds == {"step": 6.0, "data": 3.0}
    assert clock.total() == 14.0


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """Two packages and a part of one, as Linux lays them out; sets microjoules by package."""
    monkeypatch.setattr(meters, "RAPL", tmp_path)

    def counter(name, microjoules):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "max_energy_range_uj").write_text("999999999\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")

    (tmp_path / "intel-rapl").mkdir()  # the control type, no counter
    counter("intel-rapl:0", 5_000_000)
    counter("intel-rapl:0:0", 1_000_000)  # cores of package 0: already in it
    counter("intel-rapl:1", 7_000_000)
    return counter


def test_joules_are_those_of_the_packages_since_the_start(rapl):
    energy = Energy()
    assert energy.joules() == {"joules": 0.0}
    rapl("intel-rapl:0", 8_000_000)
    rapl("intel-rapl:0:0", 3_000_000)
    assert energy.joules() == {"joules": 3.0}
    rapl("intel-rapl:1", 7_500_000)
    assert energy.joules() == {"joules": 3.5}


def test_a_counter_that_wraps_counts_on(rapl):
    rapl("intel-rapl:1", 999_000_000)
    energy = Energy()
    total = 0.0
    for _ in range(3):  # each time around by 600 J, past the end at 1,000 J
        total += 600.0
        rapl("intel-rapl:1", int(999_000_000 + total * 1e6) % 1_000_000_000)
        assert energy.joules() == {"joules": pytest.approx(total)}


@pytest.mark.parametrize("content", [None, "", "secret"])
def test_without_a_readable_counter_there_are_no_joules(rapl, tmp_path, content):
    """One package that cannot be read makes the sum meaningless."""
    file = tmp_path / "intel-rapl:1" / "energy_uj"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert Energy().joules() == {}


def test_without_rapl_there_are_no_joules(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "RAPL", tmp_path / "nowhere")
    assert Energy().joules() == {}


def test_utilization_is_of_the_devices_that_work():
    def device(kind):
        return SimpleNamespace(device_kind=kind)

    kinds = ["NVIDIA H100 80GB HBM3", "TPU v5 lite"]
    h100, lite = map(device, kinds)
    assert utilization(989e12 / 4, [h100]) == 0.25
    assert utilization(989e12, [h100] * 4) == 0.25
    assert utilization(197e12, {"a": lite}.values()) == 1.0
    assert utilization(1e12, [device("abacus")]) is None
    assert utilization(1e12, [h100, device("abacus")]) is None
    assert utilization(1e12, jax.devices("cpu")) is None
    assert set(kinds) <= set(PEAK_FLOPS)


def test_a_bar_outside_a_terminal_prints_its_lines_alone(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    with progress_bar("run", 0, 10) as reporter:
        reporter.advance(1, {"loss": 2.0, "tokens_per_second": 1000.0})
        reporter.say(line := f"step 1 [validation] {'a long line' * 10}")
    assert capsys.readouterr().out == line + "\n"  # as it is, not wrapped


def test_a_bar_in_a_terminal_shows_loss_speed_and_utilization(capsys, monkeypatch):
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "150"}.items():
        monkeypatch.setenv(name, value)
    with progress_bar("my run", 4, 10) as reporter:
        reporter.advance(5, {"loss": 2.0, "tokens_per_second": 1234.0})
        reporter.say("a line that stays")
        reporter.advance(6, {"loss": 1.5, "tokens_per_second": 1234.0, "utilization": 0.421})
    shown = capsys.readouterr().out
    for text in (
        "my run",
        "6/10",
        "loss 1.500",
        "1,234 tokens/s",
        "42.1% of peak",
        "line that stays",
    ):
        assert text in shown
