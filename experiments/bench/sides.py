"""Two or more long-lived processes that are asked in turn to do equal work.

Each side has a process of its own, so that neither shares the other's threads, allocator or
compiler flags; while one works the others wait for a line. `Side` is the parent's end of it and
`experiments.bench.child` the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.ratios import order

ROOT = Path(__file__).parent.parent.parent
REST = 0.2  # seconds: threads of the side before spin for some milliseconds and then sleep


class Side:
    """A child process that answers one line of JSON for each that it gets.

    Args:
      subject: a name in `experiments.bench.child.SUBJECTS`.
      settings: JSON values for it.
      environment: variables on top of this process's.
      limit: seconds after which the process is ended, whatever it does; None for never.

    Attributes:
      started: clock (`time.perf_counter`) just before the process was.
      facts: what the subject says of itself once it stands.
    """

    def __init__(
        self,
        subject: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        limit: float | None = None,
    ):
        self.subject = subject
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        self._watch = threading.Timer(limit or 0, self._process.kill)
        self._watch.daemon = True
        if limit is not None:
            self._watch.start()
        try:
            self.facts: dict[str, Any] = self._say({"subject": subject, "settings": dict(settings)})
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **arguments: Any) -> Any:
        """Returns the answer to a question of the subject.

        Raises:
          RuntimeError: the subject failed, with its traceback; or its process ended.
        """
        return self._say({"ask": what, "arguments": arguments})

    def close(self) -> None:
        """Ends the process."""
        self._watch.cancel()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _say(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the process of {self.subject} has ended") from None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the process of {self.subject} ended with status {status}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.subject} failed:\n{answer['error']}")
        return answer["answer"]


def interleaved(
    sides: Mapping[str, Side], rounds: int, what: str, questions: Sequence[Mapping[str, Any]]
) -> dict[str, list[list[Any]]]:
    """Asks all sides the same questions, round after round, each going first in turn.

    Args:
      sides: by name.
      rounds: how often.
      what: to ask.
      questions: arguments of each question of a round.

    Returns:
      Side -> question -> answer of each round.
    """
    found: dict[str, list[list[Any]]] = {name: [[] for _ in questions] for name in sides}
    for round_ in range(rounds):
        for name in order(list(sides), round_):
            for number, arguments in enumerate(questions):
                time.sleep(REST)
                found[name][number].append(sides[name].ask(what, **arguments))
    return found
