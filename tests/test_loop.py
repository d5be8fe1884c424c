"""The loop, driven by a step that only notes what the host does, and by a clock of our own."""

import os
import signal
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.loop import LoopSettings, train
from train.meters import PEAK_FLOPS
from train.plugs import State
from train.records import Record, read_rows
from train.stop import stop_requests

TOKENS = 32.0


def first_state(step=0):
    return State(jnp.int32(step), {}, (), jax.random.key(0), {})


class Number:
    """A metric that takes note when the host asks for it: that is where the host waits."""

    def __init__(self, step, world):
        self.step, self.world = step, world

    def __array__(self, dtype=None, copy=None):
        self.world.note("read", self.step, self.world.read_seconds)
        return np.asarray(float(self.step), np.float32)


class World:
    """Fake step, data, evaluation and checkpoints on a fake clock; `events` is what they did."""

    compile_seconds, read_seconds, data_seconds = 100.0, 3.0, 1.0
    evaluation_seconds, checkpoint_seconds = 50.0, 20.0

    def __init__(self, folder, losses=()):
        self.events, self.now, self.folder = [], 0.0, folder
        self.losses, self.saved, self.said, self.advanced = dict(losses), [], [], []
        self.compiled = False

    def note(self, what, step, seconds=0.0):
        self.events.append((what, step))
        self.now += seconds

    def step(self, state, frozen, batch):
        self.note("dispatch", batch["number"], 0.0 if self.compiled else self.compile_seconds)
        self.compiled = True
        metrics = {"loss": Number(batch["number"], self), "tokens": TOKENS}
        metrics |= {"skipped": False, "nonfinite_in_a_row": 0}
        return State(state.step + 1, {}, (), state.rng, {}), metrics

    def batches(self, first, last):
        for number in range(first + 1, last + 1):
            self.note("data", number, self.data_seconds)
            yield {"number": number}

    def evaluate(self, state):
        self.note("evaluate", int(state.step), self.evaluation_seconds)
        return {"loss": self.losses.get(int(state.step), 9.0), "tokens": 10.0}

    def save(self, step, state, loss, seconds):
        assert int(state.step) == step
        self.note("save", step, self.checkpoint_seconds)
        self.saved.append((step, loss, seconds))

    def advance(self, step, values):
        self.advanced.append((step, values))

    def say(self, text):
        self.said.append(text)

    def run(self, until, start=0, batches=None, sinks=(), **changes):
        loop = {name: changes.pop(name) for name in list(changes) if name in SETTINGS}
        settings = LoopSettings(**{"log_every": 1, "checkpoint_every": 1000} | loop)
        plugs = {"evaluate": self.evaluate, "save": self.save, "reporter": self}
        with Record(self.folder / "metrics.jsonl", sinks) as record:
            return train(
                self.step,
                first_state(start),
                {},
                batches or self.batches,
                until=until,
                record=record,
                settings=settings,
                **plugs | changes,
            )

    def rows(self, kind):
        return [r for r in read_rows(self.folder / "metrics.jsonl") if r["kind"] == kind]


SETTINGS = ("log_every", "evaluate_every", "checkpoint_every", "target_loss", "profile")


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = World(tmp_path)
    clocks = SimpleNamespace(perf_counter=lambda: world.now, process_time=lambda: 2 * world.now)
    monkeypatch.setattr("train.loop.time", clocks)
    monkeypatch.setattr("train.meters.time", clocks)
    return world


@pytest.fixture
def identity_put(monkeypatch):
    """Batches of the fakes hold plain numbers, which a device would turn into arrays."""
    monkeypatch.setattr(jax, "device_put", lambda x: x)


pytestmark = pytest.mark.usefixtures("identity_put")


def test_the_host_waits_for_the_step_before_the_last_and_never_for_the_newest(world):
    world.run(until=6, evaluate=None)
    order = [event for event in world.events if event[0] in ("dispatch", "read")]
    expected = [("dispatch", 1), ("dispatch", 2)]
    for step in (3, 4, 5, 6):
        expected += [("read", step - 2), ("dispatch", step)]
    assert order == [*expected, ("read", 5), ("read", 6)]


def test_nothing_is_in_flight_during_evaluation_and_saving(world):
    world.run(until=9, evaluate_every=3, checkpoint_every=4)
    for index, (what, step) in enumerate(world.events):
        if what in ("evaluate", "save"):
            before = world.events[:index]
            assert ("read", step) in before
            assert ("dispatch", step + 1) not in before
    assert [event for event in world.events if event[0] in ("evaluate", "save")] == [
        ("evaluate", 3),
        ("save", 4),
        ("evaluate", 6),
        ("save", 8),
        ("evaluate", 9),
        ("save", 9),
    ]


def test_rows_come_at_their_steps_and_name_the_learning_rate_of_the_step(world):
    rates = np.arange(100, 110) / 100
    world.run(until=10, log_every=4, learning_rate=rates)
    rows = world.rows("train")
    assert [row["step"] for row in rows] == [4, 8]
    assert [row["loss"] for row in rows] == [4.0, 8.0]
    assert [row["learning_rate"] for row in rows] == [1.03, 1.07]
    assert [step for step, _ in world.advanced] == list(range(1, 11))


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ({3: 3.0, 6: 2.0, 9: 1.0}, ("target", 6)),  # at the target
        ({3: 3.0, 6: 1.9, 9: 1.0}, ("target", 6)),  # under it
        ({3: 3.0, 6: float("nan"), 9: 2.1}, ("finished", 11)),
        ({11: 2.0}, ("target", 11)),  # at the evaluation of the end
    ],
)
def test_the_first_evaluation_at_or_under_the_target_ends_it(world, losses, ends):
    world.losses = losses
    outcome = world.run(until=11, evaluate_every=3, target_loss=2.0)
    assert (outcome.reason, int(outcome.state.step)) == ends
    evaluated = [step for what, step in world.events if what == "evaluate"]
    assert evaluated == [step for step in (3, 6, 9, 11) if step <= ends[1]]
    assert [row["step"] for row in world.rows("evaluation")] == evaluated
    assert world.saved[-1][:2] == (ends[1], outcome.evaluation["loss"])
    assert ("dispatch", ends[1] + 1) not in world.events


def test_a_checkpoint_knows_its_loss_only_if_it_was_evaluated_there(world):
    world.losses = {4: 2.5, 9: 2.25}
    world.run(until=9, evaluate_every=4, checkpoint_every=2)
    assert [(step, loss) for step, loss, _ in world.saved] == [
        (2, None),
        (4, 2.5),
        (6, None),
        (8, 9.0),
        (9, 2.25),
    ]


def test_seconds_by_kind_are_all_of_the_time_and_go_on_after_a_resume(world):
    first = world.run(until=6, evaluate_every=3, checkpoint_every=4)
    assert first.seconds == {
        "data": 6 * 1.0,
        "compile": 100.0,
        "step": 6 * 3.0,
        "evaluation": 2 * 50.0,
        "checkpoint": 2 * 20.0,
    }
    assert sum(first.seconds.values()) == world.now
    # What a checkpoint holds is all but its own writing, which was still going on.
    _, _, spent = world.saved[-1]
    assert spent == first.seconds | {"checkpoint": 20.0}
    world.compiled = False  # another process
    second = world.run(until=10, start=6, spent=first.seconds, evaluate_every=3)
    assert sum(second.seconds.values()) == world.now
    assert second.seconds["compile"] == 200.0
    # A row's seconds are those since the first start. At step 3: 100 + 3 * (1 + 3) + 50.
    assert [(row["step"], row["seconds"]) for row in world.rows("evaluation")] == [
        (3, 162.0),
        (6, 244.0),
        (9, 244.0 + 20.0 + 100.0 + 3 * 4.0 + 50.0),
        (10, 426.0 + 4.0 + 50.0),
    ]


def test_a_row_costs_what_its_steps_cost_and_nothing_else(world, monkeypatch, tmp_path):
    """Compilation, evaluations and checkpoints in the middle of a row do not count."""
    (tmp_path / "intel-rapl:0").mkdir()
    files = {"max_energy_range_uj": lambda: 10**9, "energy_uj": lambda: int(world.now * 5e6)}  # 5 W
    monkeypatch.setattr("train.meters.RAPL", tmp_path)
    monkeypatch.setattr("train.meters._read", lambda path: files[path.name]())
    world.data_seconds = 0.0  # or rows would differ by the batch made while their last step runs
    world.run(until=20, log_every=10, evaluate_every=3, checkpoint_every=7)
    rows = world.rows("train")
    assert [row["step"] for row in rows] == [10, 20]
    for row in rows:
        assert row["step_seconds"] == 3.0
        assert row["tokens_per_second"] == pytest.approx(TOKENS / 3.0)
        assert row["cpu_seconds"] == 2 * 30.0
        assert row["joules"] == pytest.approx(5 * 30.0)
        assert "utilization" not in row  # nobody knows the peak of this processor


def test_utilization_is_shown_where_the_peak_is_known(world, monkeypatch):
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 1000.0)
    world.data_seconds = 0.0
    world.run(until=2, flops_per_token=30.0)
    assert world.rows("train")[-1]["utilization"] == pytest.approx(TOKENS / 3.0 * 30.0 / 1000.0)
    assert world.advanced[-1][1]["utilization"] == pytest.approx(0.32)


def with_signals(world, *numbers):
    """Batches during whose making signals come: number of the step -> signals."""
    wanted = dict(numbers)

    def batches(first, last):
        for batch in world.batches(first, last):
            for number in wanted.get(batch["number"], ()):
                os.kill(os.getpid(), number)
            yield batch

    return batches


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_at_hand(world, number):
    before = signal.getsignal(number)
    outcome = world.run(until=9, batches=with_signals(world, (4, [number])))
    assert (outcome.reason, outcome.signal, int(outcome.state.step)) == ("signal", number, 4)
    assert [step for step, _, _ in world.saved] == [4]
    assert [row["step"] for row in world.rows("train")] == [1, 2, 3, 4]
    assert "evaluate" not in dict(world.events)  # it is in a hurry
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once(world):
    before = signal.getsignal(signal.SIGINT)
    signals = with_signals(world, (4, [signal.SIGTERM, signal.SIGINT]))
    with pytest.raises(KeyboardInterrupt):
        world.run(until=9, batches=signals)
    assert ("dispatch", 4) not in world.events
    assert world.saved == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_waits_like_the_first(world):
    outcome = world.run(until=9, batches=with_signals(world, (4, [signal.SIGTERM] * 2)))
    assert (outcome.reason, int(outcome.state.step)) == ("signal", 4)


def test_a_signal_in_the_last_step_leaves_a_finished_phase_and_is_not_forgotten(world):
    outcome = world.run(until=4, batches=with_signals(world, (4, [signal.SIGTERM])))
    assert (outcome.reason, outcome.signal) == ("finished", signal.SIGTERM)
    assert [step for step, _, _ in world.saved] == [4]


def test_outside_the_main_thread_nothing_is_requested():
    found = []

    def ask():
        with stop_requests() as requested:
            found.append(requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [None]


def test_nothing_left_to_do_changes_nothing(world):
    outcome = world.run(until=5, start=5)
    assert (outcome.reason, int(outcome.state.step)) == ("finished", 5)
    assert world.events == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"log_every": 0}, "log_every is 0; it must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"profile": (0, 2)}, "profile runs from step 0 to 2"),
        ({"profile": (3, 2)}, "profile runs from step 3 to 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        LoopSettings(**fields)
