"""The demo: a baseline for a fixed number of steps, then the recommended recipe to the same loss.

The baseline is the mission's own: GPT-2's block with its dropout under Adam at a constant 1e-4,
which nobody tuned. The ratio is an illustration on one seed, not a claim about tuned baselines.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from experiments.compare import Curve, picture
from experiments.grid import Cell, Result, run_cells
from experiments.json_files import write_json
from experiments.machine import machine
from experiments.protocol import Time, table, time_to
from experiments.recipes import DEMO, PAIRS, baseline, recommended
from experiments.runs.execute import Execution
from experiments.runs.run import open_run
from model.flops import parameter_count
from model.generate import Sampling, generate
from train.loop import LoopSettings

SIZE = dataclasses.replace(DEMO, bigram_rows=PAIRS)
STEPS = 400  # about a minute of the baseline's training on two cores
RECIPE_STEPS = 40  # what the recipe's schedule spans where it stops at the target
EVALUATIONS = 8  # of the runs of full length; one costs about two seconds
CLOSE = 2  # steps between evaluations on the way to the target, which it passes in a few
PROMPT = "def read_"


def run_demo(out: Path, seed: int, cells: Path) -> None:
    """Runs what is missing, writes and prints.

    Args:
      out: folder of the results.
      seed: of all runs.
      cells: folder of the runs.
    """
    whole = LoopSettings(evaluate_every=STEPS // EVALUATIONS)
    base = _run(
        f"1. baseline: GPT-2 block, Adam at a constant 1e-4, {STEPS} steps",
        Cell("baseline", baseline(SIZE, STEPS, seed), whole),
        cells,
    )
    ours = _run(
        "2. recommended: modern block, Muon, pairs of tokens, until the baseline's loss of "
        f"{base.loss:.4f}",
        Cell(
            "recommended",
            recommended(SIZE, RECIPE_STEPS, seed),
            LoopSettings(evaluate_every=CLOSE, target_loss=base.loss),
        ),
        cells,
    )
    longer = _run(
        f"3. recommended: for as many steps as the baseline, {STEPS}",
        Cell("recommended", recommended(SIZE, STEPS, seed), whole),
        cells,
    )
    times = [time_to(result, base.loss) for result in (base, ours)]
    text = f"{table(times)}\n\n{_equal_steps(base, longer)}"
    _write(out, text, base, times, longer)
    print(f"\n{text}\n\n{_sample(longer, seed)}\n")
    written = (str(out / f"speedrun.{kind}") for kind in ("md", "json", "png"))
    print(f"written: {', '.join(written)}")


def _run(title: str, cell: Cell, folder: Path) -> Result:
    print(f"\n{title}")
    start = time.perf_counter()
    (result,) = run_cells([cell], folder, execution=Execution(keep_last=1))
    if time.perf_counter() - start < 1:
        print("   (finished earlier; --fresh runs it again)")
    return result


def _equal_steps(base: Result, longer: Result) -> str:
    return (
        f"After {STEPS} steps each, the validation loss is {base.loss:.3f} for the baseline and "
        f"{longer.loss:.3f} for the recommended recipe ({_bits(base):.3f} and {_bits(longer):.3f} "
        "bits per byte)."
    )


def _bits(result: Result) -> float:
    return float(result.evaluations[-1]["bits_per_byte"])


def _write(out: Path, text: str, base: Result, times: list[Time], longer: Result) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "command": "python -m experiments.speedrun --scale demo",
        "machine": machine(),
        "target": base.loss,
        "runs": [dataclasses.asdict(t) for t in times],
        "equal_steps": {"steps": STEPS, "baseline": base.loss, "recommended": longer.loss},
    }
    write_json(out / "speedrun.json", content)
    (out / "speedrun.md").write_text(text + "\n")
    picture([_curve("baseline", base), _curve("recommended", longer)], out / "speedrun.png")


def _curve(name: str, result: Result) -> Curve:
    rows = result.evaluations
    return Curve(
        name,
        [row["step"] for row in rows],
        [float(row["loss"]) for row in rows],
        [row["seconds"] for row in rows],
        {},
    )


def _sample(result: Result, seed: int) -> str:
    """A continuation by the recommended run, and what wrote it."""
    run = open_run(result.folder)
    found = generate(
        run.model,
        run.params,
        [run.tokenizer.encode(PROMPT).tolist()],
        key=jax.random.key(seed),
        max_new_tokens=100,
        sampling=Sampling(temperature=0.7, top_p=0.9),
        stop_tokens=[run.tokenizer.end_of_document],
    )
    size = parameter_count(run.model.config)
    text = PROMPT + run.tokenizer.decode(found.new_tokens()[0])
    body = "\n".join(f"  | {line}" for line in text.splitlines())
    return f"What {size / 1e6:.1f} M parameters write after {run.step} steps of it:\n{body}"
