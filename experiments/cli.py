"""Command lines from typed settings: `--optimizer adamw --optimizer.b2 0.95`.

A name picks which dataclass a group of settings is; tyro then makes a flag of each of its fields.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import jax

from model.generate import Sampling
from parallel.processes import leave

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


def parse_with_methods(
    kind: type[T],
    groups: Mapping[str, tuple[str, Choices]],
    methods: Choices,
    args: Sequence[str] | None = None,
    description: str = "",
) -> tuple[T, tuple[Any, ...]]:
    """Parses a command line on which `--method NAME` may stand any number of times.

    Args:
      kind: as in `parse`.
      groups: as in `parse`.
      methods: name -> function that makes the default settings of that method.
      args: as in `parse`.
      description: as in `parse`.

    Returns:
      The command, and the settings of the methods in the order given.

    Raises:
      ValueError: as in `parse`; a method that there is not, or given twice, or a flag of one that
        is not given.

    >>> words = ["--method", "noise", "--noise.top-k", "4"]
    >>> groups = {"sampling": ("plain", {"plain": Sampling})}
    >>> parse_with_methods(_Example, groups, {"noise": Sampling}, words)[1]
    (Sampling(temperature=1.0, top_k=4, top_p=None),)
    """
    words = list(sys.argv[1:] if args is None else args)
    names, rest = [], []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag != "--method":
            rest.append(word)
            continue
        if not equals and not words:
            raise ValueError(f"--method needs a name: {', '.join(methods)}")
        name = value if equals else words.pop(0)
        if name not in methods:
            raise ValueError(f"no method is called {name!r}; there are {', '.join(methods)}")
        if name in names:
            raise ValueError(f"the method {name} is given twice; give it once")
        names.append(name)
    for word in rest:
        owner = word.removeprefix("--").partition(".")[0].replace("-", "_")
        if word.startswith("--") and "." in word and owner in methods and owner not in names:
            raise ValueError(f"{word} is of the method {owner}; add --method {owner}")
    fields = []
    for name in names:
        default = methods[name]()
        fields.append((name, type(default), dataclasses.field(default=default)))
    extended: Any = dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), namespace={"__doc__": kind.__doc__}, frozen=True
    )
    known = f"--method NAME, any number of times: {', '.join(methods)}"
    command = parse(extended, groups, rest, f"{description}\n\n{known}")
    return command, tuple(getattr(command, name) for name in names)


@dataclass(frozen=True)
class _Example:
    """A command of the doctest above: tyro resolves the types of a class in its module."""

    sampling: Sampling
    steps: int = 10


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Calls a script's main and leaves; an error of the user's is one sentence, not a traceback.

    With an error, one of several processes does not wait for the others: that ends them, too.
    """
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            if "JAX" not in note:  # which notes that it has cut the traceback, and there is none
                print(note, file=sys.stderr)
        leave(2)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {str(interrupt) or 'nothing more was saved'}", file=sys.stderr)
        leave(128 + signal.SIGINT)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        leave(1)


def named_pairs(what: str, words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Returns the words of a flag that takes NAME=VALUE as pairs.

    Args:
      what: the flag, "data", "columns" or "rename".
      words: that follow it.

    Raises:
      ValueError: a word that is no pair, a name that is there twice.

    >>> named_pairs("data", ("train=a=b.tsv",))
    (('train', 'a=b.tsv'),)
    """
    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--{what} has {word!r}; give NAME=VALUE, as in {_LIKE[what]}")
        pairs.append((name, value))
    if twice := sorted({a for a, _ in pairs if sum(a == b for b, _ in pairs) > 1}):
        raise ValueError(f"--{what} names {', '.join(twice)} more than once")
    return tuple(pairs)


_LIKE = {
    "data": "train=train.tsv valid=dev.tsv",
    "columns": "text=sentence",
    "rename": "0=NEGATIVE 1=POSITIVE",
}


def _sentence(error: Exception) -> str:
    """What an error says, without the number that the system has for it.

    >>> _sentence(NotADirectoryError(20, "Not a directory", "runs/a"))
    'Not a directory: runs/a'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error)


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
