"""Parallel forms and methods in whole runs: equal to one device, resumed bitwise, opened."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.methods.compression import Prune
from experiments.methods.parallel import CompressedReduce, Delayed, Diloco
from experiments.runs.assemble import initial_params
from experiments.runs.execute import Execution, execute
from experiments.runs.layout import Division, mesh_of
from experiments.runs.run import open_run
from experiments.runs.start import start_of
from model.presets import llama_tiny, modern_tiny
from train.checkpoints import Checkpoints
from train.loop import LoopSettings
from train.methods import Setup
from train.optimizers import SGD, AdamW
from train.plugs import NONFINITE, State
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tokenizers.tokenizer import load_tokenizer

LINES = [
    f"the {animal} jumps over {number} lazy dogs"
    for animal in ("fox", "cat", "hen")
    for number in range(30)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A text, and a cache for what is made of it."""
    folder = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text(". ".join(LINES))
        yield folder


def settings_for(home, methods=(), steps=6, model=None, length=16, **changes):
    model = modern_tiny(layers=4) if model is None else model
    defaults = {
        "phases": (Phase(steps, model, batch_size=8, sequence_length=length),),
        "data": (str(home / "text.txt"),),
        "tokenizer": "bytes",
        "optimizer": AdamW(learning_rate=1e-3),
        "schedule": Linear(),
        "vocabulary_multiple": 8,
        "methods": tuple(methods),
    }
    return Settings(**(defaults | changes))


def how(mesh, *strategies, **changes):
    loop = LoopSettings(log_every=1, checkpoint_every=3)
    changes = {"strategies": strategies, **changes}
    return Execution(loop, progress=False, mesh=mesh, **changes)


def losses(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return np.array([row["loss"] for row in rows if "loss" in row])


def once(home, name, settings):
    """The folder of a run on one device, made when it is first asked for."""
    if not (home / name / "result.json").exists():
        execute(settings, home / name, how(""))
    return home / name


def bits(tree):
    def raw(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def cut_back_to(step, folder, copy):
    """A copy of a run of which later checkpoints are gone."""
    shutil.copytree(folder, copy)
    for each in (copy / "checkpoints").iterdir():
        if each.name.isdecimal() and int(each.name) > step:
            shutil.rmtree(each)
    assert (copy / "checkpoints" / str(step)).exists()
    (copy / "result.json").unlink()


FORMS = [
    ("pipeline=2,context=2", (), 2, {}),
    ("context=4", (), 2, {}),
    ("pipeline=4,data=2", (), 4, {"pipeline_micro_batches": 2}),
    ("pipeline=2", (), 4, {"pipeline_micro_batches": 4, "pipeline_rounds": 2}),
    ("pipeline=2,fsdp=2,tensor=2", (), 2, {}),
    ("data=2,pipeline=2,tensor=2", ("zero1",), 2, {}),
    ("pipeline=2,context=2,data=2", (), 2, {}),
    ("data=2,context=2,tensor=2", ("sequence",), 2, {}),
    ("fsdp=2,context=2,pipeline=2", (), 4, {"pipeline_micro_batches": 4, "pipeline_rounds": 2}),
]


@pytest.mark.variants(1)
@pytest.mark.parametrize(("mesh", "strategies", "layers", "changes"), FORMS)
def test_a_form_equals_one_device(home, tmp_path, mesh, strategies, layers, changes):
    """Training and evaluation, which both run in the form; and the parameters after it."""
    settings = settings_for(home, model=modern_tiny(layers=layers))
    one = once(home, f"one-{layers}", settings)
    execute(settings, tmp_path / "run", how(mesh, *strategies, **changes))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)
    ours, theirs = (open_run(folder).params for folder in (tmp_path / "run", one))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)  # Adam divides by tiny moments


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["context=4", "context=2,pipeline=2", "context=2,tensor=2"])
def test_forms_keep_windows_documents_and_accumulation(home, tmp_path, mesh):
    model = llama_tiny(layers=2, window=(5, 12), logit_softcap=10.0)
    settings = settings_for(
        home, model=model, document_boundaries="mask", micro_batches=2, loss_chunk=20
    )
    one = once(home, "windows", settings)
    execute(settings, tmp_path / "run", how(mesh))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_moves_between_forms(home, tmp_path):
    settings = settings_for(home)
    one = once(home, "one-4", settings)
    cut_back_to(3, one, tmp_path / "run")
    execute(settings, tmp_path / "run", how("context=2,data=2"))
    cut_back_to(3, tmp_path / "run", tmp_path / "again")
    outcome = execute(settings, tmp_path / "again", how("pipeline=4"))
    np.testing.assert_allclose(losses(tmp_path / "again"), losses(one), rtol=1e-5)
    up = outcome.state.params["blocks"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape)[0] == 1  # of 4 layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "method", "changes"),
    [
        ("data=4", CompressedReduce("none"), {}),
        ("data=2,tensor=2", CompressedReduce("none"), {"micro_batches": 2}),
        ("data=2,context=2", CompressedReduce("none"), {}),
        ("data=2,pipeline=2", CompressedReduce("none"), {}),
        ("", Delayed(0), {}),
        ("data=2", Delayed(0, workers=2), {"micro_batches": 2}),
        ("data=2", Diloco(1, 4, 1.0, 0.0), {"optimizer": SGD(learning_rate=0.1)}),
        ("data=2,fsdp=2", Diloco(1, None, 1.0, 0.0), {"optimizer": SGD(learning_rate=0.1)}),
        ("", Diloco(1, 1, 1.0, 0.0), {}),
    ],
)
def test_a_method_that_changes_nothing_equals_training_without(
    home, tmp_path, mesh, method, changes
):
    """The plain sum; gradients of age 0; local steps of which each is followed by a meeting."""
    settings = settings_for(home, **changes)
    one = once(home, f"plain-{sorted(changes)}", settings)
    execute(dataclasses.replace(settings, methods=(method,)), tmp_path / "run", how(mesh))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("mesh", "methods"),
    [
        ("", (Delayed(2), Prune(0.5, every=1, times=3))),
        ("data=2", (CompressedReduce("int8"),)),
        ("data=2", (CompressedReduce("int8"), Prune(0.5, every=1, times=3))),
        ("data=2,tensor=2", (CompressedReduce("top_k", density=0.1),)),
        ("data=4", (CompressedReduce("powersgd"),)),
        ("data=2", (Delayed(2, "uniform", workers=2),)),
        ("data=2", (Diloco(2, 4),)),
        ("data=2,fsdp=2", (Diloco(5),)),
    ],
)
def test_a_method_resumes_bitwise_and_opens_without_a_mesh(home, tmp_path, mesh, methods):
    settings = settings_for(home, methods, model=modern_tiny(layers=2))
    whole = execute(settings, tmp_path / "whole", how(mesh))
    cut_back_to(3, tmp_path / "whole", tmp_path / "cut")
    resumed = execute(settings, tmp_path / "cut", how(mesh))
    assert bits(resumed.state) == bits(whole.state)
    assert losses(tmp_path / "cut").tolist() == losses(tmp_path / "whole").tolist()
    assert not jax.sharding.get_abstract_mesh().shape
    kernel = np.asarray(open_run(tmp_path / "cut").params["blocks"]["mlp"]["up"]["kernel"])
    assert ((kernel == 0).mean() >= 0.5) == (len(methods) == 2)  # the masks were read, if any


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "owed"),
    [
        (CompressedReduce("int8"), lambda w: w["error"]["head"]["kernel"].sum(axis=0)),
        (CompressedReduce("powersgd"), lambda w: w["blocks"]["mlp"]["up"]["kernel"].sum(axis=0)),
        (Diloco(2), lambda w: w.params["blocks"]["mlp"]["up"]["kernel"].mean(axis=0)),
    ],
)
def test_workers_of_another_number_take_over(home, tmp_path, method, owed):
    """What the old ones owed is owed (int8 also has errors of sums), and the run goes on."""
    model = modern_tiny(layers=2, tied_head=False)
    settings = settings_for(home, (method,), model=model)
    execute(settings, tmp_path / "run", how("data=4"))
    cut_back_to(3, tmp_path / "run", tmp_path / "cut")
    with Checkpoints(tmp_path / "cut" / "checkpoints") as checkpoints:
        tokenizer = load_tokenizer(tmp_path / "cut" / "tokenizer")
        worker = []
        for mesh in (mesh_of("data=4"), mesh_of("data=2")):
            with jax.set_mesh(mesh):
                place = (tokenizer, checkpoints, tmp_path / "cut", Division(), mesh)
                state = start_of(settings, *place).state
            worker.append(state.extra[method.name].worker)
            for leaf in jax.tree.leaves(worker[-1]):
                assert leaf.shape[0] == mesh.shape["data"]
                assert leaf.sharding.shard_shape(leaf.shape)[0] == 1  # a device has its own
    four, two = (np.asarray(owed(w)) for w in worker)
    scale = max(np.abs(leaf).max() for leaf in map(np.asarray, jax.tree.leaves(four)))
    if method == CompressedReduce("int8"):  # the slices end to end, as the rule says
        flat = np.asarray(worker[0]["slice_error"]).reshape(-1)
        sizes = jax.tree.map(lambda leaf: leaf[0].size, worker[0]["error"])
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(sizes)]
        start = sum(jax.tree.leaves(sizes)[: paths.index("['head']['kernel']")])
        four = four + flat[start : start + four.size].reshape(four.shape)
    np.testing.assert_allclose(two, four, atol=1e-5 * scale)
    outcome = execute(settings, tmp_path / "cut", how("data=2"))
    assert int(outcome.state.step) == 6
    assert np.isfinite(losses(tmp_path / "cut")).all()


@pytest.mark.slow
def test_between_meetings_the_parameters_are_those_of_the_last_one(home, tmp_path):
    settings = settings_for(home, (Diloco(4, 2),), model=modern_tiny(layers=2), steps=6)
    outcome = execute(settings, tmp_path / "run", how("data=2"))
    start = initial_params(settings, open_run(tmp_path / "run").model.config)
    third = open_run(tmp_path / "run", 3).params
    table = start["head"]["kernel"][:, :257]
    np.testing.assert_allclose(third["head"]["kernel"], table, atol=1e-7)  # drawn under jit there
    workers = outcome.state.extra["diloco"].worker.params["head"]["kernel"]
    np.testing.assert_array_equal(workers[0], outcome.state.params["head"]["kernel"])  # met at 6
    np.testing.assert_array_equal(workers[0], workers[1])
    assert np.abs(workers[0] - start["head"]["kernel"]).max() > 1e-4


def test_nobody_goes_on_when_one_worker_has_given_up():
    """Its step number stands still; that of the run, and the parameters of all, do as well."""
    setup = Setup(modern_tiny(), {}, steps=10)
    plugs = Diloco(5, 2).build(setup)

    def step(state, frozen, batch):
        bad = batch["tokens"].sum() < 0
        counters = {"in_a_row": jnp.where(bad, 3, 0), "total": jnp.where(bad, 3, 0)}
        new = State(
            state.step + (~bad).astype(jnp.int32),
            state.params + 1.0,
            state.optimizer,
            state.rng,
            {NONFINITE: counters},
        )
        return new, {"loss": jnp.float32(batch["tokens"].sum()), "tokens": jnp.float32(8)}

    zero = jnp.int32(0)
    counters = {NONFINITE: {"in_a_row": zero, "total": zero}}
    with jax.set_mesh(mesh_of("data=2")):
        state = plugs.around.init(State(zero, jnp.zeros(3), {}, jax.random.key(0), counters))
        run = jax.jit(plugs.around.step(step))
        for sign, expected in ((1, (1, 0, 0)), (-1, (1, 0, 0))):
            rows = jnp.array([[1] * 8, [sign] * 8])
            state, metrics = run(state, {}, {"tokens": rows})
            number, worst, met = expected
            assert int(state.step) == number
            assert int(state.extra[NONFINITE]["in_a_row"]) == worst
            np.testing.assert_array_equal(state.params, met)
            np.testing.assert_array_equal(state.extra["diloco"].worker.params, 1.0)
            assert metrics["tokens"] == 16
            assert metrics["loss"] == (8 + sign * 8) / 2


@pytest.mark.parametrize(
    ("mesh", "changes", "division", "words"),
    [
        ("context=4", {"length": 12}, {}, "12 tokens does not divide into 2 chunks for each of 4"),
        ("context=2", {"model": modern_tiny(dropout=0.1)}, {}, "no dropout on its probabilities"),
        ("pipeline=2", {"model": modern_tiny(dropout=0.1)}, {}, "the same places of every micro"),
        ("pipeline=8", {}, {}, "4 layers do not divide over pipeline=8"),
        ("pipeline=2", {}, {"pipeline_rounds": 3}, "4 layers do not divide into 3 rounds of"),
        ("pipeline=2", {}, {"pipeline_micro_batches": 3}, "8 rows in 3 micro-batches does not"),
        (
            "pipeline=2",
            {},
            {"pipeline_micro_batches": 1, "pipeline_rounds": 2},
            "1 micro-batches do not fill groups of pipeline=2",
        ),
        ("data=2", {}, {"pipeline_rounds": 2}, "2 rounds of a pipeline have no effect"),
        ("data=2", {"methods": (Diloco(2, 3),)}, {}, "3 workers do not divide over data=2"),
        ("data=2", {"methods": (Diloco(2),)}, {"strategies": ("zero1",)}, "leave zero1 out"),
        ("", {"methods": (Diloco(2, 3),)}, {}, "8 rows does not divide into 3 parts"),
        ("", {"methods": (Delayed(workers=3),)}, {}, "8 rows does not divide into 3 parts"),
        ("", {"methods": (Delayed(-1),)}, {}, "a staleness of -1 steps"),
        ("", {"methods": (Delayed(), CompressedReduce())}, {}, "2 methods bring a gradient"),
        ("", {"methods": (Diloco(), Delayed())}, {}, "delayed remembers something"),
        ("", {"methods": (CompressedReduce("top_k", density=0),)}, {}, "the density is 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    home, tmp_path, mesh, changes, division, words
):
    with pytest.raises(ValueError, match=words):
        execute(settings_for(home, **changes), tmp_path / "run", how(mesh, **division))
    assert not (tmp_path / "run" / "settings.json").exists()


def test_settings_that_no_model_fits_are_refused_at_once():
    with pytest.raises(ValueError, match="int8, top_k, powersgd, none"):
        CompressedReduce("zip")
    with pytest.raises(ValueError, match="every is 0"):
        Diloco(0)
    with pytest.raises(ValueError, match="must be above 0"):
        Diloco(outer_rate=0.0)
