"""Several processes against one: the same losses, one signal for all, a run that moves between.

    python -m experiments.scale.process_runs

Real processes of `experiments.pretrain` on this machine's CPU, four devices in all: 1 process x 4,
2 x 2 and 4 x 1. About three minutes on two cores.

Several processes add with another algorithm than the threads of one do: gloo adds around a ring,
one process in the order of its devices. So "2 x 2" and "4 x 1" are compared with each other bit for
bit, and with "1 x 4" up to rounding.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.records import read_rows

ROOT = Path(__file__).parent.parent.parent
STEPS = 40
LIMIT = 600.0  # seconds for a launch, on a machine that has other things to do
LAYOUTS = ((1, 4), (2, 2), (4, 1))  # (processes, devices of each)

Losses = dict[tuple[str, int], float]


def pretrain(folder: Path, out: Path, **changes: Any) -> list[str]:
    """Returns the command of a tiny run.

    Args:
      folder: where `write_text` has put the text.
      out: of the run.
      changes: flags, with _ for -; None leaves one out.
    """
    flags = {
        "data": folder / "text.txt",
        "tokenizer": "bytes",
        "model": "modern_tiny",
        "optimizer": "adamw",
        "steps": STEPS,
        "batch_size": 8,
        "sequence_length": 32,
        "log_every": 1,
        "checkpoint_every": STEPS,
        "vocabulary_multiple": 8,
        "mesh": "data=2,fsdp=2",
        "out": out,
    } | changes
    words = [sys.executable, "-m", "experiments.pretrain"]
    for name, value in flags.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def write_text(folder: Path) -> None:
    """Writes 40,000 characters that every Python has: a module of its library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(Path(argparse.__file__).read_text()[:40_000])


def launch(
    commands: Sequence[Sequence[str]], devices: int, folder: Path
) -> list[subprocess.Popen[str]]:
    """Starts processes that find each other, with a cache of their own in `folder`.

    Args:
      commands: of each process; those that are several get the flags of `parallel.processes`.
      devices: CPU devices of each.
      folder: for the cache.
    """
    environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "ACCELERANDO_CACHE": str(folder / "cache"),
    }
    count, address = len(commands), f"127.0.0.1:{free_port()}"
    started = []
    for number, command in enumerate(commands):
        flags = ["--coordinator", address, "--num-processes", str(count), "--process-id"]
        words = [*command, *flags, str(number)] if count > 1 else list(command)
        started.append(
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(
    started: list[subprocess.Popen[str]], limit: float = LIMIT
) -> list[tuple[int, str, str]]:
    """Returns (exit status, output, errors) of each process.

    Raises:
      subprocess.TimeoutExpired: one of them did not end; all are killed.
    """
    try:
        ended = [process.communicate(timeout=limit) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, ended, strict=True)]


def run(command: Sequence[str], processes: int, devices: int, folder: Path) -> None:
    """Runs one command in several processes.

    Raises:
      RuntimeError: one of them failed; what it said is in the message.
    """
    for status, _, errors in finish(launch([command] * processes, devices, folder)):
        if status:
            raise RuntimeError(f"a process ended with status {status}: {errors[-2000:]}")


def stop(
    command: Sequence[str], processes: int, devices: int, folder: Path, out: Path
) -> list[tuple[int, str, str]]:
    """Runs a command and sends SIGTERM to its last process alone once three steps are recorded."""
    started = launch([command] * processes, devices, folder)
    end = time.monotonic() + LIMIT
    record = out / "metrics.jsonl"
    while not (record.exists() and record.read_text().count("\n") >= 3):
        if time.monotonic() > end or any(process.poll() is not None for process in started):
            break  # `finish` shows why
        time.sleep(0.01)
    started[-1].send_signal(signal.SIGTERM)
    return finish(started)


def losses(out: Path) -> Losses:
    """Returns the loss of every step and evaluation of a run."""
    rows = read_rows(out / "metrics.jsonl")
    return {(row["kind"], row["step"]): row["loss"] for row in rows if "loss" in row}


def difference(one: Losses, two: Losses) -> float:
    """Returns the largest relative difference, 0.0 for the same bits.

    Raises:
      ValueError: they are losses of other steps.
    """
    if one.keys() != two.keys():
        raise ValueError(f"{len(one)} losses and {len(two)}, and not of the same steps")
    first, second = (np.array([run[key] for key in one]) for run in (one, two))
    return float(np.max(np.abs(first - second) / np.abs(first)))


def table(folder: Path) -> list[dict[str, Any]]:
    """Runs everything and returns a row for each fact.

    Args:
      folder: for the runs; emptied first.

    Returns:
      Dicts with `case`, `exits` (status of each process), `saved` (step, or None) and `difference`
      (largest relative difference of any loss, and of the evaluation, from `against`).

    Raises:
      RuntimeError: a process failed.
    """
    folder = Path(folder).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder)
    rows, found = [], {}
    for processes, devices in LAYOUTS:
        name = f"{processes} x {devices}"
        out = folder / f"{processes}x{devices}"
        run(pretrain(folder, out), processes, devices, folder)
        found[name] = losses(out)
        for other in list(found)[:-1]:
            rows.append(_row(name, [0] * processes, STEPS, other, found[other], found[name]))
    for first, second in (((2, 2), (1, 4)), ((1, 4), (2, 2))):
        out = folder / f"from{first[0]}to{second[0]}"
        command = pretrain(folder, out)
        ended = stop(command, *first, folder, out)
        statuses = [status for status, _, _ in ended]
        if set(statuses) != {128 + signal.SIGTERM}:
            raise RuntimeError(f"statuses {statuses} after SIGTERM: {ended[0][2][-2000:]}")
        saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.is_dir())
        stopped = losses(out)
        there = {key: value for key, value in found["1 x 4"].items() if key in stopped}
        case = f"{first[0]} x {first[1]}, SIGTERM to the last process"
        rows.append(_row(case, statuses, saved, "1 x 4", there, stopped))
        run(command, *second, folder)
        case = f"{first[0]} x {first[1]}, then {second[0]} x {second[1]}"
        rows.append(_row(case, [0] * second[0], STEPS, "1 x 4", found["1 x 4"], losses(out)))
    return rows


def _row(
    case: str, statuses: list[int], saved: int, against: str, one: Losses, two: Losses
) -> dict[str, Any]:
    return {
        "case": case,
        "exits": statuses,
        "saved": saved,
        "against": against,
        "losses": len(two),
        "difference": difference(one, two),
    }


def free_port() -> int:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        for row in table(Path(folder) / "runs"):
            exits = ", ".join(map(str, row["exits"]))
            print(
                f"{row['case']:<34} exit {exits:<12} step {row['saved']:>3}  {row['losses']:>3} "
                f"losses against {row['against']}: {row['difference']:.1e}"
            )


if __name__ == "__main__":
    main()
