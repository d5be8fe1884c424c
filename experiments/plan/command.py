"""Plans a training run for a machine that is not here: does it fit, and how fast can it be?

    python -m experiments.plan --model llama3-70b --chip h100 --mesh data=4,fsdp=16,tensor=8 \
        --batch 512 --sequence 4096
    python -m experiments.plan --model llama3-70b --chip v5p --devices 512 --search --batch 512
    python -m experiments.plan --chips

The step is the one that a run executes, lowered and compiled without allocating anything: for TPUs
by their own compiler (extra `tpu-plan`), whose word on memory counts, for GPUs divided over as many
virtual CPU devices, with memory by arithmetic. Times are from published peaks and are bounds: no
kernel reaches a peak. A plan takes from ten seconds to a few minutes, a search some minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax

from experiments.plan.compile import FITS, missing, topology_of
from experiments.plan.search import HEADROOM, Plan, compiled, estimate, search
from experiments.runs.layout import Division
from model.config import TransformerConfig
from model.flops import parameter_count
from model.presets import PRESETS, llama
from parallel.chips import Chip, chip_named, chips_table
from parallel.mesh import axis_sizes, parse_mesh
from parallel.report import readable
from parallel.traffic import table
from train.optimizers import OPTIMIZERS
from train.settings import Phase, Settings

Model = Callable[..., TransformerConfig]

MODELS: dict[str, Model] = {
    **PRESETS,
    # Touvron et al. 2023 (arXiv:2307.09288) and Llama Team 2024 (arXiv:2407.21783).
    "llama2-7b": llama,
    "llama2-13b": functools.partial(llama, layers=40, width=5120, heads=40, ffn_width=13_824),
    "llama2-70b": functools.partial(
        llama, layers=80, width=8192, heads=64, kv_heads=8, ffn_width=28_672
    ),
    "llama3-8b": functools.partial(
        llama, kv_heads=8, ffn_width=14_336, vocabulary_size=128_256, max_length=8192
    ),
    "llama3-70b": functools.partial(
        llama,
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        ffn_width=28_672,
        vocabulary_size=128_256,
        max_length=8192,
    ),
}
"""Models by the names that a command line uses: the presets, and published large ones."""


@dataclass(frozen=True)
class Command:
    """What to plan.

    Attributes:
      model: a model preset, or one of the published large ones.
      chip: see --chips.
      mesh: devices by axis, as in "data=2,tensor=4".
      devices: how many; needed for a search, or where the mesh has -1.
      batch: rows of the global batch.
      sequence: tokens of a row.
      search: find the best mesh.
      compile: how many of the best meshes of a search are compiled; 0 for arithmetic alone.
      strategies: "zero1" divides optimizer state over `data`, "sequence" time over `tensor`.
      optimizer: by name.
      dtype: of the computation; parameters are kept in float32.
      remat: what the backward pass recomputes.
      micro_batches: parts that a batch is accumulated over.
      loss_chunk: positions whose logits are held at a time.
      pipeline_micro_batches: parts in which rows pass the axis `pipeline`.
      pipeline_rounds: times that each part passes it.
      attention: the target's form: "mesh" is a ring over `context`, otherwise what a run takes
        there: on a GPU cuDNN's fused kernel where it can, else "plain", which keeps all scores.
      vocabulary_multiple: what the vocabulary is padded to a multiple of.
      timeout: seconds that a compiler may take.
      chips: print the table of chips with its sources, and nothing else.
    """

    model: str = "llama2-7b"
    chip: str = "h100"
    mesh: str = ""
    devices: int | None = None
    batch: int = 256
    sequence: int = 4096
    search: bool = False
    compile: int = 3
    strategies: tuple[str, ...] = ()
    optimizer: str = "adamw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "full", "dots"] = "full"
    micro_batches: int = 1
    loss_chunk: int | None = None
    pipeline_micro_batches: int | None = None
    pipeline_rounds: int = 1
    attention: Literal["mesh", "plain", "fused", "ring"] = "mesh"
    vocabulary_multiple: int = 128
    timeout: float = 1800.0
    chips: bool = False


def settings_of(command: Command) -> Settings:
    """Returns the settings of the run that is planned.

    Raises:
      ValueError: an unknown model or optimizer, or sizes that do not fit.

    >>> settings_of(Command(model="llama3-70b")).phases[0].model.layers
    80
    """
    if command.model not in MODELS:
        raise ValueError(f"no model is called {command.model!r}; there are {', '.join(MODELS)}")
    if command.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"no optimizer is called {command.optimizer!r}; there are {', '.join(OPTIMIZERS)}"
        )
    config = MODELS[command.model](dtype=command.dtype, remat=command.remat, scan_layers=True)
    config = dataclasses.replace(config, max_length=max(config.max_length, command.sequence))
    return Settings(
        phases=(Phase(1, config, command.batch, command.sequence),),
        optimizer=OPTIMIZERS[command.optimizer](),
        micro_batches=command.micro_batches,
        loss_chunk=command.loss_chunk,
        vocabulary_multiple=command.vocabulary_multiple,
    )


def sizes_of(command: Command) -> dict[str, int]:
    """Returns the devices by axis of the mesh that a command names.

    Raises:
      ValueError: axes that do not multiply to `devices`, or no number of devices at all.

    >>> sizes_of(Command(mesh="fsdp=4,tensor=2"))["fsdp"]
    4
    """
    asked = parse_mesh(command.mesh)
    if command.devices is None:
        if -1 in asked.values():
            raise ValueError(f"the mesh {command.mesh!r} takes all devices; say --devices N")
        return axis_sizes(asked, math.prod(asked.values()))
    return axis_sizes({"data": -1, **asked} if "data" not in asked else asked, command.devices)


def run_command(command: Command) -> str:
    """Plans, and returns the report."""
    if command.chips:
        return chips_table()
    settings, chip = settings_of(command), chip_named(command.chip)
    if command.search:
        if command.devices is None:
            raise ValueError("a search needs the number of chips; give --devices N")
        check_slice(chip, command.devices)
        plans = searched(settings, command, chip)
        return head(command, settings, chip, command.devices) + "\n\n" + search_table(plans, chip)
    sizes = sizes_of(command)
    check_slice(chip, math.prod(sizes.values()))
    if reason := missing(chip):
        raise ValueError(reason)
    division = Division(command.strategies, command.pipeline_micro_batches, command.pipeline_rounds)
    plan = estimate(settings, sizes, division, chip, command.attention)
    plan = compiled(settings, plan, chip, command.attention, command.timeout)
    first = head(command, settings, chip, math.prod(sizes.values()))
    return f"{first}\nmesh {plan.mesh}\n\n{report(plan, chip, command)}"


def check_slice(chip: Chip, devices: int) -> None:
    """Checks that there are machines of so many chips.

    Raises:
      ValueError: nobody rents a slice of so many TPUs; the sizes are listed.
    """
    if chip.platform == "tpu":
        topology_of(chip, devices)


def searched(settings: Settings, command: Command, chip: Chip) -> list[Plan]:
    """Returns the plans that fit, the best first: those that were compiled, then the others.

    Compiling goes on until `command.compile` of them are accepted.

    Raises:
      ValueError: nothing fits, or the compiler for this chip is not installed.
    """
    assert command.devices is not None
    if command.compile and (reason := missing(chip)):
        raise ValueError(f"{reason}; or rank by arithmetic alone with --compile 0")
    ranked = search(settings, command.devices, chip, attention=command.attention)
    if not ranked:
        raise ValueError(
            f"no mesh of {command.devices} {chip.name} holds {command.model} with a batch of "
            f"{command.batch} rows of {command.sequence}; take more chips, more --micro-batches, "
            "a --loss-chunk or a smaller batch"
        )
    accepted: list[Plan] = []
    refused: list[Plan] = []
    for place, plan in enumerate(ranked):
        if len(accepted) >= command.compile or len(refused) >= 2 * command.compile:
            return sorted(accepted, key=_speed) + ranked[place:] + refused
        made = compiled(settings, plan, chip, command.attention, command.timeout)
        (accepted if made.fits(chip) else refused).append(made)
    return sorted(accepted, key=_speed) + refused


def _speed(plan: Plan) -> float:
    return plan.time.slowest


def head(command: Command, settings: Settings, chip: Chip, devices: int) -> str:
    """Returns the first lines of a report."""
    phase = settings.phases[0]
    return (
        f"{command.model}: {parameter_count(phase.model) / 1e9:.2f} B parameters, "
        f"{command.optimizer}, {command.dtype}, remat {command.remat}\n"
        f"{devices} x {chip.name} ({chip.flops / 1e12:.0f} TFLOP/s, {readable(chip.memory)}; "
        f"{chip.source})\nbatch {command.batch} x {command.sequence} tokens"
        + (f" in {command.micro_batches} micro-batches" if command.micro_batches > 1 else "")
    )


def report(plan: Plan, chip: Chip, command: Command) -> str:
    """Returns what is to be expected of one mesh, as lines of text.

    Traffic and times are those of a program that was compiled; without one there are none.
    """
    memory, time, result = plan.memory, plan.time, plan.compiled
    assert result is not None
    lines = [f"{'bytes on each device':<32}{'arithmetic':>12}"]
    rows = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "activations saved": memory.saved,
        "activations at work": memory.working,
        "total": memory.total,
    }
    lines += [f"{name:<32}{readable(number):>12}" for name, number in rows.items()]
    lines.append(f"{'of the memory':<32}{memory.total / chip.memory:>12.1%}")
    if chip.platform == "tpu":
        verdict = f"TPU compiler, in {result.seconds:.0f} s: {result.verdict}"
        if result.verdict == FITS:
            verdict += (
                f", state and batch {readable(result.state)}, "
                f"temporaries {readable(result.temporaries)}"
            )
        lines.append(verdict + (f" ({result.message})" if result.message else ""))
    else:
        enough = memory.total <= HEADROOM * chip.memory
        fits = "fits" if enough else f"does not fit into {HEADROOM:.0%} of it"
        lines.append(f"by arithmetic: {fits}")
        if result.verdict != FITS:
            lines.append(f"compiling for virtual devices: {result.verdict} ({result.message})")
    if result.verdict != FITS:
        return "\n".join([*lines, "no plan: this mesh has no program to take times from"])
    lines += ["", "traffic of a step, from the compiled program", table(plan.traffic), ""]
    lines += [
        f"{'seconds of a step':<32}{'':>12}",
        f"{'products of matrices':<32}{time.matrices:>12.4f}",
        f"{'update':<32}{time.update:>12.4f}",
    ]
    for axes, seconds in sorted(plan.by_axes.items(), key=lambda item: -item[1]):
        lines.append(f"{'communication over ' + '+'.join(axes):<32}{seconds:>12.4f}")
    low, high = time.utilisation
    tokens = command.batch * command.sequence
    lines += [
        f"{'step, nothing overlapped':<32}{time.slowest:>12.4f}",
        f"{'step, everything overlapped':<32}{time.fastest:>12.4f}",
        f"{'utilisation at most':<32}{f'{low:.1%} - {high:.1%}':>16}",
        f"{'tokens a second, at most':<32}{tokens / time.fastest:>12,.0f}",
    ]
    return "\n".join(lines)


def search_table(plans: Sequence[Plan], chip: Chip, most: int = 12) -> str:
    """Returns the best plans as lines of text."""
    lines = [
        f"{'mesh':<40}{'strategies':<18}{'state':>10}{'needs':>10}{'compute s':>11}{'comm. s':>9}"
        f"{'utilisation':>16}  compiled"
    ]
    for plan in plans[:most]:
        more = list(plan.division.strategies)
        if plan.division.pipeline_micro_batches:
            more.append(f"M={plan.division.pipeline_micro_batches}")
        result = plan.compiled
        word = "no" if result is None else f"{result.verdict}, {result.seconds:.0f} s"
        low, high = plan.time.utilisation
        times = [f"{plan.time.compute:.3f}", f"{plan.time.communication:.3f}"]
        times.append(f"{low:.1%} - {high:.1%}")
        if result is not None and result.verdict != FITS:
            times = ["-"] * 3
        lines.append(
            f"{plan.mesh:<40}{','.join(more):<18}{readable(plan.memory.state):>10}"
            f"{readable(plan.memory.total):>10}{times[0]:>11}{times[1]:>9}{times[2]:>16}  {word}"
        )
    lines.append("traffic is the program's where it was compiled, and the formulas' otherwise")
    if plans[0].fits(chip):
        lines.append(f"best: --mesh {plans[0].mesh}" + _flags(plans[0].division))
    return "\n".join(lines)


def _flags(division: Division) -> str:
    text = f" --strategies {' '.join(division.strategies)}" if division.strategies else ""
    if division.pipeline_micro_batches:
        text += f" --pipeline-micro-batches {division.pipeline_micro_batches}"
    return text


def main() -> None:
    """Parses the command line, plans, prints."""
    import tyro

    jax.config.update("jax_platforms", "cpu")  # nothing runs here, whatever this machine has
    print(run_command(tyro.cli(Command, description=__doc__)))
