"""Runs one cell in a process of its own, so that its peak of memory is its own.

    python -m experiments.ladder.child JOB.json

What it compiles it compiles anew, so that the seconds of compilation are those of a first start.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from experiments.baselines.cells import BaselineCell, read_baseline, run_baselines
from experiments.baselines.settings import baseline_from_json, baseline_to_json
from experiments.bench.child import peak_bytes as host_peak
from experiments.cli import run_main
from experiments.grid import Cell, read_result, run_cells
from experiments.json_files import read_json, write_json
from experiments.machine import machine
from experiments.methods.table import METHODS
from experiments.runs.execute import Execution
from train.loop import LoopSettings
from train.settings import from_json, to_json
from train.stop import stop_requests

Job = Cell | BaselineCell
FACTS = "process.json"  # beside result.json: machine, peak of memory, threads, seconds outside


def run_apart(job: Job, folder: Path) -> None:
    """Runs a cell under `folder` in a child process.

    Raises:
      KeyboardInterrupt: it was stopped by a signal; ours go on from there.
      RuntimeError: it failed; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job.key}.job.json"
    write_json(path, {**job_to_json(job), "started": time.time()})
    command = [sys.executable, "-m", "experiments.ladder.child", str(path), str(folder)]
    environment = {**os.environ, **environment_of(job)}
    with subprocess.Popen(command, env=environment) as process:
        status, stopped = ended(process)
    if stopped or status in (130, -2, 143, -15):
        raise KeyboardInterrupt(f"{job.name} was stopped; the same command goes on from there")
    if status:
        raise RuntimeError(f"{job.name} failed with status {status}; what it said stands above")
    path.unlink()


def ended(process: subprocess.Popen[Any]) -> tuple[int, bool]:
    """Waits for a process, and returns its status and whether this one has been asked to stop.

    Of SIGTERM to this process the other one knows nothing, and would go on alone beside whoever
    starts the command again; of Ctrl-C both know. It is told once and waited for, since it saves.
    """
    with stop_requests() as requested:
        told = False
        while True:
            try:
                return process.wait(timeout=0.2), requested() is not None
            except subprocess.TimeoutExpired:
                if requested() == signal.SIGTERM and not told:
                    process.terminate()
                    told = True


def run_here(job: Job, folder: Path, started: float | None = None) -> None:
    """Runs a cell under `folder` in this process.

    Args:
      job: the cell.
      folder: of all cells.
      started: when the process was, in seconds of `time.time`.
    """
    begun_before = (folder / job.key).exists()
    if isinstance(job, BaselineCell):
        run_baselines([job], folder)
    else:
        run_cells([job], folder, execution=Execution(keep_last=1, keep_best=0))
    facts: dict[str, Any] = {
        "machine": machine(),
        "peak_bytes": peak_bytes(job),
        "threads": threads(job),
        "outside": None,
    }
    if started is not None and not begun_before:
        read: Any = read_baseline if isinstance(job, BaselineCell) else read_result
        if (result := read(job, folder)) and result.evaluations:
            facts["outside"] = time.time() - started - result.evaluations[-1]["seconds"]
    write_json(folder / job.key / FACTS, facts)


def peak_bytes(job: Job) -> int:
    """Returns the most memory that this process has held: of the GPU where it uses one."""
    if isinstance(job, BaselineCell) and job.baseline.device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    if jax.default_backend() == "gpu":
        return int((jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"])
    return host_peak()


def threads(job: Job) -> int:
    """Returns how many threads a product is spread over on the CPU: XLA takes a core each."""
    if isinstance(job, BaselineCell):
        import torch

        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def job_to_json(job: Job) -> dict[str, Any]:
    """Returns a cell as JSON values."""
    what: dict[str, Any] = {"name": job.name, "loop": dataclasses.asdict(job.loop)}
    if isinstance(job, BaselineCell):
        return {**what, "baseline": baseline_to_json(job.baseline)}
    return {**what, "settings": to_json(job.settings)}


def job_from_json(content: dict[str, Any]) -> Job:
    """Returns the cell that `job_to_json` wrote."""
    loop = LoopSettings(**content["loop"])
    if "baseline" in content:
        return BaselineCell(content["name"], baseline_from_json(content["baseline"]), loop)
    return Cell(content["name"], from_json(content["settings"], METHODS), loop)


def environment_of(job: Job) -> dict[str, str]:
    """Returns the variables of a process that compiles everything anew, as a first start does."""
    changes = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if isinstance(job, BaselineCell):
        changes["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        changes["JAX_PLATFORMS"] = "cpu"  # leaves a GPU and its memory to torch
    return changes


def main() -> None:
    """Runs the job that is named."""
    path, folder = map(Path, sys.argv[1:])
    content = read_json(path)
    run_here(job_from_json(content), folder, content["started"])


if __name__ == "__main__":
    run_main(main)
