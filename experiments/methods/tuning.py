"""Ways to tune a trained model, as methods: `--method bitfit`, `layer_decay`, `unfreeze`.

    python -m experiments.pretrain --from runs/first --data text.txt --method bitfit --out runs/b
    python -m experiments.pretrain --from runs/first --data text.txt --method layer_decay \\
        --layer-decay.decay 0.8 --method unfreeze --unfreeze.every 50 --out runs/c

Beside them stand `freeze`, `lora`, `prompt` and `prefix`; all go through the plugs of
`train.methods`, and any of them may be given to any run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from model.config import EncoderDecoderConfig, TransformerConfig
from model.rules import leaf_paths
from train.methods import Plugs, Setup
from train.partition import trains_also
from train.unfreezing import last_to_begin, layer_decay, unfreezing, unfreezing_updates


def blocks_of(config: TransformerConfig) -> int:
    """Returns the blocks that lie one on another: of the longer side of an encoder-decoder.

    >>> from model.presets import encoder_decoder_tiny, gpt2_tiny
    >>> blocks_of(encoder_decoder_tiny(encoder_layers=5)), blocks_of(gpt2_tiny())
    (5, 2)
    """
    if isinstance(config, EncoderDecoderConfig):
        return max(config.layers, config.encoder_layers)
    return config.layers


@dataclass(frozen=True)
class BitFit:
    """Trains the biases and nothing else (Ben Zaken et al. 2022, arXiv:2106.10199).

    What a task has put beside the model, such as its head, trains as well. Gradients and optimizer
    state exist for these alone; everything else is frozen, and saved once a run.

    Attributes:
      norms: train the scales of the norms too.
      also: regexes of parameters that train besides.
    """

    name: ClassVar[str] = "bitfit"
    norms: bool = False
    also: tuple[str, ...] = ()

    def build(self, setup: Setup) -> Plugs:
        """Splits the parameters.

        Raises:
          ValueError: the model has nothing of the kind; a rule in `also` that matches nothing.
        """
        paths = leaf_paths(setup.params)
        chosen = {path for path in paths if path.endswith("/bias")}
        if self.norms:
            chosen |= {path for path in paths if path.endswith("norm/scale")}
        if not chosen:
            raise ValueError(
                "bitfit trains biases, and this model has none (biases=False in its config); give "
                "--bitfit.norms to train the scales of its norms, or tune it with lora"
                if not self.norms
                else "this model has neither biases nor scales of norms; tune it with lora"
            )
        return Plugs(split=trains_also(setup.params, self.also, chosen))


@dataclass(frozen=True)
class LayerDecay:
    """Slows the lower layers down: see `train.unfreezing.layer_decay`.

    Attributes:
      decay: factor of the rate from one layer to the one below it.
    """

    name: ClassVar[str] = "layer_decay"
    decay: float = 0.8

    def __post_init__(self) -> None:
        layer_decay(self.decay, 1)

    def build(self, setup: Setup) -> Plugs:
        """Scales the updates."""
        return Plugs(updates=(layer_decay(self.decay, blocks_of(setup.config)),))


@dataclass(frozen=True)
class Unfreeze:
    """Layers begin to train one after the other, from the head down: see `train.unfreezing`.

    One compilation serves the whole run, so it costs what full tuning costs, in memory (gradients
    and optimizer state of every layer are there from the first step) and in time. Where memory is
    what matters, give `freeze`, `bitfit` or `lora`.

    Give it after methods that change the weights by layer, such as `lora`: what trains then begins
    as the layer that it belongs to does.

    Attributes:
      start: step at which the last block begins; what is above it trains from step 0.
      every: steps between two blocks; by default such that half of the run has all of them.
    """

    name: ClassVar[str] = "unfreeze"
    start: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.every is not None and self.every < 1):
            raise ValueError(
                f"start is {self.start} and every {self.every}; they must be at least 0 and 1"
            )

    def build(self, setup: Setup) -> Plugs:
        """Stops gradients and drops updates.

        Raises:
          ValueError: the run ends before its embeddings begin.
        """
        layers = blocks_of(setup.config)
        every = self.every
        if every is None:
            every = max(1, (setup.steps // 2 - self.start) // max(layers, 1))
        if (last := last_to_begin(self.start, every, layers)) >= setup.steps:
            raise ValueError(
                f"the embeddings would begin to train at step {last}, and the run has "
                f"{setup.steps}; lower --unfreeze.every or start, or freeze what is not to train"
            )
        return Plugs(
            transforms=(unfreezing(self.name, self.start, every, layers),),
            updates=(unfreezing_updates(self.start, every, layers),),
        )


TUNING_METHODS: dict[str, type[Any]] = {m.name: m for m in (BitFit, LayerDecay, Unfreeze)}
