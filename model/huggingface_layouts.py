"""What a checkpoint format of Hugging Face is: entries of `config.json`, names of tensors.

A `Layout` is data, read in both directions by `model.huggingface_config` and `model.huggingface`;
those that there are stand in `model.huggingface_kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import numpy as np

from model.config import TransformerConfig
from model.flops import abstract_params
from model.rules import is_stacked

REQUIRED = object()
"""Default of an entry without which a `config.json` is not complete."""


class Entry(NamedTuple):
    """An entry of `config.json` that stands for a field of ours.

    Attributes:
      theirs: its name, dotted where it is nested; further names are the places where other versions
        of transformers keep it: all are written, and all that are present must agree.
      ours: field of `TransformerConfig`. Two entries for one field must agree.
      kind: type of the value.
      default: what transformers takes where the entry is missing or null. None leaves our default,
        which means the same.
      choices: their word -> ours, where they differ; the first word for a meaning is written.
      nullable: null is not for the default, but for None of ours.
    """

    theirs: tuple[str, ...]
    ours: str
    kind: type
    default: Any = REQUIRED
    choices: Mapping[str, str] | None = None
    nullable: bool = False


class Constant(NamedTuple):
    """An entry of `config.json` that has one meaning here, and is refused where it has another.

    Attributes:
      theirs: its name, dotted where it is nested.
      accepted: the values that mean what our model computes, absence (None) always included. The
        first is written.
      training_only: another value is not refused, but warned about and taken for the first.
      each: it is a list, a value a layer, and all of them are to be accepted.
    """

    theirs: str
    accepted: tuple[Any, ...]
    training_only: bool = False
    each: bool = False


class Tensor(NamedTuple):
    """A tensor of theirs and the parameters of ours that it holds.

    Attributes:
      key: their name without the prefix of the base model; `{}` is the layer.
      paths: our parameters, joined along their last axis.
      transposed: whether theirs is [out, in]; ours is [in, out].
      exchanged: whether the halves of each head lie the other way round: the same turn by position
        then goes the other way.
    """

    key: str
    paths: tuple[str, ...]
    transposed: bool = False
    exchanged: bool = False


class Layout(NamedTuple):
    """One kind of model.

    Attributes:
      model_type, architecture: what `config.json` calls it.
      prefix: of the keys of the base model, everything but the head. Files of the base model alone
        lack it.
      fixed: fields of ours that every model of this kind has.
      entries, constants: of `config.json`.
      tensors: parameters that a config does not have (a tied head, biases) are passed over.
      stray: regex of keys, without prefix, that hold no parameters: buffers of older versions.
      classifies: whether transformers has a classifier of this kind.
    """

    model_type: str
    architecture: str
    prefix: str
    fixed: Mapping[str, Any]
    entries: tuple[Entry, ...]
    constants: tuple[Constant, ...]
    tensors: tuple[Tensor, ...]
    stray: str
    classifies: bool = True


HEAD = "lm_head.weight"
SCORE = Tensor("score.weight", ("score/kernel",), transposed=True)
"""The head of a classifier, of any layout; [C, D] as theirs, [D, C] as ours."""


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by path."""
    leaves = flax.traverse_util.flatten_dict(abstract_params(config), sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def expected_tensors(
    layout: Layout, config: TransformerConfig, classes: int | None = None
) -> tuple[dict[str, tuple[int, ...]], list[Tensor]]:
    """Shapes of our parameters by path, and the tensors that hold them.

    Args:
      layout: of the files.
      config: of the model.
      classes: outputs of a classifier's head, if there is one.
    """
    shapes = parameter_shapes(config)
    tensors = [tensor for tensor in layout.tensors if tensor.paths[0] in shapes]
    if classes is not None:
        shapes[SCORE.paths[0]] = (config.width, classes)
        tensors.append(SCORE)
    return shapes, tensors


def layer_keys(
    tensor: Tensor, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[int | None, str]]:
    """(layer, key without prefix); the layer of what is outside the blocks is None."""
    path = tensor.paths[0]
    if not is_stacked(path):
        yield None, tensor.key
        return
    for layer in range(shapes[path][0]):
        yield layer, tensor.key.format(layer)


def stored_shapes(
    tensors: Iterable[Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys without prefix and shapes, as they are in their files."""
    for tensor in tensors:
        for layer, key in layer_keys(tensor, shapes):
            parts = [shapes[path][layer is not None :] for path in tensor.paths]
            shape = (*parts[0][:-1], sum(part[-1] for part in parts))
            yield key, shape[::-1] if tensor.transposed else shape


def full_key(key: str, layout: Layout) -> str:
    """The key as it is written: all but the heads belong to the base model."""
    return key if key in (HEAD, SCORE.key) else layout.prefix + key


def exchange_halves(values: np.ndarray, head_width: int) -> np.ndarray:
    """Returns values with the halves of each head in the other order; heads lie on the last axis.

    >>> exchange_halves(np.arange(8), 4).tolist()
    [2, 3, 0, 1, 6, 7, 4, 5]
    """
    halves = values.reshape(*values.shape[:-1], -1, 2, head_width // 2)
    return halves[..., ::-1, :].reshape(values.shape)
