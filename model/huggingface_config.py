"""`config.json` of Hugging Face models to a `TransformerConfig` and back, by the layout tables."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from model.config import TransformerConfig
from model.huggingface_kinds import LAYOUTS
from model.huggingface_layouts import REQUIRED, Constant, Entry, Layout

_KINDS: dict[type, tuple[type, ...]] = {float: (int, float)}  # what JSON may hold for a kind

NOT_HELD = (
    *("dtype", "parameter_dtype", "scan_layers", "remat", "zero_init_projections"),
    *("layer_drop", "token_drop"),
)
"""Config fields that say how to run, train or start a model, not what it computes.

No format has them.
"""

TRAINING_ONLY = ("dropout",)
"""Config fields without a part in the logits: a format that cannot hold them only warns."""


def read_config(theirs: Mapping[str, Any]) -> tuple[Layout, TransformerConfig]:
    """Returns the layout and the config that the contents of a `config.json` describe.

    Sizes that the format leaves to be derived (key/value heads as many as heads, and so on) are
    None in the config.

    Raises:
      ValueError: if the model is of another kind, or an entry is missing, has the wrong type or
        asks for something that our model does not compute.

    >>> sizes = {"vocab_size": 64, "n_positions": 32, "n_layer": 2, "n_embd": 16, "n_head": 4}
    >>> layout, config = read_config({"model_type": "gpt2", "n_inner": 64} | sizes)
    >>> layout.architecture, config.activation, config.ffn_width
    ('GPT2LMHeadModel', 'gelu', None)
    >>> read_config({"model_type": "bert"})
    Traceback (most recent call last):
    ...
    ValueError: model_type 'bert' is not supported; there are gpt2, llama, qwen3, nanochat
    """
    kind = theirs.get("model_type")
    if kind not in LAYOUTS:
        raise ValueError(f"model_type {kind!r} is not supported; there are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    for constant in layout.constants:
        _check_constant(constant, theirs)
    fields: dict[str, Any] = dict(layout.fixed)
    read_from: dict[str, str] = {}
    for entry in layout.entries:
        value = _read_entry(entry, theirs)
        first = read_from.setdefault(entry.ours, entry.theirs[0])
        if fields.setdefault(entry.ours, value) == value:
            continue
        difference = (
            f"{first} is {fields[entry.ours]!r} and {entry.theirs[0]} is {value!r}, but a config "
            f"has one value for both ({entry.ours})"
        )
        if entry.ours not in TRAINING_ONLY:
            raise ValueError(f"{difference}; such a model cannot be expressed")
        warnings.warn(f"{difference}; {first} is used", stacklevel=3)
    return layout, _plain(TransformerConfig(**fields))


def write_config(config: TransformerConfig) -> tuple[Layout, dict[str, Any]]:
    """Returns the layout that can hold `config`, and the contents of its `config.json`.

    A layout holds a config if reading gives back what was written.

    Raises:
      ValueError: if none holds it; for each layout the fields in the way are named.

    >>> from model.presets import llama_tiny
    >>> layout, theirs = write_config(llama_tiny())
    >>> layout.model_type, theirs["num_key_value_heads"], theirs["head_dim"]
    ('llama', 2, 8)
    """
    if config.width % config.heads:
        raise ValueError(
            f"the formats {', '.join(LAYOUTS)} cannot hold a width of {config.width} with "
            f"{config.heads} heads: transformers wants heads that divide the width, whatever "
            "head_width is"
        )
    reasons = []
    for layout in LAYOUTS.values():
        theirs = _write(layout, config)
        try:
            _, held = read_config(theirs)
        except ValueError as error:  # no model of this layout can have such a shape
            reasons.append(f"{layout.model_type}: {error}")
            continue
        lost = _differences(config, held)
        if not [name for name in lost if name not in TRAINING_ONLY]:
            for name, (ours, other) in lost.items():
                warnings.warn(
                    f"the format {layout.model_type} cannot hold {name}={ours!r}, which matters "
                    f"for training only; whoever loads it gets {other!r}",
                    stacklevel=3,
                )
            return layout, theirs
        wants = ", ".join(f"{name}={a!r} (it has {b!r})" for name, (a, b) in lost.items())
        reasons.append(f"{layout.model_type} cannot hold {wants}")
    raise ValueError(f"no Hugging Face format holds this config: {'; '.join(reasons)}")


def _write(layout: Layout, config: TransformerConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
    }
    for constant in layout.constants:
        if constant.accepted[0] is not None:
            _put(theirs, constant.theirs, constant.accepted[0])
    for entry in layout.entries:
        value = getattr(config, entry.ours)
        if value is None and entry.nullable:
            for name in entry.theirs:
                _put(theirs, name, None)
            continue
        if value is None:  # ours has the default filled in under this name
            value = getattr(config, entry.ours + "_")
        if entry.choices is not None:
            words = [word for word, meaning in entry.choices.items() if meaning == value]
            if not words:
                continue  # reading gives another value then, which is how it is noticed
            value = words[0]
        for name in entry.theirs:
            _put(theirs, name, entry.kind(value))
    return theirs


def _read_entry(entry: Entry, theirs: Mapping[str, Any]) -> Any:
    """Our value for an entry."""
    if entry.nullable and any(theirs.get(name, entry) is None for name in entry.theirs):
        return None
    found = {name: _get(theirs, name) for name in entry.theirs}
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        if entry.default is REQUIRED:
            raise ValueError(f"the entry {entry.theirs[0]} is missing")
        value = entry.default
        return value if entry.choices is None else entry.choices[value]
    for name, value in found.items():
        kinds = _KINDS.get(entry.kind, (entry.kind,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and entry.kind is not bool):
            raise ValueError(f"{name} is {value!r}, not of type {entry.kind.__name__}")
    (name, value), *others = found.items()
    for other, second in others:
        if value != second:
            raise ValueError(
                f"{name} is {value!r} but {other}, which means the same, is {second!r}; "
                "remove the wrong one"
            )
    if entry.choices is None:
        return entry.kind(value)
    if value not in entry.choices:
        raise ValueError(f"{name} {value!r} is not supported; there are {', '.join(entry.choices)}")
    return entry.choices[value]


def _check_constant(constant: Constant, theirs: Mapping[str, Any]) -> None:
    value = _get(theirs, constant.theirs)
    found = value if constant.each and isinstance(value, list) else [value]
    if all(one is None or one in constant.accepted for one in found):
        return
    expected = constant.accepted[0]
    wanted = "it must be absent" if expected is None else f"only {expected!r} is"
    if not constant.training_only:
        raise ValueError(f"{constant.theirs} is {value!r}, which is not supported; {wanted}")
    warnings.warn(
        f"{constant.theirs} is {value!r}, which is not supported and matters for training only; "
        f"{expected!r} is used",
        stacklevel=4,
    )


def _differences(a: TransformerConfig, b: TransformerConfig) -> dict[str, tuple[Any, Any]]:
    """The fields, with both values, in which two configs mean different models."""
    pairs = {
        field.name: (getattr(_plain(a), field.name), getattr(_plain(b), field.name))
        for field in dataclasses.fields(TransformerConfig)
        if field.name not in NOT_HELD
    }
    return {name: (x, y) for name, (x, y) in pairs.items() if x != y}


def _plain(config: TransformerConfig) -> TransformerConfig:
    """The same model with None for whatever a None stands for."""
    defaults = {
        "kv_heads": config.heads,
        "head_width": config.width / config.heads,
        "ffn_width": 4 * config.width,
    }
    changes: dict[str, Any] = {
        name: None for name, value in defaults.items() if getattr(config, name) == value
    }
    if config.positions != "rotary":
        changes["rotary_base"] = TransformerConfig.rotary_base  # has no part in the model
    return dataclasses.replace(config, **changes)


def _get(theirs: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, None if there is none."""
    value: Any = theirs
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _put(theirs: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for part in parents:
        theirs = theirs.setdefault(part, {})
    theirs[last] = value
