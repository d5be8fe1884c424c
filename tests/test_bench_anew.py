"""The bench where something fails or is stopped: what is said, and what is measured again."""

import pytest

from experiments.bench import __main__ as bench
from experiments.bench.alone import FAILED
from experiments.bench.anew import ANEW
from experiments.bench.table import Table
from experiments.grid import Measurement


class Numbers:
    """Tables of measurements that can be made to fail or to be stopped."""

    def __init__(self, tmp_path, monkeypatch):
        self.asked, self.errors, self.tmp_path, self.monkeypatch = [], {}, tmp_path, monkeypatch
        tables = {"odd": lambda: self.table((1, 3)), "even": lambda: self.table((2, 4))}
        monkeypatch.setattr(bench, "TABLES", tables)

    def table(self, numbers):
        made = tuple(Measurement(f"m{n}", {"n": n}, self.measure) for n in numbers)

        def draw(results, path):
            path.write_text(str([m.values["found"] for m in results]))

        show = lambda results: f"found {[m.values['found'] for m in results]}"
        return Table(f"From {numbers[0]}", made, show, draw)

    def measure(self, settings):
        self.asked.append(settings["n"])
        if error := self.errors.pop(settings["n"], None):
            raise error
        return {"found": settings["n"]}

    def run(self, words):
        """Runs the command; returns what was asked for meanwhile, and the Markdown."""
        folders = ["--folder", str(self.tmp_path / "runs"), "--out", str(self.tmp_path / "out")]
        self.monkeypatch.setattr("sys.argv", ["bench", *words.split(), *folders])
        self.asked.clear()
        try:
            bench.main()
        finally:
            self.text = (self.tmp_path / "out" / "bench-cpu.md").read_text()
        return list(self.asked)


def test_what_fails_is_named_and_all_tables_after_it_are_measured(tmp_path, monkeypatch):
    numbers = Numbers(tmp_path, monkeypatch)
    numbers.errors = {1: RuntimeError("the process ended"), 2: ValueError("a"), 4: ValueError("b")}
    with pytest.raises(ValueError, match=r"m1: `RuntimeError: the process ended`.*m2.*m4.*again"):
        numbers.run("")
    assert numbers.asked == [1, 3, 2, 4]
    assert "## From 1\n\nfound [3]\n\nFailed: m1: `RuntimeError: the process ended`" in numbers.text
    assert "## From 2\n\nFailed: m2: `ValueError: a`\n\nFailed: m4: `ValueError: b`" in numbers.text
    assert (tmp_path / "out" / "bench-cpu-odd.png").read_text() == "[3]"
    assert numbers.run("") == [1, 2, 4]
    assert "found [2, 4]" in numbers.text
    assert FAILED not in (tmp_path / "out" / "bench-cpu.json").read_text()


def test_fresh_measures_all_again_once_however_often_it_is_stopped(tmp_path, monkeypatch, capsys):
    numbers = Numbers(tmp_path, monkeypatch)
    assert numbers.run("") == [1, 3, 2, 4]
    numbers.errors = {3: KeyboardInterrupt(), 2: KeyboardInterrupt()}
    for asked in ([1, 3], [3, 2]):
        with pytest.raises(KeyboardInterrupt):
            numbers.run("--fresh")
        assert numbers.asked == asked
    assert "1 of its measurements stay" in capsys.readouterr().out
    assert numbers.run("--fresh --max-minutes 0") == []
    numbers.errors = {4: ValueError("of its own making")}
    with pytest.raises(ValueError, match="of its own making"):
        numbers.run("--fresh")
    assert numbers.asked == [2, 4]
    # What failed has been tried: the series is over, and fresh begins another.
    assert not (tmp_path / "runs" / ANEW).exists()
    assert numbers.run("") == [4]
    numbers.errors = {1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        numbers.run("--fresh --only odd")
    assert numbers.run("--fresh --only even") == [2, 4]
    assert numbers.run("") == [1, 3]  # ends it without --fresh
    assert numbers.run("--fresh") == [1, 3, 2, 4]
