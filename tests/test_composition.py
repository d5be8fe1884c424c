"""Methods, teachers and meshes together: all train, resume bitwise, and agree across meshes."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.methods.compression import EightBitState, FakeQuantize, LowPrecision, Prune, Rewire
from experiments.methods.distill import Distil
from experiments.methods.distill_cached import DistilCached
from experiments.methods.lora import Lora
from experiments.methods.on_policy import OnPolicyDistil
from experiments.methods.privacy import DpSgd
from experiments.methods.prompts import Prefix, Prompt
from experiments.methods.table import Freeze
from experiments.methods.tuning import BitFit, LayerDecay, Unfreeze
from experiments.runs.execute import Execution, execute
from model.presets import modern_tiny
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings

METHODS = {
    "dense": (),
    "fake_int8": (FakeQuantize("int8"),),
    "prune": (Prune(0.5, every=1, times=3, start=0),),
    "saliency_2_4": (Prune(0.5, score="saliency", pattern="2:4", every=1, times=3),),
    "rigl": (Rewire(0.5, every=2, until=4),),
    "prune_and_fake_int8": (Prune(0.5, every=1, times=3), FakeQuantize("int8")),
    "frozen_embedding": (Freeze(("token_embedding",)),),
    "lora": (Lora(rank=2),),
    "qlora": (Lora(rank=2, base="q4_0", direction="dora"),),
    "lora_and_fake_int8": (Lora(rank=2, form="merged"), FakeQuantize("int8")),
    "int8_products": (LowPrecision(rounding="stochastic"),),
    "lora_and_int8_products": (Lora(rank=2, form="merged"), LowPrecision()),
    "eight_bit_state": (EightBitState(smallest=512, rounding="stochastic"),),
    "norms": (BitFit(norms=True), LayerDecay(0.5)),
    "unfreeze": (Unfreeze(every=1),),
    "prompt": (Prompt(length=2, also=(".*norm",)),),
    "prefix": (Prefix(length=2, also=("token_embedding",)),),
    "private": (Lora(rank=2), DpSgd(clip=0.01)),
}
TEACHERS = {
    "alone": lambda teacher: (),
    "taught": lambda teacher: (Distil(teacher=teacher),),
    "on_policy": lambda teacher: (OnPolicyDistil(teacher=teacher, prompt_length=4, share=0.7),),
    "cached": lambda teacher: (DistilCached(teacher=teacher, k=4),),
}
MESHES = ("", "data=2", "fsdp=2", "tensor=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Text, and a teacher trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("composition")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
        execute(settings_for(folder, (), steps=3), folder / "teacher", how(""))
        yield folder


def settings_for(home, methods, steps=5):
    return Settings(
        phases=(Phase(steps, modern_tiny(scan_layers=True), batch_size=4, sequence_length=16),),
        data=(str(home / "text.txt"),),
        tokenizer="bytes",
        optimizer=AdamW(learning_rate=1e-3),
        schedule=Linear(),
        vocabulary_multiple=2,
        methods=methods,
    )


def how(mesh):
    return Execution(LoopSettings(log_every=1, checkpoint_every=3), progress=False, mesh=mesh)


def losses(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return np.array([row["loss"] for row in rows if row["kind"] == "train"])


def bits(tree):
    def raw(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def check(home, tmp_path, method, taught, mesh):
    methods = METHODS[method]
    methods += TEACHERS[taught](str(home / "teacher"))
    settings = settings_for(home, methods)
    one = home / f"{method}-{taught}"  # the reference, made once
    if not (one / "result.json").exists():
        execute(settings, one, how(""))
    whole = execute(settings, tmp_path / "run", how(mesh))
    assert whole.reason == "finished"
    # A weight between two grid points falls to the one or the other by its last bit, and meshes
    # sum in different orders: losses of rounded weights differ by more than those of smooth ones.
    # So does a weight at the threshold that pruning keeps or drops.
    rtol = 1e-4 if "int8" in method or "prune" in method else 1e-5
    # A divergence is a difference of log-probabilities: near 0 it has their last bits for its own.
    atol = 2e-7 if taught == "on_policy" else 0
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=rtol, atol=atol)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    (tmp_path / "run" / "result.json").unlink()
    halves = execute(settings, tmp_path / "run", how(mesh))
    assert bits(halves.state) == bits(whole.state)
    return whole.state


CORE = ("dense", "fake_int8", "prune", "lora")
# Every pair of a method, a teacher and a mesh, in as few cases as there are pairs of the two
# longest lists.
PAIRWISE = [
    (method, ("alone", "taught")[(i + j) % 2], mesh)
    for i, method in enumerate(CORE)
    for j, mesh in enumerate(MESHES)
]
OTHERS = [method for method in METHODS if method not in CORE]
# All products of the core; every other method on two meshes, every other teacher with each of the
# core, in turn: the product of all would be 208 runs and twice as many resumed.
WHOLE = [
    *itertools.product(CORE, ("alone", "taught"), MESHES),
    *(
        (method, tuple(TEACHERS)[(i + j) % 4], MESHES[(i + 2 * j) % 4])
        for i, method in enumerate(OTHERS)
        for j in range(2)
    ),
    *(
        (method, taught, MESHES[(i + j) % 4])
        for i, method in enumerate(CORE)
        for j, taught in enumerate(("on_policy", "cached"))
    ),
]
# Everything at once, on every mesh.
WHOLE += [("prune_and_fake_int8", "taught", mesh) for mesh in MESHES]
WHOLE = [case for case in dict.fromkeys(WHOLE) if case not in PAIRWISE]


@pytest.mark.parametrize(("method", "taught", "mesh"), PAIRWISE)
def test_methods_teachers_and_meshes_compose(home, tmp_path, method, taught, mesh):
    check(home, tmp_path, method, taught, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "taught", "mesh"), WHOLE)
def test_all_of_them_compose(home, tmp_path, method, taught, mesh):
    check(home, tmp_path, method, taught, mesh)


def resume(home, folder, method, taught):
    """What a process that begins with nothing does."""
    methods = METHODS[method] + TEACHERS[taught](str(home / "teacher"))
    execute(settings_for(home, methods), folder, how(""))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_resume_bitwise_in_a_fresh_process(home, tmp_path, method):
    methods = METHODS[method] + TEACHERS["cached"](str(home / "teacher"))
    settings = settings_for(home, methods)
    whole = execute(settings, tmp_path / "run", how(""))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    (tmp_path / "run" / "result.json").unlink()
    call = f"resume(Path({str(home)!r}), Path({str(tmp_path / 'run')!r}), {method!r}, 'cached')"
    program = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        f"from pathlib import Path\nfrom tests.test_composition import resume\n{call}"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)
    assert (tmp_path / "run" / "checkpoints" / "5").exists()
    halves = execute(settings, tmp_path / "run", how(""))  # opens what the other process made
    assert bits(halves.state) == bits(whole.state)


@pytest.mark.slow
def test_masks_end_at_the_asked_sparsity(home, tmp_path):
    def state_of(method):
        settings = settings_for(home, METHODS[method])
        return execute(settings, tmp_path / method, how("")).state

    masks = jax.tree.leaves(state_of("saliency_2_4").extra["prune"]["masks"])
    for mask in masks:
        in_fours = np.asarray(mask).reshape(*mask.shape[:-2], -1, 4, mask.shape[-1])
        assert (in_fours.sum(axis=-2) == 2).all()
    up = np.asarray(state_of("rigl").params["blocks"]["mlp"]["up"]["kernel"])
    assert (up == 0).mean(axis=(1, 2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Prune(1.0, every=1, times=3), "sparsity"),
        (Prune(0.5, start=4, every=1, times=3), "goes on until step 7, and the run has 5"),
        (Rewire(0.5, until=9), "goes on until step 9"),
        (Prune(rules=(("nothing", 0.5),), every=1, times=3), "no parameter matches 'nothing'"),
        (FakeQuantize(rules=((".*bias_", "int8"),)), "no parameter matches"),
    ],
)
def test_what_does_not_fit_is_refused(home, tmp_path, method, words):
    with pytest.raises(ValueError, match=words):
        execute(settings_for(home, (method,)), tmp_path / "run", how(""))


def test_an_unknown_format_is_refused_at_once():
    with pytest.raises(ValueError, match="int5x"):
        FakeQuantize("int5x")
