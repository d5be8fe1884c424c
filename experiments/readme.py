"""Fills the README's figures in from the result files, so that they cannot drift.

    python -m experiments.readme

A block between `<!-- NAME -->` and `<!-- /NAME -->` is made by the function of that name below.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from experiments.ablate.optimizers import COSTS, MISSION
from experiments.ablate.rates import TUNED, WAYS, WIDTHS, best_rate, curves, loss_of_tuned
from experiments.bench.clock import spread
from experiments.bench.gpu_forms import DATASHEET
from experiments.headlines import bench, speedrun
from experiments.headlines_transfer import transfer
from experiments.ladder.scales import CPU
from experiments.parameter_server import seconds_to
from experiments.scale.compression import sizes
from experiments.scale.equality import equal
from experiments.shakespeare_report import headline
from experiments.tables.gathered import Results
from experiments.tables.report import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


def demo_output() -> str:
    """What `make demo` prints at its end, from the table on."""
    printed = (RESULTS / "demo.txt").read_text()
    return "```\n" + printed[printed.index("| run |") :].strip() + "\n```"


def demo_machine() -> str:
    """What the demo ran on."""
    facts = json.loads((RESULTS / "demo.json").read_text())["machine"]
    return (
        f"Printed on {facts['cores']} cores of an {facts['processor']} with jax {facts['jax']}; "
        "one seed, so an illustration and no claim."
    )


def loop() -> str:
    """The share of the bare step's throughput that the loop keeps, and its spread."""
    facts = json.loads((RESULTS / "loop-overhead.json").read_text())
    return (
        f"{100 * facts['median']:.1f} % ({100 * facts['lowest']:.0f} to "
        f"{100 * facts['highest']:.0f} % in {len(facts['ratios'])} pairs)"
    )


def shakespeare() -> str:
    """Tiny Shakespeare at the size that nanoGPT gives for a CPU."""
    facts = json.loads((RESULTS / "shakespeare.json").read_text())
    crossed = [step for step in facts["steps_to_published"] if step]
    losses = ", ".join(f"{loss:.3f}" for loss in facts["losses"])
    beside = f"; {headline(facts)}" if "rows" in facts else ""
    return (
        f"Tiny Shakespeare in bytes (4 layers, width 128, context 64, batch 12, {facts['steps']} "
        f"steps): validation loss {losses} over {facts['seeds']} seeds; nanoGPT gives "
        f"{facts['published']} for this size, passed after {min(crossed)} to {max(crossed)} steps"
        f"{beside} (`python -m experiments.shakespeare --data FILE`)."
    )


def gpu() -> str:
    """The training step on a GPU, as the table of its forms has it."""
    rows = json.loads((RESULTS / "bench-h100.json").read_text())["gpu-forms"]
    made = {row["settings"]["row"]: row["values"] for row in rows}
    step, plain = made["default"], made["attention with all scores"]
    seconds, without = (spread(values["seconds"])[0] for values in (step, plain))
    return (
        f"the table's default step of GPT-2 124M, 32 rows of 1,024, ran on an H100 at "
        f"{step['tokens'] / seconds / 1000:,.0f} k tokens/s, "
        f"{step['flops'] / seconds / DATASHEET:.1%} of 989 TFLOP/s, and with all scores held at "
        f"{plain['tokens'] / without / 1000:,.0f} k"
    )


def optimizers() -> str:
    """Which optimizers end lowest, each at its own rate, and where those of the mission stand."""
    results = read(RESULTS / "optimizers-cpu.json").results("optimizers")
    losses = {
        name: statistics.fmean(float(values["loss"]) for values in seeds.values())
        for name, seeds in results.by_name.items()
        if seeds and name != COSTS
    }
    order = sorted(losses, key=losses.__getitem__)
    chosen = [*order[:5], *(name for name in order[5:] if name in MISSION)]
    seeds = max(map(len, results.by_name.values()))
    return (
        f"{len(losses)} optimizers and variants, each at a rate of its own, by the validation loss "
        "at the end of one small model's schedule: "
        + "; ".join(f"{name} {losses[name]:.3f}" for name in chosen)
        + f" (means over {seeds} seeds, an exploration; `python -m experiments.ablate optimizers`, "
        "experiments/results/optimizers-cpu.md)."
    )


def widths() -> str:
    """How far the best rate wanders over widths, as it is and by muP."""
    results = read(RESULTS / "rates-cpu.json").results("widths")
    seeds = max(map(len, results.by_name.values()))
    said = []
    for way in WAYS:
        found = curves(results, way)
        best = {width: best_rate(losses) for width, losses in found.items()}
        lost = max(loss_of_tuned(found))
        said.append(
            f"{max(best.values()) / min(best.values()):.1f}x ({way}; what suits width {TUNED} "
            f"costs up to {lost:.3f} nats at another)"
        )
    return (
        f"AdamW's best rates for widths {min(WIDTHS)} to {max(WIDTHS)} lie within "
        f"{' and within '.join(said)} of each other "
        f"(seeds: {seeds}, an exploration; `python -m experiments.ablate rates`, "
        "experiments/results/rates-cpu.md)."
    )


def scale() -> str:
    """What meshes, compressed gradients, DiLoCo and the server gave on virtual devices."""
    gathered = read(RESULTS / "scale-cpu.json")
    meshes = [v for seeds in gathered.results("equality").by_name.values() for v in seeds.values()]
    compressed = gathered.results("compression")
    sent = max(v["program"] / v["plain"] for v in sizes(compressed) if v["form"] == "int8")
    seeds = len(compressed.shared("none", "int8"))
    rounds = gathered.results("diloco")
    servers = gathered.results("server")
    runs = {form: servers.by_name[form] for form in ("synchronous", "asynchronous")}
    ratios = []
    for seed, synchronous in runs["synchronous"].items():
        ends = seconds_to(synchronous["curve"], synchronous["loss"])
        found = seconds_to(runs["asynchronous"][seed]["curve"], synchronous["loss"])
        ratios.append(ends / found if ends and found else math.nan)
    return (
        f"On 8 virtual CPU devices {sum(map(equal, meshes))} of {len(meshes)} meshes train as one "
        f"device does. int8 gradients send {sent:.1%} of the bytes and end at a loss "
        f"{off(compressed, 'none', 'int8'):+.2%} away over {seeds} seeds; DiLoCo with meetings "
        "every 50 steps sends a 50th and ends "
        f"{off(rounds, 'synchronous', 'H = 50'):+.1%} away; a parameter server with one of three "
        f"workers 5 times slower reaches the synchronous loss in "
        f"{min(ratios):.1f} to {max(ratios):.1f} times less time "
        "(`python -m experiments.scale`, experiments/results/scale-cpu.md)."
    )


def off(results: Results, plain: str, other: str) -> float:
    """The mean relative distance of a row's losses from another's, in pairs of a seed."""
    ours, theirs = results.pair(other, plain, "loss")
    return statistics.fmean(a / b - 1 for a, b in zip(ours, theirs, strict=True))


# Blocks that stand on lines of their own, and those within a sentence.
BLOCKS: dict[str, Callable[[], str]] = {
    "demo-output": demo_output,
    "demo-machine": demo_machine,
    "speedrun": lambda: speedrun(RESULTS / "speedrun-cpu.json", CPU),
    "bench": lambda: bench(RESULTS / "bench-cpu.json"),
    "transfer": lambda: transfer(RESULTS / "transfer-cpu.json"),
}
PHRASES: dict[str, Callable[[], str]] = {
    "loop": loop,
    "shakespeare": shakespeare,
    "optimizers": optimizers,
    "widths": widths,
    "scale": scale,
    "gpu": gpu,
}


def filled(text: str) -> str:
    """Returns the text with every block made anew.

    Raises:
      ValueError: a block that no function makes, or a function without a block.
    """
    found = re.findall(r"<!-- ([\w-]+) -->", text)
    if sorted(found) != sorted([*BLOCKS, *PHRASES]):
        known = [*BLOCKS, *PHRASES]
        raise ValueError(f"the README has the blocks {found}, and there are functions for {known}")
    for makers, edge in ((BLOCKS, "\n"), (PHRASES, "")):
        for name, make in makers.items():
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            before, _, rest = text.partition(start)
            _, closed, after = rest.partition(end)
            if not closed:
                raise ValueError(f"the block {name} of the README does not end with {end}")
            text = f"{before}{start}{edge}{make()}{edge}{end}{after}"
    return text


def main() -> None:
    """Rewrites the README."""
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
    print(path)


if __name__ == "__main__":
    main()
