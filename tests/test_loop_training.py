"""The loop around a real step: compilations, norms, traces, and losses that are not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.presets import modern_tiny
from model.transformer import Transformer
from train.checkpoints import Checkpoints
from train.evaluate import evaluate
from train.loop import LoopSettings, reset_nonfinite, train
from train.losses import cross_entropy
from train.plugs import NONFINITE
from train.records import Record, read_rows
from train.step import init_state, make_evaluation_step, make_train_step

MODEL = Transformer(modern_tiny(zero_init_projections=False))
OPTIMIZER = optax.adam(1e-2)
MAX_NONFINITE = 2
COMPILED = "/jax/core/compile/backend_compile_duration"


def batch_at(number, bad=()):
    """The batch of step `number`, counted from 1; in a bad one the loss is not a number."""
    draw = np.random.default_rng(number)
    tokens = draw.integers(0, MODEL.config.vocabulary_size, (4, 9)).astype(np.int32)
    weights = np.full((4, 8), np.nan if number in bad else 1.0, np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def batches(bad=()):
    return lambda first, last: (batch_at(number, bad) for number in range(first + 1, last + 1))


@functools.cache
def first_state():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return init_state(jax.random.key(1), params, OPTIMIZER)


def fresh(state):
    """The loop donates its state."""
    return jax.tree.map(jnp.copy, state)


@functools.cache
def compiled_step():
    step = make_train_step(MODEL, [cross_entropy()], OPTIMIZER, max_nonfinite=MAX_NONFINITE)
    return jax.jit(step, donate_argnums=0)


def rows_of(folder, kind):
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def run(folder, state, until, *, bad=(), feed=None, settings=None, **plugs):
    with Record(folder / "metrics.jsonl") as record:
        return train(
            compiled_step(),
            fresh(state),
            {},
            feed or batches(bad),
            until=until,
            record=record,
            settings=settings or LoopSettings(log_every=1),
            max_nonfinite=MAX_NONFINITE,
            trace_folder=str(folder / "profile"),
            **plugs,
        )


def stepped(state, numbers, bad=()):
    """What the step alone makes of these batches, without the loop."""
    for number in numbers:
        state, _ = compiled_step()(fresh(state), {}, batch_at(number, bad))
    return state


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@dataclasses.dataclass
class Watched:
    """A run with norms, evaluations and checkpoints on, and what was compiled meanwhile.

    `compiled` are names of functions, JAX's small ones among them; the first `at_first` of them
    were there when the first step had been dispatched. `traces` counts those of the step.
    """

    rows: list
    steps: list
    step: object
    compiled: list = dataclasses.field(default_factory=list)
    traces: int = 0
    at_first: int | None = None


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    inner = make_train_step(MODEL, [cross_entropy()], OPTIMIZER, log_norms=True)
    measure = jax.jit(make_evaluation_step(MODEL, [cross_entropy()]))
    start = fresh(first_state())

    def our_step(state, frozen, batch):
        watched.traces += 1
        return inner(state, frozen, batch)

    watched = Watched([], [], jax.jit(our_step, donate_argnums=0))

    def feed(first, last):
        for number in range(first + 1, last + 1):
            yield batch_at(number)
            if number == 1:  # the next is asked for, so this one is dispatched
                watched.at_first = len(watched.compiled)

    def listen(event, seconds, **kwargs):
        if event == COMPILED:
            watched.compiled.append(kwargs["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    with Checkpoints(folder / "checkpoints") as checkpoints, Record(folder / "rows") as record:
        train(
            watched.step,
            start,
            {},
            feed,
            until=8,
            record=record,
            settings=LoopSettings(log_every=1, evaluate_every=2, checkpoint_every=3),
            evaluate=lambda state: evaluate(measure, state, {}, [batch_at(100)]),
            save=lambda step, state, loss, seconds: checkpoints.save(step, state, {}, loss=loss),
        )
    jax.monitoring.unregister_event_duration_listener(listen)
    watched.steps, watched.rows = checkpoints.steps(), list(read_rows(folder / "rows"))
    return watched


def test_one_compilation_and_none_after_the_first_step(watched):
    assert watched.traces == 1
    assert watched.compiled.count("jit(our_step)") == 1
    assert watched.compiled[watched.at_first :] == ["jit(evaluate)"]  # its own, once
    assert [r["step"] for r in watched.rows if r["kind"] == "evaluation"] == [2, 4, 6, 8]
    assert watched.steps[-1] == 8


def test_log_norms_hold_the_norms_of_every_layer(watched):
    """Against gradients of our own, Adam's update, and NumPy's norm of each layer."""

    def loss(params, batch):
        logits = MODEL.apply({"params": params}, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    rows = [row for row in watched.rows if row["kind"] == "train"][:3]
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(OPTIMIZER.update)
    params, optimizer = first_state().params, first_state().optimizer
    for number, row in enumerate(rows, start=1):
        grads = gradient(params, batch_at(number))
        updates, optimizer = update(grads, optimizer, params)
        for name, tree in {"gradient": grads, "update": updates, "weight": params}.items():
            expected = {}
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
                path = "/".join(key.key for key in keys)
                stacked = path.startswith("blocks/")
                layers = np.asarray(leaf if stacked else leaf[None])
                norms = [float(np.linalg.norm(layer.ravel())) for layer in layers]
                expected[path] = norms if stacked else norms[0]
            assert row["norms"][name].keys() == expected.keys()
            for path, norms in expected.items():
                np.testing.assert_allclose(row["norms"][name][path], norms, rtol=2e-4, atol=1e-6)
        params = optax.apply_updates(params, updates)
    assert len(rows[0]["norms"]["weight"]["blocks/attention/q/kernel"]) == MODEL.config.layers


def traced_steps(folder):
    """Step numbers by trace file, the files in order."""
    found = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [e for plane in data.planes for line in plane.lines for e in line.events]
        found.append(sorted(dict(e.stats)["step_num"] for e in events if e.name == "train"))
    return found


def test_a_trace_holds_exactly_the_steps_asked_for(tmp_path):
    settings = LoopSettings(log_every=1, evaluate_every=4, profile=(3, 4))
    seen = []

    def look(state):  # the evaluation after step 4 is no part of the trace, which is written by now
        seen.append(traced_steps(tmp_path / "profile"))
        return {"loss": 1.0}

    run(tmp_path, first_state(), 6, settings=settings, evaluate=look)
    assert seen == [[[3, 4]], [[3, 4]]]


def test_a_trace_is_cut_by_where_a_run_begins_and_ends(tmp_path):
    outcome = run(tmp_path, first_state(), 2, settings=LoopSettings(profile=(2, 5)))
    assert traced_steps(tmp_path / "profile") == [[2]]
    run(tmp_path / "later", outcome.state, 4, settings=LoopSettings(profile=(2, 3)))
    assert traced_steps(tmp_path / "later" / "profile") == [[3]]
    run(tmp_path / "none", outcome.state, 4, settings=LoopSettings(profile=(7, 8)))
    assert traced_steps(tmp_path / "none" / "profile") == []


def test_an_interrupted_trace_leaves_the_profiler_free(tmp_path):
    def broken(first, last):
        yield from (batch_at(number) for number in range(1, 4))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        run(tmp_path, first_state(), 5, feed=broken, settings=LoopSettings(profile=(2, 5)))
    with jax.profiler.trace(str(tmp_path / "another")):  # refuses while one is open
        pass


def test_a_loss_that_is_not_finite_is_skipped_counted_and_named(tmp_path):
    outcome = run(tmp_path, first_state(), 6, bad=(3, 5))
    assert outcome.reason == "finished"
    assert rows_of(tmp_path, "skipped") == [
        {"kind": "skipped", "step": 3, "in_a_row": 1},
        {"kind": "skipped", "step": 5, "in_a_row": 1},
    ]
    assert [row["loss"] for row in rows_of(tmp_path, "train") if row["step"] in (3, 5)] == [
        "nan"
    ] * 2
    counters = {name: int(n) for name, n in outcome.state.extra[NONFINITE].items()}
    assert counters == {"in_a_row": 0, "total": 2}
    expected = stepped(first_state(), range(1, 7), bad=(3, 5))
    assert_same(outcome.state.params, expected.params)


@pytest.mark.parametrize("meanwhile", [{}, {"evaluate_every": 6}, {"checkpoint_every": 6}])
def test_k_bad_losses_in_a_row_stop_it_with_the_last_good_state(tmp_path, meanwhile):
    """Also where an evaluation or a checkpoint is due at a step that was in flight in vain."""
    saved, asked = [], []

    def measure(state):
        asked.append(int(state.step))
        return {"loss": 1.0}

    outcome = run(
        tmp_path,
        first_state(),
        9,
        bad=(4, 5, 6, 7, 8),
        settings=LoopSettings(log_every=1, **meanwhile),
        evaluate=measure,
        save=lambda step, state, loss, seconds: saved.append((step, int(state.step))),
    )
    assert outcome.reason == "nonfinite"
    assert saved == [(5, 5)]  # step 5 was the second bad one; 6, in flight by then, did nothing
    assert asked == []
    assert [row["step"] for row in rows_of(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert rows_of(tmp_path, "skipped")[-1] == {"kind": "skipped", "step": 5, "in_a_row": 2}
    good = stepped(first_state(), range(1, 4))
    assert_same(outcome.state.params, good.params)
    assert_same(outcome.state.optimizer, good.optimizer)


def test_a_run_that_stopped_tries_again(tmp_path):
    stopped = run(tmp_path, first_state(), 9, bad=(4, 5))
    assert stopped.reason == "nonfinite"
    again = reset_nonfinite(stopped.state)
    assert int(again.extra[NONFINITE]["total"]) == 2
    outcome = run(tmp_path, again, 9)
    assert (outcome.reason, int(outcome.state.step)) == ("finished", 9)
    assert [row["step"] for row in rows_of(tmp_path, "train")] == list(range(1, 10))
    halfway = reset_nonfinite(stepped(first_state(), range(1, 6), bad=(4, 5)))
    expected = stepped(halfway, range(6, 10))
    assert_same(outcome.state.params, expected.params)


def test_bad_losses_at_the_very_end_stop_it_too(tmp_path):
    outcome = run(tmp_path, first_state(), 4, bad=(3, 4))
    assert (outcome.reason, int(outcome.state.step)) == ("nonfinite", 4)
