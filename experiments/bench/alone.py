"""Processes that answer once: prepared many at a time, timed one at a time, each within a limit.

On a GPU most of a measurement is compilation, which many processes can do at once, and the rest of
it must have the device to itself. A process of its own has compiler flags of its own, and one that
fails or hangs takes no other with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from experiments.bench.sides import ROOT

FAILED = "failed"  # key of the reason why there are no values
LOCK = Path(tempfile.gettempdir()) / "accelerando-device.lock"
LAST = 1500  # characters of what a process printed that are kept where it failed
T = TypeVar("T")


def ask_once(
    subject: str,
    settings: Mapping[str, Any],
    what: str,
    *,
    limit: float,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Returns the answer of a process started for one question, or `{"failed": reason}`.

    Args:
      subject: a name in `experiments.bench.child.SUBJECTS`.
      settings: JSON values for it.
      what: to ask.
      limit: seconds until the process is ended.
      environment: variables on top of this process's.
      arguments: of the question.
    """
    lines = [
        {"subject": subject, "settings": dict(settings)},
        {"ask": what, "arguments": arguments},
    ]
    try:
        made = subprocess.run(
            [sys.executable, "-m", "experiments.bench.child"],
            input="".join(json.dumps(line) + "\n" for line in lines),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {FAILED: f"not done after {limit:.0f} s"}
    answers = [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]
    for answer in answers:
        if "error" in answer:
            return {FAILED: answer["error"][-LAST:]}
    if len(answers) < len(lines):
        return {FAILED: f"ended with status {made.returncode}: {made.stderr[-LAST:]}"}
    found: dict[str, Any] = answers[-1]["answer"]
    return found


def attempt(
    measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Returns the function that gives `{"failed": reason}` where `measure` raises.

    >>> attempt(lambda settings: {"half": 1 / settings["n"]})({"n": 0})["failed"].splitlines()[-1]
    'ZeroDivisionError: division by zero'
    """

    def run(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return measure(settings)
        except Exception:
            return {FAILED: traceback.format_exc()[-LAST:]}

    return run


@contextlib.contextmanager
def device_alone() -> Iterator[None]:
    """Waits until no other process is inside, and keeps all others out."""
    import fcntl

    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def together(jobs: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Runs functions in threads, so many at a time, and returns what they give, in order.

    After one that raises, or Ctrl-C, none is begun; one at a time are run in this thread.

    >>> together([lambda: 1, lambda: 2, lambda: 3], most=2)
    [1, 2, 3]
    """
    if most <= 1:
        return [job() for job in jobs]
    with ThreadPoolExecutor(most) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
