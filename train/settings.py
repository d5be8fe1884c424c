"""The settings of a run, what of them is its identity, and their way through JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from model.config import TransformerConfig, config_from_dict
from model.grow import HOWS, How
from model.presets import modern_mini
from train.mup import MuP
from train.optimizers import OPTIMIZERS, Muon
from train.optimizers.settings import OptimizerSettings
from train.schedules import SCHEDULES, Linear


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one model, one batch shape and one compilation.

    Attributes:
      steps: updates.
      model: config; its vocabulary size is the tokenizer's.
      batch_size: rows B of the global batch.
      sequence_length: tokens T of a row.
      growth: what layers are made of that the phase before does not have (or the parent of the
        run), see `model.grow`.
    """

    steps: int
    model: TransformerConfig
    batch_size: int = 16
    sequence_length: int = 128
    growth: How = "identity"

    def __post_init__(self):
        for name in ("steps", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.growth not in HOWS:
            raise ValueError(f"growth is {self.growth!r}; choose one of {', '.join(HOWS)}")
        model = self.model
        if model.positions == "learned" and self.sequence_length > model.max_length:
            raise ValueError(
                f"a sequence of {self.sequence_length} tokens does not fit the {model.max_length} "
                "learned positions; lower sequence_length or raise max_length"
            )


@dataclass(frozen=True)
class Settings:
    """What a run is. Two runs of equal settings, on one kind of machine, are equal bit for bit.

    Attributes:
      phases: at least one.
      data: sources, each "SPEC" or "WEIGHT*SPEC" (see `train.text.sources`).
      tokenizer: "bytes", "sentencepiece:N" (trained on the first source), or what
        `train.tokenizers.tokenizer.load_tokenizer` takes.
      seed: of the initial parameters, the order of the data and dropout.
      optimizer: typed settings, by name in `train.optimizers.OPTIMIZERS`.
      schedule: typed settings, by name in `train.schedules.SCHEDULES`.
      micro_batches: parts that each batch is accumulated over.
      document_boundaries: "ignore" lets tokens see the document before theirs, "mask" does not.
      label_smoothing: of the cross-entropy.
      z_loss: weight of log(Z)^2; 0 leaves the term out.
      loss_chunk: positions whose logits are held at a time; None for all.
      max_nonfinite: bad steps in a row that stop the run.
      held_out: the split that is evaluated during the run; "test" where all has been chosen.
      vocabulary_multiple: the vocabulary is padded to a multiple of it in the state, so that a mesh
        can divide it; padding has no logits, and exports have none of it.
      mup: the base model that rates and initial scales are those of (see `train.mup`); None where
        they are this model's own.
      methods: typed settings of whatever else is plugged in, in order (see `train.methods`).
      parent: the run and step that it was started from, or None.
      task: typed settings of the task whose rows take the place of text (see `train.tasks.task`),
        or None; `data` is () then.
    """

    phases: tuple[Phase, ...] = (Phase(steps=1000, model=modern_mini()),)
    data: tuple[str, ...] = ("stdlib",)
    tokenizer: str = "sentencepiece:4096"
    seed: int = 0
    optimizer: OptimizerSettings = field(default_factory=Muon)
    schedule: Any = field(default_factory=Linear)
    micro_batches: int = 1
    document_boundaries: Literal["ignore", "mask"] = "ignore"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_chunk: int | None = None
    max_nonfinite: int = 5
    held_out: Literal["validation", "test"] = "validation"
    vocabulary_multiple: int = 1
    mup: MuP | None = None
    methods: tuple[Any, ...] = ()
    parent: str | None = None
    task: Any = None

    def __post_init__(self):
        if not self.phases:
            raise ValueError("a run needs at least one phase")
        least = {"seed": 0, "micro_batches": 1, "loss_chunk": 1, "max_nonfinite": 1, "z_loss": 0}
        least |= {"vocabulary_multiple": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ValueError(f"{name} is {value}; it must be at least {smallest}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1"
            )
        for phase in self.phases:
            if phase.batch_size % self.micro_batches:
                raise ValueError(
                    f"batch_size {phase.batch_size} does not divide into {self.micro_batches} "
                    f"micro-batches; make it a multiple of {self.micro_batches}"
                )
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"each method can be given once, not {', '.join(names)}")

    @property
    def steps(self) -> int:
        """Updates of all phases."""
        return sum(phase.steps for phase in self.phases)


def to_json(settings: Settings) -> dict[str, Any]:
    """Returns the settings as JSON values; optimizer, schedule and methods carry their name.

    >>> from_json(json.loads(json.dumps(to_json(Settings())))) == Settings()
    True
    """
    fields = dataclasses.asdict(settings)
    fields["optimizer"] = {"name": _name_of(settings.optimizer, OPTIMIZERS)} | fields["optimizer"]
    fields["schedule"] = {"name": _name_of(settings.schedule, SCHEDULES)} | fields["schedule"]
    fields["methods"] = [
        {"name": method.name} | dataclasses.asdict(method) for method in settings.methods
    ]
    if settings.task is not None:
        fields["task"] = {"name": settings.task.name} | fields["task"]
    return fields


def from_json(
    fields: dict[str, Any],
    methods: Mapping[str, type[Any]] = MappingProxyType({}),
    tasks: Mapping[str, type[Any]] = MappingProxyType({}),
) -> Settings:
    """Returns the settings that `to_json` wrote.

    Args:
      fields: JSON values.
      methods: settings class of each method, by name.
      tasks: settings class of each task, by name.

    Raises:
      ValueError: on unknown names or fields.
    """
    fields = dict(fields)
    fields["phases"] = tuple(
        Phase(**phase | {"model": config_from_dict(phase["model"])}) for phase in fields["phases"]
    )
    for key, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        fields[key] = _named(key, fields[key], table)
    fields["methods"] = tuple(_named("method", m, methods) for m in fields.get("methods", ()))
    if fields.get("task") is not None:
        fields["task"] = _named("task", fields["task"], tasks)
    if fields.get("mup") is not None:
        fields["mup"] = MuP(**fields["mup"])
    known = {f.name for f in dataclasses.fields(Settings)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown settings {unknown}; known are {sorted(known)}")
    return Settings(**fields | {"data": tuple(fields["data"])})


def _named(what: str, fields: dict[str, Any], table: Mapping[str, type[Any]]) -> Any:
    """Returns the settings of the class that the fields name."""
    values = {name: _tuples(value) for name, value in fields.items()}
    name = values.pop("name")
    if name not in table:
        raise ValueError(f"no {what} {name!r}; there are {', '.join(table) or 'none'}")
    kind = table[name]
    return _built(kind, values)


def _built(kind: type[Any], values: dict[str, Any]) -> Any:
    """Returns the dataclass with those of its fields that are dataclasses themselves."""
    values = dict(values)
    for key, hint in get_type_hints(kind).items():
        if hint is TransformerConfig and key in values:
            values[key] = config_from_dict(values[key])
        elif dataclasses.is_dataclass(hint) and isinstance(values.get(key), dict):
            inner = {name: _tuples(value) for name, value in values[key].items()}
            values[key] = _built(hint, inner)  # type: ignore[arg-type]
    return kind(**values)


def fingerprint(settings: Settings, more: Any = None) -> str:
    """Returns a short hash of the settings, and of `more`: the name of a cell.

    What is at its default does not count, so that a setting that is new does not rename all runs.

    >>> len(fingerprint(Settings())), fingerprint(Settings()) == fingerprint(Settings(seed=1))
    (16, False)
    """
    return digest(essential([settings, more]))


def essential(value: Any) -> Any:
    """Returns dataclasses within dataclasses as JSON values, by class, without what is at default.

    >>> essential(Phase(3, modern_mini(), batch_size=4))["batch_size"]
    4
    >>> "sequence_length" in essential(Phase(3, modern_mini()))
    False
    """
    if isinstance(value, list | tuple):
        return [essential(v) for v in value]
    if isinstance(value, Mapping):
        return {name: essential(v) for name, v in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    found: dict[str, Any] = {"class": type(value).__name__}
    for field_ in dataclasses.fields(value):
        mine = getattr(value, field_.name)
        made = field_.default_factory
        default = field_.default if made is dataclasses.MISSING else made()
        if default is dataclasses.MISSING or mine != default:
            found[field_.name] = essential(mine)
    return found


def digest(values: Any) -> str:
    """Returns a short hash of JSON values, whatever the order of their names.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> list[str]:
    """Returns a line "path: ours, not theirs" for each field in which two JSON settings differ.

    >>> differences({"seed": 1, "optimizer": {"b1": 0.9}}, {"seed": 2, "optimizer": {"b1": 0.9}})
    ['seed: 1, not 2']
    """
    lines: list[str] = []
    for name in sorted(set(ours) | set(theirs)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{path}{name}.")
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            one, two = ({str(i): v for i, v in enumerate(each)} for each in (a, b))
            lines += differences(one, two, f"{path}{name}.")
        elif a != b:
            lines.append(f"{path}{name}: {a}, not {b}")
    return lines


def _name_of(value: Any, table: dict[str, type[Any]]) -> str:
    return next(name for name, kind in table.items() if kind is type(value))


def _tuples(value: Any) -> Any:
    """JSON has no tuples; settings have no lists."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
