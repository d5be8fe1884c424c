"""Students from teachers: a smaller model that begins with some of its teacher's weights.

    config, params = distilgpt2_style(teacher_config, teacher_params)     half of the layers
    config, params = minitron_style(teacher_config, teacher_params, importance, keep)

A student shares no buffer with its teacher: it is trained, and a step gives its parameters' buffers
away, while the teacher must stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compress.pruning.structured import Model, keep_layers
from compress.pruning.structured_importance import keep_best
from model.config import TransformerConfig

PyTree = Any
PARTS = ("neurons", "groups", "width")


def student_from_layers(config: TransformerConfig, params: PyTree, layers: Sequence[int]) -> Model:
    """Returns the model of these layers, with embeddings, last norm and head of its teacher.

    Args:
      config: of the teacher.
      params: its parameters.
      layers: increasing numbers of layers, from 0.

    Raises:
      ValueError: layers that are not there, or not in increasing order.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> teacher = Transformer(gpt2_tiny(layers=4))
    >>> params = jax.jit(teacher.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> config, student = student_from_layers(teacher.config, params, [0, 3])
    >>> config.layers, student["blocks"]["mlp"]["up"]["kernel"].shape
    (2, (2, 32, 128))
    """
    small, chosen = keep_layers(config, params, list(layers))
    return small, jax.tree.map(jnp.copy, chosen)


def spread_layers(teacher: int, student: int) -> tuple[int, ...]:
    """Returns the numbers of `student` layers, evenly spread from the first to the last.

    Those that DistilGPT2 took from GPT-2 (Sanh et al. 2019, arXiv:1910.01108). A student of one
    layer gets the first.

    Raises:
      ValueError: fewer than one layer, or more than the teacher has.

    >>> spread_layers(12, 6)
    (0, 2, 4, 7, 9, 11)
    """
    _check_layers(teacher, student)
    gaps = max(student - 1, 1)
    # To the nearest layer, in whole numbers.
    return tuple((2 * i * (teacher - 1) + gaps) // (2 * gaps) for i in range(student))


def without_late_layers(teacher: int, student: int) -> tuple[int, ...]:
    """Returns the numbers of `student` layers: the first ones and the last.

    The layers that go are one run that ends before the last layer, as in the depth-pruned Minitron
    models (Sreenivas et al. 2024, arXiv:2408.11796). A student of one layer gets the last.

    Raises:
      ValueError: fewer than one layer, or more than the teacher has.

    >>> without_late_layers(12, 6)
    (0, 1, 2, 3, 4, 11)
    """
    _check_layers(teacher, student)
    return (*range(student - 1), teacher - 1)


def distilgpt2_style(config: TransformerConfig, params: PyTree) -> Model:
    """Returns the student of half of the layers, evenly spread (DistilGPT2, of GPT-2).

    Train it with the hard loss, the soft loss and the cosine of hidden states.

    Args:
      config: of the teacher.
      params: its parameters.

    Raises:
      ValueError: a teacher of one layer.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> teacher = Transformer(gpt2_tiny())
    >>> params = jax.jit(teacher.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> distilgpt2_style(teacher.config, params)[0].layers
    1
    """
    if config.layers < 2:
        raise ValueError("a teacher of one layer has no half; choose a deeper one")
    return student_from_layers(config, params, spread_layers(config.layers, config.layers // 2))


def minitron_style(
    config: TransformerConfig,
    params: PyTree,
    importance: Mapping[str, Any],
    keep: Mapping[str, int],
) -> Model:
    """Returns the student that keeps the most important of its teacher's width and depth.

    Neurons, heads and features are chosen by importance, by that of the activations in the paper
    (`compress.pruning.structured_importance.by_activation`); of the layers a late run goes. Then
    train it with the soft loss alone (Minitron, Muralidharan et al. 2024, arXiv:2407.14679).

    Args:
      config: of the teacher.
      params: its parameters.
      importance: part -> importance in the teacher, for each of "neurons", "groups" and "width"
        that is in `keep`.
      keep: part -> how many to keep; "layers" too. What is not named stays whole.

    Raises:
      ValueError: an unknown part, a part without importance, or a number that cannot be kept.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> from compress.pruning.structured_importance import by_magnitude
    >>> teacher = Transformer(gpt2_tiny(layers=3))
    >>> params = jax.jit(teacher.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> importance = {"neurons": by_magnitude(teacher.config, params, "neurons")}
    >>> keep = {"neurons": 64, "layers": 2}
    >>> config, _ = minitron_style(teacher.config, params, importance, keep)
    >>> config.ffn_width, config.layers
    (64, 2)
    """
    if unknown := sorted(set(keep) - {*PARTS, "layers"}):
        raise ValueError(f"cannot keep some of {unknown}; parts are {', '.join(PARTS)}, layers")
    if missing := sorted(set(keep) - {"layers"} - set(importance)):
        raise ValueError(f"no importance is given of {', '.join(missing)}, so none can be chosen")
    layers = without_late_layers(config.layers, keep.get("layers", config.layers))
    for part in PARTS:  # layers last: importance is that of all layers
        if part in keep:
            config, params = keep_best(config, params, part, importance[part], keep[part])
    return student_from_layers(config, params, layers)


def _check_layers(teacher: int, student: int) -> None:
    if not 1 <= student <= teacher:
        raise ValueError(
            f"a teacher of {teacher} layers cannot give {student} to a student; choose from 1 to "
            f"{teacher}"
        )
