"""The bench's tables for a GPU, at a tiny size on a CPU, and what becomes of what fails."""

import dataclasses
import json

import pytest

from experiments.bench import __main__ as bench
from experiments.bench import alone, child, gpu_forms, gpu_products, gpu_step, gpu_train
from experiments.bench.alone import FAILED, ask_once
from experiments.bench.child import serve
from experiments.bench.gpu_step import StepForm
from experiments.bench.kernels import kernels, products
from experiments.bench.shapes import SHAPES, Shape, shape_to_json
from experiments.bench.table import Job, Table
from experiments.grid import Measured, Measurement
from model.presets import gpt2_tiny

TINY = Shape(gpt2_tiny(dropout=0.0, dtype="bfloat16"), 2, 8)


def measured(name, settings, values):
    return Measured(Measurement(name, settings, dict), values, 1.0, {"gpu": "one"})


def asked(subject, settings, what, *, limit, environment=None, **arguments):
    """Asks in this process."""
    lines = [{"subject": subject, "settings": settings}, {"ask": what, "arguments": arguments}]
    given = iter([json.dumps(line) + "\n" for line in lines] + [""])
    answers = []
    serve(lambda: next(given), lambda text: answers.append(json.loads(text)))
    return answers[-1]["answer"]


def step(**changes):
    form = dataclasses.asdict(StepForm(**changes))
    return gpu_step.subject({"shape": shape_to_json(TINY), "form": form})


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dispatched": 2, "lookup": "blocks", "multiple": 1},
        {"scan": True, "remat": "full", "lookup": "one_hot", "chunk": 8},
        {"remat": "dots", "lookup": "sorted", "vocabulary": 72, "rows": 4, "attention": "plain"},
    ],
)
def test_every_form_trains_the_same_model(changes):
    found = step(**changes).asks["time"](steps=2, repeats=2)
    rows = changes.get("rows") or TINY.batch_size
    assert found["tokens"] == rows * 8
    assert len(found["seconds"]) == 2
    assert found["loss"] < 4.5  # log 64 is 4.2
    assert found["peak"] > 0


def test_forms_start_from_the_same_loss():
    def first(**changes):
        subject = step(**changes)
        return subject.asks["time"](steps=1, repeats=1)["loss"]

    assert first(lookup="blocks", scan=True) == pytest.approx(first(), abs=0.02)


def test_every_row_differs_from_the_default_in_what_it_names_and_says_what_it_expects():
    rows = {m.name: m.settings for m in gpu_forms.measurements()}
    assert len({json.dumps(s["form"], sort_keys=True) for s in rows.values()}) == len(rows)
    assert set(rows) - set(gpu_forms.EXPECTED) == {gpu_forms.DEFAULT}
    flags = rows["products not merged"]
    assert gpu_forms.environment(flags)["XLA_FLAGS"] == "--xla_gpu_dot_merger_threshold_mb=0"
    assert "XLA_FLAGS" not in gpu_forms.environment(rows[gpu_forms.DEFAULT])


def test_the_table_of_forms_compares_with_the_default():
    values = {"seconds": [0.1] * 5, "tokens": 1000, "flops": 989e11, "peak": 2**31, "compile": 3.0}
    profile = {"kernels": {"device busy": [0.09, 10.0], "gemm": [0.05, 4.0]}}
    text = gpu_forms.text(
        [
            measured("default", {}, {**values, "profile": profile}),
            measured("16 rows", {}, {**values, "seconds": [0.2] * 5}),
        ]
    )
    assert "| default | 100.00 (100.00 to 100.00) | 10 k | 100.0% | +0.0% | 2.0 | 3 |" in text
    assert "| 16 rows | 200.00 (200.00 to 200.00) | 5 k | 50.0% | -50.0% |" in text
    assert "| `gemm` | 50.000 | 4 |" in text


def test_products_are_right_in_every_type(monkeypatch):
    monkeypatch.setattr(gpu_products, "ask_once", asked)
    monkeypatch.setattr(gpu_products, "SECONDS", 1e-4)
    kinds = list(gpu_products.KINDS)
    settings = {"inputs": 32, "outputs": 48, "rows": [16], "kinds": kinds}
    found = gpu_products.measure_products(settings)
    assert found["int8 -> int32"]["16"]["error"] == 0
    assert all(0 <= found[kind]["16"]["error"] < 0.01 for kind in kinds)
    assert any("s8 x s8 -> s32" in each for each in found["int8 -> int32"]["16"]["products"])
    found["fp8 -> bf16"]["16"] = {FAILED: "no such kernel"}
    text = gpu_products.products_text([measured("up", settings, found)])
    assert "| up, 32 x 48 | 16 |" in text
    assert "* Failed: fp8 -> bf16, 16 rows: no such kernel" in text


def test_ceilings(monkeypatch):
    monkeypatch.setattr(gpu_products, "ask_once", asked)
    monkeypatch.setattr(gpu_products, "SECONDS", 1e-4)
    settings = {"square": 32, "copied": 256}
    found = gpu_products.measure_ceilings(settings)
    assert min(found["flops"] + found["bandwidth"]) > 0
    assert "| cpu |" in gpu_products.ceilings_text([measured("ceilings", settings, found)])


def test_the_table_against_torch():
    sides = ("ours", "torch eager", "torch.compile")
    settings = {"shape": shape_to_json(SHAPES["124m-cuda"]), "steps": 10}
    values = {
        "seconds": {side: [0.5 * (1 + n)] * 3 for n, side in enumerate(sides)},
        "losses": {side: [3.0 - 0.01 * n] for n, side in enumerate(sides)},
        "facts": {"ours": {"flops_per_token": 8e8}},
        "memory": {side: {"peak": 2**30} for side in sides},
        "peak": 800e12,
    }
    text = gpu_train.text([measured("one", settings, values)])
    assert "| ours | 328 k | 26.5% | 32.8% |" in text
    assert "| torch.compile | 109 k | 8.8% | 10.9% | 3.00x (3.00 to 3.00) | 1.0 | 0.0200 |" in text


def test_a_process_that_fails_or_takes_too_long_says_so(monkeypatch):
    found = ask_once("no such subject", {}, "time", limit=60)
    assert "KeyError" in found[FAILED]
    monkeypatch.setattr(alone.sys, "executable", "/bin/sh")  # knows no -m
    assert "ended with status" in ask_once("any", {}, "time", limit=60)[FAILED]

    def hangs(*args, timeout, **kwargs):
        raise alone.subprocess.TimeoutExpired("child", timeout)

    monkeypatch.setattr(alone.subprocess, "run", hangs)
    assert ask_once("any", {}, "time", limit=2)[FAILED] == "not done after 2 s"


def test_what_failed_is_tried_again_and_what_needs_it_is_prepared_first(tmp_path, monkeypatch):
    made = []

    def flaky(settings):
        made.append("measured")
        if len(made) < 3:
            raise RuntimeError("no device")
        return {"found": 1}

    one = Measurement("m", {"n": 1}, flaky)
    jobs = [Job(1, lambda: made.append("prepared"))]
    table = Table("T", (one,), lambda results: str(results[0].values), None, lambda missing: jobs)
    monkeypatch.setattr(bench, "TABLES", {"one": lambda: table})
    folders = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", "--only", "one", *folders])
    with pytest.raises(ValueError, match="no device"):
        bench.main()
    assert "no device" in (tmp_path / "bench-cpu.md").read_text()
    bench.main()
    assert "{'found': 1}" in (tmp_path / "bench-cpu.md").read_text()
    bench.main()
    assert made == ["prepared", "measured"] * 2


def test_kernels_are_counted_by_what_they_are():
    text = """
      %a = bf16[2,3]{1,0} parameter(0)
      %b = bf16[3,2]{1,0} parameter(1)
      %c = (bf16[2,2]{1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
      ROOT %d = f32[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}
      %e = (bf16[2,2]{1,0}) custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"
    """
    assert kernels(text) == {"__cublas$lt$matmul": 1, "__cudnn$fmhaSoftmax": 1}
    assert products(text) == {
        "bf16 x bf16 -> bf16 by __cublas$lt$matmul": 1,
        "bf16 x bf16 -> f32 by a fusion": 1,
    }


def test_every_subject_is_known():
    assert {"gpu.step", "gpu.products", "gpu.ceilings"} < set(child.SUBJECTS)
