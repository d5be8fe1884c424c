"""Which meshes a machine can be cut into for a model, and which of them are fastest.

All are ranked by arithmetic (`experiments.plan.memory`, `experiments.plan.time`, and the traffic of
`parallel.traffic_formulas`), which takes a second each; only the best are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.plan.compile import FITS, Compiled, Request, compile_elsewhere
from experiments.plan.memory import Memory, memory_of
from experiments.plan.time import Time, as_collectives, seconds_of, time_of
from experiments.runs.layout import Division
from model.flops import parameter_count
from parallel.chips import Chip
from parallel.mesh import AXES
from parallel.traffic import Collective
from parallel.traffic_formulas import TEXTBOOK, TPU, Volumes, expected, gradients, volumes
from train.settings import Settings, to_json

HEADROOM = 0.92
"""Part of the memory that arithmetic may fill; the rest is for the runtime and fragments."""

SHORTEST = 1024
"""Tokens of a row that a device of a ring has at least: with fewer, hops are not hidden."""

PARTS = (8, 4, 2, 1)
"""Micro-batches of a pipeline for each of its stages, the first that divides the rows."""


@dataclass(frozen=True)
class Plan:
    """A layout and what is to be expected of it.

    Attributes:
      sizes: devices by axis.
      division: what the mesh leaves open.
      memory: by arithmetic.
      time: from `traffic`.
      traffic: of the compiled program, or of the formulas before it is compiled.
      by_axes: seconds of communication by the axes that it runs over.
      compiled: what came of compiling it, or None.
    """

    sizes: Mapping[str, int]
    division: Division
    memory: Memory
    time: Time
    traffic: tuple[Collective, ...]
    by_axes: Mapping[tuple[str, ...], float]
    compiled: Compiled | None = None

    @property
    def mesh(self) -> str:
        """As a command line writes it."""
        named = [f"{name}={size}" for name, size in self.sizes.items() if size > 1]
        return ",".join(named) or "data=1"

    def fits(self, chip: Chip) -> bool:
        """The verdict of a compiler that has one (TPU), otherwise of the arithmetic."""
        if self.compiled is not None and chip.platform == "tpu":
            return self.compiled.verdict == FITS
        compiles = self.compiled is None or self.compiled.verdict == FITS
        return compiles and self.memory.total <= HEADROOM * chip.memory


def estimate(
    settings: Settings,
    sizes: Mapping[str, int],
    division: Division,
    chip: Chip,
    attention: str = "mesh",
) -> Plan:
    """Returns a plan by arithmetic alone.

    Args:
      settings: of the run.
      sizes: devices by axis, all axes.
      division: what the mesh leaves open.
      chip: which.
      attention: a key of `experiments.plan.step.ATTENTIONS`.

    Raises:
      ValueError: a model or a batch that the mesh does not divide.
    """
    memory = memory_of(settings, sizes, division, chip.platform, attention)
    return _timed(
        settings, sizes, division, chip, memory, _formulas(settings, sizes, division, chip)
    )


def _volumes(settings: Settings, sizes: Mapping[str, int], division: Division) -> Volumes:
    """Of one of the micro-batches that a batch is accumulated over."""
    phase = settings.phases[0]
    return volumes(
        phase.model,
        sizes,
        rows=phase.batch_size // settings.micro_batches,
        time=phase.sequence_length,
        vocabulary_multiple=settings.vocabulary_multiple,
        parts=division.pipeline_micro_batches,
        rounds=division.pipeline_rounds,
    )


def _formulas(
    settings: Settings, sizes: Mapping[str, int], division: Division, chip: Chip
) -> list[Collective]:
    phase, again = settings.phases[0], settings.micro_batches
    v = _volumes(settings, sizes, division)
    backend = TPU if chip.platform == "tpu" else TEXTBOOK
    recomputes = phase.model.remat == "full"
    formulas = [  # every micro-batch gathers, sums and sends; updates are made once
        each if each.why.startswith("updated") else each._replace(times=each.times * again)
        for each in expected(v, division.strategies, backend, recomputes)
    ]
    return as_collectives(sizes, formulas)


def sums_after_loops(
    found: Sequence[Collective], v: Volumes, more: Sequence[str]
) -> list[Collective]:
    """Returns collectives with the sums of a pipeline's gradients where XLA for GPUs has them.

    What is read of a program for GPUs is how it was divided, before the passes that follow: there
    each step of a pipeline sums the gradients of its stage. XLA for GPUs moves such a sum behind
    the loop that adds up its results (the pass WhileLoopAllReduceCodeMotion), as XLA for TPUs does
    and GPipe asks for; by default it leaves a reduce-scatter, which FSDP has, where it is.

    Args:
      found: collectives of the program.
      v: volumes of the model.
      more: strategies, see `parallel.traffic_formulas.expected`.
    """
    inside = {
        (each.axes, each.bytes)
        for each in gradients(v, more, TEXTBOOK._replace(sums_after_loops=False))
        if each.times == v.blocks
    }

    def moved(each: Collective) -> Collective:
        sums = each.kind == "all-reduce" and each.times % v.blocks == 0
        if not sums or not each.parts or any((each.axes, p) not in inside for p in each.parts):
            return each
        return each._replace(times=each.times // v.blocks * v.layers)

    return [moved(each) for each in found]


def compiled(
    settings: Settings, plan: Plan, chip: Chip, attention: str = "mesh", timeout: float = 1800.0
) -> Plan:
    """Returns a plan with what its compiler says of it; its traffic is then the program's.

    Args:
      settings: of the run.
      plan: by arithmetic, from `estimate` or `search`.
      chip: that it is compiled for.
      attention: a key of `experiments.plan.step.ATTENTIONS`.
      timeout: seconds that the compiler may take.

    Raises:
      ValueError: the compiler for this chip is not installed.
    """
    mesh = ",".join(f"{name}={size}" for name, size in plan.sizes.items())
    request = Request(
        to_json(settings),
        chip.name,
        mesh,
        plan.division.strategies,
        attention,
        plan.division.pipeline_micro_batches,
        plan.division.pipeline_rounds,
    )
    result = compile_elsewhere(request, timeout)
    traffic: Sequence[Collective] = result.collectives if result.verdict == FITS else plan.traffic
    if result.verdict == FITS and chip.platform == "gpu" and plan.sizes["pipeline"] > 1:
        v = _volumes(settings, plan.sizes, plan.division)
        traffic = sums_after_loops(traffic, v, plan.division.strategies)
    made = _timed(settings, plan.sizes, plan.division, chip, plan.memory, list(traffic))
    return Plan(
        made.sizes, made.division, made.memory, made.time, made.traffic, made.by_axes, result
    )


def search(
    settings: Settings, devices: int, chip: Chip, most: int = 12, attention: str = "mesh"
) -> list[Plan]:
    """Returns the fastest plans that fit by arithmetic, in order (with nothing overlapped).

    With `sequence` wherever there is `tensor`, which stays inside a node of GPUs, and ZeRO-1
    wherever nothing else divides the state over rows.

    Args:
      settings: of the run.
      devices: how many.
      chip: which.
      most: plans, at most; memory is looked at for no more meshes than that takes.
      attention: a key of `experiments.plan.step.ATTENTIONS`.
    """
    timed = []
    budget = HEADROOM * chip.memory
    parameters = 4 * parameter_count(settings.phases[0].model)
    for sizes in meshes(devices):
        division = division_for(settings, sizes)
        parts = sizes["fsdp"] * sizes["tensor"] * sizes["pipeline"]
        if division is None or (chip.platform == "gpu" and sizes["tensor"] > chip.domain):
            continue
        if 2 * parameters / parts > budget:  # with their gradients
            continue
        traffic = _formulas(settings, sizes, division, chip)
        guess = Memory(parameters // parts, 2 * parameters // parts, parameters // parts, 0, 0)
        timed.append(_timed(settings, sizes, division, chip, guess, traffic))
    found: list[Plan] = []
    for plan in sorted(timed, key=lambda plan: plan.time.slowest):
        if len(found) == most:
            break
        try:
            memory = memory_of(settings, plan.sizes, plan.division, chip.platform, attention)
        except ValueError:  # what `division_for` does not look at
            continue
        made = _timed(settings, plan.sizes, plan.division, chip, memory, list(plan.traffic))
        if made.fits(chip):
            found.append(made)
    return sorted(found, key=lambda plan: plan.time.slowest)


def division_for(settings: Settings, sizes: Mapping[str, int]) -> Division | None:
    """Returns what a search tries on a mesh, or None where the model or the batch has no room."""
    phase = settings.phases[0]
    config = phase.model
    rows, workers = phase.batch_size // settings.micro_batches, sizes["data"] * sizes["fsdp"]
    time = phase.sequence_length // sizes["context"]
    if rows % workers or config.layers % sizes["pipeline"] or config.kv_heads_ % sizes["tensor"]:
        return None
    if sizes["context"] > 1 and time < SHORTEST:
        return None
    parts, stages = None, sizes["pipeline"]
    if stages > 1:
        fitting = [n * stages for n in PARTS if rows % (n * stages * workers) == 0]
        if not fitting:
            return None
        parts = fitting[0]
    more = ["sequence"] if sizes["tensor"] > 1 else []
    more += ["zero1"] if sizes["data"] > 1 and sizes["fsdp"] == 1 else []
    return Division(tuple(more), parts)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yields all meshes of so many devices.

    >>> len(list(meshes(8))), next(meshes(8))["tensor"]
    (35, 8)
    """

    def cut(left: int, names: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: left}
            return
        for size in (n for n in range(1, left + 1) if left % n == 0):
            for rest in cut(left // size, names[1:]):
                yield {names[0]: size, **rest}

    yield from cut(devices, AXES)


def _timed(settings, sizes, division, chip, memory, traffic: list[Collective]) -> Plan:
    by_axes = seconds_of(chip, sizes, traffic)
    time = time_of(settings, sizes, division, chip, memory, sum(by_axes.values()))
    return Plan(sizes, division, memory, time, tuple(traffic), by_axes)
