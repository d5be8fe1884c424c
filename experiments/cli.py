"""Command lines from typed settings: `--optimizer adamw --optimizer.b2 0.95`.

A name picks which dataclass a group of settings is; tyro then makes a flag of each of its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from model.generate import Sampling

T = TypeVar("T")
Choices = Mapping[str, Callable[[], Any]]


def parse(
    kind: type[T],
    groups: Mapping[str, tuple[str, Choices]],
    args: Sequence[str] | None = None,
    description: str = "",
) -> T:
    """Parses a command line into the dataclass `kind`.

    Args:
      kind: has a field for each group, and default values for all others.
      groups: group -> (name taken when none is given, name -> function that makes the default).
      args: the command line, by default the program's.
      description: for `--help`.

    Raises:
      ValueError: a name that its group does not have; the names are listed.

    >>> groups = {"sampling": ("plain", {"plain": Sampling, "greedy": lambda: Sampling(0)})}
    >>> parse(_Example, groups, ["--steps", "3", "--sampling", "greedy"])
    _Example(sampling=Sampling(temperature=0, top_k=None, top_p=None), steps=3)
    >>> parse(_Example, groups, ["--sampling", "cold"])
    Traceback (most recent call last):
    ...
    ValueError: no sampling is called 'cold'; there are plain, greedy
    """
    import tyro

    rest, chosen = _take_names(list(sys.argv[1:] if args is None else args), groups)
    values = {}
    for group, (default, choices) in groups.items():
        name = chosen.get(group, default)
        if name not in choices:
            raise ValueError(f"no {group} is called {name!r}; there are {', '.join(choices)}")
        values[group] = choices[name]()
    names = "\n\n".join(
        f"--{group} NAME: {', '.join(choices)} (default: {default})"
        for group, (default, choices) in groups.items()
    )
    text = f"{description}\n\n{names}\n\nSettings of what was named follow as --group.field."
    return tyro.cli(kind, default=kind(**values), args=rest, description=text)


@dataclass(frozen=True)
class _Example:
    """A command of the doctest above: tyro resolves the types of a class in its module."""

    sampling: Sampling
    steps: int = 10


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Calls a script's main and leaves; an error of the user's is one sentence, not a traceback."""
    try:
        sys.exit(main() or 0)
    except (ValueError, FileNotFoundError, BlockingIOError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _take_names(args: list[str], groups: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Splits `--group NAME` and `--group=NAME` off the arguments."""
    rest, chosen = [], {}
    while args:
        word = args.pop(0)
        flag, equals, value = word.partition("=")
        group = flag.removeprefix("--")
        if flag == "--from":  # a keyword of Python, so the field is called otherwise
            rest.append("--from-run" + equals + value)
        elif flag.startswith("--") and group in groups:
            if not equals and not args:
                raise ValueError(f"{flag} needs a name: {', '.join(groups[group][1])}")
            chosen[group] = value if equals else args.pop(0)
        else:
            rest.append(word)
    return rest, chosen
