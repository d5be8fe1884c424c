"""The probe, with calls that move a clock of their own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.probe import PATHS, probe, time_interleaved


class FakeClock:
    """Stands still, but for calls that say how long they take."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def __call__(self):
        return self.now

    def path(self, name, seconds):
        """A path whose call takes `seconds(shape, how often it was called before)`."""

        def make(x, w):
            calls = iter(range(1000))

            def call():
                self.now += seconds((*x.shape, w.shape[1]), next(calls))
                self.log.append(name)

            return call

        return make


def test_it_picks_the_fastest_by_shape():
    clock = FakeClock()
    paths = {
        "float": clock.path("float", lambda shape, n: 2.0),
        "int": clock.path("int", lambda shape, n: 1.0 if shape[0] > 4 else 3.0),
        # The call that compiles is slow, and one in four later ones: the median forgets both.
        "slow start": clock.path("slow start", lambda s, n: 99.0 if n % 4 == 0 else 2.5),
    }
    table = probe([(8, 4, 6), (1, 4, 6)], paths, repeats=5, clock=clock)
    assert table.fastest((8, 4, 6)) == "int"
    assert table.fastest((1, 4, 6)) == "float"
    assert table.rows[0].seconds == {"float": 2.0, "int": 1.0, "slow start": 2.5}
    assert table.rows[1].seconds["int"] == 3.0
    assert table.rows[0].spread["float"] == 0.0
    text = str(table)
    assert "2.00x" in text
    assert "0.67x" in text  # what is slower is printed like the rest
    assert text.splitlines()[-1].endswith("float")
    written = json.loads(json.dumps(table.to_json()))
    assert written["rows"][0]["fastest"] == "int"
    assert written["rows"][1]["shape"] == [1, 4, 6]
    assert (written["repeats"], written["jax_version"]) == (5, jax.__version__)


def test_a_tie_goes_to_the_first():
    clock = FakeClock()
    paths = {name: clock.path(name, lambda s, n: 1.0) for name in ("float", "int")}
    assert probe([(1, 1, 1)], paths, clock=clock).fastest((1, 1, 1)) == "float"


def test_calls_take_turns():
    clock = FakeClock()
    calls = {n: clock.path(n, lambda s, k: 1.0)(jnp.ones((1, 1)), jnp.ones((1, 1))) for n in "abc"}
    times = time_interleaved(calls, 3, clock)
    assert "".join(clock.log) == "abc" + "abc" + "bca" + "cab"
    assert times == dict.fromkeys("abc", [1.0] * 3)


def test_spread():
    clock = FakeClock()
    paths = {"float": clock.path("float", lambda s, n: float(n))}
    row = probe([(1, 1, 1)], paths, repeats=5, clock=clock).rows[0]
    assert (row.seconds["float"], row.spread["float"]) == (3.0, 2.0)


def test_paths_take_the_same_product(strict):
    x = jax.random.normal(jax.random.key(0), (4, 32))
    w = jax.random.normal(jax.random.key(1), (32, 8))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    results = {name: np.asarray(path(x, w)(), np.float64) for name, path in PATHS.items()}
    np.testing.assert_allclose(results["float32"], exact, rtol=1e-4, atol=1e-4)
    for name, result in results.items():
        assert np.abs(result - exact).max() < 0.3, name
    assert len({result.tobytes() for result in results.values()}) == len(PATHS)


def test_bad_input():
    table = probe([(2, 2, 2)], repeats=1)
    cases = [
        (lambda: table.fastest((3, 2, 2)), r"was not probed; there are \(2, 2, 2\)"),
        (lambda: probe([]), "0 shapes"),
        (lambda: probe([(1, 1, 1)], {}), "0 paths"),
        (lambda: probe([(1, 1, 1)], repeats=0), "0 repeats"),
        (lambda: probe([(0, 1, 1)]), "each at least 1"),
        (lambda: probe([(4, 4)]), "rows, inputs, outputs"),
        (lambda: jax.jit(lambda: probe([(1, 1, 1)]))(), "cannot be part of a traced function"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
