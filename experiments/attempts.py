"""What failed in a long command, while the rest went on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Failures:
    """What failed so far.

    Attributes:
      said: a line for each.

    >>> failures = Failures()
    >>> with failures.passed_over("one"):
    ...     raise ValueError("no rows")
    one failed, the rest goes on: no rows
    >>> failures.raise_if_any()
    Traceback (most recent call last):
    ...
    ValueError: 1 failed, the same command tries again: one (no rows)
    """

    said: list[str] = field(default_factory=list)

    @contextmanager
    def passed_over(self, what: str) -> Iterator[None]:
        """Goes on after what fails within; a stop by a signal or by the clock passes through."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.said.append(f"{what} ({error})")
            print(f"{what} failed, the rest goes on: {error}")

    def raise_if_any(self) -> None:
        """Raises ValueError that names them, at the end, so that the command's status says it."""
        if self.said:
            listed = "; ".join(self.said)
            raise ValueError(f"{len(self.said)} failed, the same command tries again: {listed}")
