"""The arithmetic of the measurement of the loop, on steps that take no time."""

import jax
import jax.numpy as jnp
import pytest

from experiments.bench.loop_overhead import LoopOverhead, Subject, interleave, report, summarise
from experiments.machine import machine
from train.plugs import State
from train.records import read_rows


def test_pairs_are_timed_in_turn_and_ratios_are_of_throughput():
    order, now = [], [0.0]
    seconds = {"bare": [1.0, 1.0, 2.0], "loop": [1.25, 1.0, 4.0]}

    def call(name):
        def run():
            now[0] += seconds[name][order.count(name)]
            order.append(name)

        return run

    found = interleave(call("bare"), call("loop"), 3, clock=lambda: now[0])
    assert order == ["bare", "loop", "loop", "bare", "bare", "loop"]
    assert found == [(1.0, 1.25), (1.0, 1.0), (2.0, 4.0)]
    summary = summarise(found, steps=10)
    assert summary.ratios == (0.8, 1.0, 0.5)
    assert (summary.median, summary.lowest, summary.highest) == (0.8, 0.5, 1.0)
    assert summary.bare_step == 0.1


def test_steps_that_are_too_short_are_refused():
    assert summarise([(1.0, 1.0)], steps=20).bare_step == 0.05
    with pytest.raises(ValueError, match=r"a step takes 47.6 ms; .* 50 ms and more"):
        summarise([(1.0, 1.0)], steps=21)


def test_both_ways_take_the_same_steps_on_the_same_batches(tmp_path):
    seen = []

    def step(state, frozen, batch):
        seen.append(batch["number"].item())
        metrics = {"loss": 1.0, "tokens": 4.0, "skipped": False, "nonfinite_in_a_row": 0}
        return State(state.step + 1, {}, (), state.rng, {}), metrics

    def data(first, last):
        return ({"number": jnp.int32(number % 3)} for number in range(first, last))

    state = State(jnp.int32(0), {}, (), jax.random.key(0), {})
    subject = Subject(step, state, data, 3, tmp_path)
    for run in (subject.bare, subject.loop, subject.bare, subject.loop):
        run()
    assert seen == [0, 1, 2] * 4
    assert int(subject.state.step) == 12
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10]


@pytest.mark.parametrize(
    ("loop", "says"), [(1.02, "The loop keeps 97%"), (1.05, "does not keep 97%")]
)
def test_the_report_says_whether_the_claim_holds(loop, says):
    summary = summarise([(1.0, loop)], steps=4)
    text = report(LoopOverhead(pairs=1, steps=4), summary, machine())
    assert says in text
    assert f"**{1 / loop:.1%}**" in text
    assert "4 steps of 250 ms" in text
