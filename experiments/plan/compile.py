"""Compiles a training step for machines that are not there, in a process of its own.

For a TPU the real compiler does it, which needs no chip (`libtpu`, extra `tpu-plan`): that it
accepts a program or runs out of memory is its own verdict. For a GPU the program is divided for as
many virtual CPU devices; what is taken from it is its collectives, as they are right after the
division, since the passes for CPUs that follow turn bfloat16 into float32. What a pass for GPUs
would still move is mended by `experiments.plan.search.sums_after_loops`.

The process is another one because the number of devices is fixed when JAX starts, and because a
compiler that crashes or hangs must not take a search with it.

    python -m experiments.plan.compile REQUEST.json RESULT.json       what `compile_elsewhere` runs
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.chips import Chip, chip_named
from parallel.traffic import Collective

FITS, NO_MEMORY, REFUSED, CRASHED, TOO_LONG = "fits", "out of memory", "refused", "crashed", "late"
"""Verdicts. For a GPU the compiler has no say in memory: "fits" then only says that it compiled."""

TORUS = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
"""Slices that are rented out, by dimensions of the torus (cloud.google.com/tpu/docs)."""


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
      settings: from `train.settings.to_json`.
      chip: a key of `parallel.chips.CHIPS`.
      mesh: with all sizes written out, as in "data=2,tensor=4".
      strategies: "zero1", "sequence".
      attention: a key of `experiments.plan.step.ATTENTIONS`.
      pipeline_micro_batches: see `experiments.runs.layout.Division`.
      pipeline_rounds: see there.
    """

    settings: dict[str, Any]
    chip: str
    mesh: str
    strategies: tuple[str, ...] = ()
    attention: str = "mesh"
    pipeline_micro_batches: int | None = None
    pipeline_rounds: int = 1


@dataclass(frozen=True)
class Compiled:
    """What came of it.

    Attributes:
      verdict: see `FITS`.
      message: of an error, shortened.
      seconds: of lowering and compiling.
      collectives: of the program.
      temporaries: bytes for activations, gradients and buffers, as this compiler planned them.
      state: bytes of parameters, optimizer state and batch on each device.
    """

    verdict: str
    message: str = ""
    seconds: float = 0.0
    collectives: tuple[Collective, ...] = ()
    temporaries: int = 0
    state: int = 0


def missing(chip: Chip) -> str:
    """Returns why steps cannot be compiled for a chip here, or "".

    >>> missing(chip_named("h100"))
    ''
    """
    if chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return (
            f"compiling for TPU {chip.name} needs libtpu, the compiler for TPUs, which needs no "
            "chip: pip install -c constraints.txt -e '.[tpu-plan]'"
        )
    return ""


def topology_of(chip: Chip, devices: int) -> str:
    """Returns the slice of so many chips, as JAX calls it.

    Raises:
      ValueError: there is none; the sizes are listed.

    >>> topology_of(chip_named("v5p"), 512), topology_of(chip_named("v5e"), 8)
    ('v5p:8x8x8', 'v5e:2x4')
    """
    sizes = {math.prod(map(int, text.split("x"))): text for text in TORUS[chip.dimensions]}
    if devices not in sizes:
        raise ValueError(
            f"there is no slice of {devices} TPU {chip.name}; there are slices of "
            f"{', '.join(map(str, sizes))}"
        )
    return f"{chip.topology}:{sizes[devices]}"


def compile_elsewhere(request: Request, timeout: float = 1800.0) -> Compiled:
    """Compiles in a child process.

    Args:
      request: what to compile.
      timeout: seconds after which the child is stopped.

    Raises:
      ValueError: the compiler for this chip is not installed (the message says how to).
    """
    chip = chip_named(request.chip)
    if reason := missing(chip):
        raise ValueError(reason)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(asdict(request)))
        environment = child_environment(chip)
        if chip.platform == "gpu":
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = (
                f"{flags} --xla_dump_to={folder}/dump --xla_dump_hlo_as_text "
                "--xla_dump_hlo_pass_re=spmd-partitioning "
                # Of CPUs alone, and it aborts on a bfloat16 sum that a shard_map over some of the
                # axes makes, as that of a pipeline does.
                "--xla_disable_hlo_passes=all-reduce-promotion"
            )
        command = [sys.executable, "-m", "experiments.plan.compile", str(asked), str(answer)]
        started = time.perf_counter()
        try:
            child = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return Compiled(TOO_LONG, f"not done after {timeout:.0f} s", timeout)
        if not answer.exists():
            lines = child.stderr.strip().splitlines()
            last = next((line for line in reversed(lines) if "Error" in line), "".join(lines[-1:]))
            message = f"exit {child.returncode}: {last[:300]}"
            return Compiled(CRASHED, message, time.perf_counter() - started)
        fields = json.loads(answer.read_text())
    fields["collectives"] = tuple(
        Collective(**each | {"axes": tuple(each["axes"]), "parts": tuple(each["parts"])})
        for each in fields["collectives"]
    )
    return Compiled(**fields)


def traffic_elsewhere(request: Request, timeout: float = 1800.0) -> tuple[Collective, ...]:
    """Returns the collectives of a step as the compiler for a chip puts them.

    Raises:
      ValueError: the compiler is not installed.
      RuntimeError: it did not accept the step.
    """
    result = compile_elsewhere(request, timeout)
    if result.verdict != FITS:
        raise RuntimeError(f"{request.mesh} for {request.chip}: {result.verdict} {result.message}")
    return result.collectives


def child_environment(chip: Chip) -> dict[str, str]:
    """Returns the environment of a process that compiles for a chip and executes nothing."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # A cache of executables of real machines is no place for these, nor are they found in it.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    root = str(Path(__file__).parent.parent.parent)
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if chip.platform == "tpu":  # Otherwise libtpu looks for the machine that it runs on.
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    return environment


def compile_here(request: Request, dump: Path | None = None) -> Compiled:
    """Compiles in this process, which has to have the devices; see `compile_elsewhere`.

    Args:
      request: what to compile.
      dump: where XLA writes the divided program of a step for GPUs.
    """
    from experiments.methods.table import METHODS
    from experiments.plan.step import abstract_step
    from experiments.runs.layout import Division
    from parallel.mesh import make_mesh, parse_mesh
    from parallel.traffic import collectives
    from train.settings import from_json

    chip, started = chip_named(request.chip), time.perf_counter()
    mesh = make_mesh(**parse_mesh(request.mesh), devices=_devices(request))
    division = Division(request.strategies, request.pipeline_micro_batches, request.pipeline_rounds)
    settings = from_json(request.settings, METHODS)
    try:
        step = abstract_step(settings, mesh, division, request.attention)
    except ValueError as error:
        return Compiled(REFUSED, str(error), time.perf_counter() - started)
    try:
        compiled = step.lower().compile()
    except Exception as error:
        message = str(error)
        verdict = NO_MEMORY if _is_memory(message) else CRASHED
        return Compiled(verdict, _first_line(message), time.perf_counter() - started)
    seconds, text = time.perf_counter() - started, compiled.as_text()
    if chip.platform == "gpu" and dump is not None and mesh.size > 1:
        text = _divided(dump)
    analysis = compiled.memory_analysis()
    return Compiled(
        FITS,
        "",
        seconds,
        tuple(collectives(text, mesh, scatters=chip.platform == "gpu")),
        int(analysis.temp_size_in_bytes),
        int(analysis.argument_size_in_bytes),
    )


def _devices(request: Request) -> list[Any]:
    import jax

    from parallel.mesh import parse_mesh

    chip, number = chip_named(request.chip), math.prod(parse_mesh(request.mesh).values())
    if chip.platform == "tpu":
        from jax.experimental import topologies

        name = topology_of(chip, number)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    jax.config.update("jax_num_cpu_devices", number)
    return jax.devices()


def _divided(dump: Path) -> str:
    """The program right after its division over devices, of the largest module that was dumped."""
    files = sorted(dump.glob("*after_spmd-partitioning*"), key=lambda path: path.stat().st_size)
    if not files:
        raise RuntimeError(
            f"XLA wrote no divided program to {dump}; its pass may have another name by now"
        )
    return files[-1].read_text()


def _is_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message


def _first_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def main(asked: str, answer: str) -> None:
    """The child: reads a request, writes what came of it."""
    fields = json.loads(Path(asked).read_text())
    request = Request(**fields | {"strategies": tuple(fields["strategies"])})
    result = asdict(compile_here(request, Path(answer).parent / "dump"))
    result["collectives"] = [each._asdict() for each in result["collectives"]]
    Path(answer + ".part").write_text(json.dumps(result))
    os.replace(answer + ".part", answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
