"""What a torch baseline is: the settings of one of our runs, and how torch carries them out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from experiments.methods.table import METHODS
from experiments.recipes import Size
from experiments.recipes import baseline as recipe_of_the_mission
from model.config import TransformerConfig
from model.huggingface_config import write_config
from train.optimizers import Adam, AdamW
from train.optimizers.settings import MATRICES, OptimizerSettings
from train.schedules import Cosine
from train.settings import Settings, from_json, to_json

Mode = Literal["eager", "compile"]
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
Initial = Literal["huggingface", "ours"]
Keep = Literal["nothing", "weights"]


@dataclass(frozen=True)
class TorchBaseline:
    """A run of Hugging Face's `GPT2LMHeadModel` in torch.

    Data, order of the batches, model, optimizer, schedule and evaluation are those of `settings`:
    `experiments.runs.execute` and `run_baseline` train the same thing from them.

    Attributes:
      settings: of one phase; model of GPT-2's layout, optimizer Adam or AdamW.
      mode: "compile" puts the loss through `torch.compile`, "eager" does not.
      device: "cpu" or "cuda".
      precision: of the products; "bfloat16" is autocast, parameters stay float32. On a CPU it
        may be slower, even on one with its instructions (experiments/results/speedrun-cpu.md).
      initial: who draws the initial weights: "huggingface" its own `_init_weights`, "ours" those
        that our run of these settings starts from.
      keep: "weights" leaves the last ones in `model/` of the run, for `experiments.convert` and so
        for a test split; torch runs are not resumed from them.

    >>> from model.presets import modern_tiny
    >>> from train.settings import Phase
    >>> TorchBaseline(Settings(phases=(Phase(3, modern_tiny()),), optimizer=Adam()))
    Traceback (most recent call last):
    ...
    ValueError: the baseline is GPT-2 as transformers has it, and the model is none: positions is \
'rotary', norm is 'rmsnorm', biases is False, activation is 'relu_squared', qk_norm is True, \
logit_softcap is 15.0, tied_head is False, zero_init_projections is True
    """

    settings: Settings
    mode: Mode = "eager"
    device: Device = "cpu"
    precision: Precision = "float32"
    initial: Initial = "huggingface"
    keep: Keep = "nothing"

    def __post_init__(self):
        settings = self.settings
        if len(settings.phases) != 1:
            raise ValueError(f"a baseline has one phase, not {len(settings.phases)}")
        _check_model(settings.phases[0].model)
        _check_optimizer(settings.optimizer)
        plain = Settings()
        names = ("micro_batches", "document_boundaries", "label_smoothing", "z_loss", "methods")
        for name in (*names, "loss_chunk", "vocabulary_multiple", "parent"):
            given = getattr(settings, name)
            if given != getattr(plain, name):
                raise ValueError(f"the torch baseline does not know {name}={given!r}; leave it out")


def mission(size: Size, steps: int, seed: int = 0, mode: Mode = "eager") -> TorchBaseline:
    """The mission's baseline: Adam at a constant 1e-4, GPT-2's dropout of 0.1.

    >>> from experiments.recipes import DEMO
    >>> mission(DEMO, 100).settings.optimizer.learning_rate
    0.0001
    """
    return TorchBaseline(recipe_of_the_mission(size, steps, seed), mode)


def tuned(
    size: Size,
    steps: int,
    seed: int = 0,
    *,
    optimizer: AdamW,
    schedule: Any,
    mode: Mode = "eager",
) -> TorchBaseline:
    """The second baseline: the same model without dropout under AdamW, as tuning chose it.

    Args:
      size: data, batch and shape.
      steps: budget, that the schedule spans.
      seed: of weights and batches.
      optimizer: rate, betas and weight decay, as `experiments.baselines.tune` tries them.
      schedule: likewise.
      mode: see `TorchBaseline`.
    """
    settings = recipe_of_the_mission(size, steps, seed)
    (phase,) = settings.phases
    model = dataclasses.replace(phase.model, dropout=0.0)
    phases = (dataclasses.replace(phase, model=model),)
    settings = dataclasses.replace(settings, phases=phases, optimizer=optimizer, schedule=schedule)
    return TorchBaseline(settings, mode)


def nanogpt_cpu(data: str, seed: int = 0, mode: Mode = "eager") -> TorchBaseline:
    """What nanoGPT's README runs on a CPU: tiny Shakespeare in characters, 2,000 steps.

    `train.py config/train_shakespeare_char.py --block_size=64 --batch_size=12 --n_layer=4 ...`:
    AdamW at 1e-3 with b2 0.99 and a decay of 0.1, a warmup of 100 steps and a cosine to a tenth,
    clipped at 1, without dropout. Its model has no biases where Hugging Face's has them.

    Args:
      data: the text.
      seed: of weights and batches.
      mode: see `TorchBaseline`.

    >>> nanogpt_cpu("tinyshakespeare.txt").settings.steps
    2000
    """
    settings = recipe_of_the_mission(Size((data,), "bytes", 12, 64, 4, 128, 4), 2000, seed)
    (phase,) = settings.phases
    model = dataclasses.replace(phase.model, dropout=0.0, max_length=64)
    settings = dataclasses.replace(
        settings,
        phases=(dataclasses.replace(phase, model=model),),
        optimizer=AdamW(learning_rate=1e-3, b2=0.99),
        schedule=Cosine(warmup_steps=100, final_fraction=0.1),
    )
    return TorchBaseline(settings, mode)


def baseline_to_json(baseline: TorchBaseline) -> dict[str, Any]:
    """Returns JSON values that `baseline_from_json` reads."""
    names = ("mode", "device", "precision", "initial", "keep")
    fields = {name: getattr(baseline, name) for name in names}
    return {"settings": to_json(baseline.settings), **fields}


def baseline_from_json(fields: dict[str, Any]) -> TorchBaseline:
    """Returns the baseline that `baseline_to_json` wrote.

    >>> from experiments.recipes import DEMO
    >>> baseline_from_json(baseline_to_json(mission(DEMO, 9))) == mission(DEMO, 9)
    True
    """
    return TorchBaseline(**{**fields, "settings": from_json(fields["settings"], METHODS)})


def _check_model(config: TransformerConfig) -> None:
    plain = TransformerConfig()
    free = (
        *("vocabulary_size", "max_length", "layers", "width", "heads", "ffn_width", "dropout"),
        *("norm_epsilon", "init_std", "scan_layers", "remat"),  # the last two change no result
    )
    lines = [
        f"{field.name} is {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in free and getattr(config, field.name) != getattr(plain, field.name)
    ]
    if lines:
        about = "the baseline is GPT-2 as transformers has it, and the model is none: "
        raise ValueError(about + ", ".join(lines))
    write_config(config)  # refuses heads that do not divide the width


def _check_optimizer(optimizer: OptimizerSettings) -> None:
    if type(optimizer) not in (Adam, AdamW):
        raise ValueError(
            f"the torch baseline knows Adam and AdamW, not {type(optimizer).__name__}; for other "
            "optimizers train our own GPT-2"
        )
    wanted: dict[str, Any] = {"learning_rate_rules": (), "cautious": False, "tail_fraction": None}
    if isinstance(optimizer, AdamW):
        wanted |= {"decay_rules": MATRICES, "cautious_decay": False}
    for name, value in wanted.items():
        if (given := getattr(optimizer, name)) != value:
            raise ValueError(
                f"torch's {type(optimizer).__name__} has no {name}={given!r}; leave it at {value!r}"
            )
