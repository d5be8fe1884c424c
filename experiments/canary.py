"""Plants secrets in a text, trains on it with and without privacy, and asks what was memorised.

    python -m experiments.canary --data text.txt --out runs/canary --steps 300 --noise 1

Each canary is a sentence with random digits, planted as often as `--copies` says. Every run is one
of `experiments.runs.execute`; `OUT/canary.json` holds the exposures (see `train.exposure`) and what
the private run has spent. Some ten minutes on two cores with the settings above.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.json_files import read_json, write_json, write_text
from experiments.methods.privacy import DpSgd
from experiments.runs.execute import execute
from experiments.runs.execution import Execution
from experiments.runs.run import open_run
from model.presets import modern
from train.exposure import draw_canaries, exposure, plant
from train.optimizers import AdamW
from train.schedules import Linear
from train.settings import Phase, Settings

NAMES = ("Ada", "Blaise", "Carl", "Dorothy", "Emmy", "Felix", "Grace", "Henri")
TEMPLATE = "The number of {name} is {{}}."


@dataclass(frozen=True)
class Canaries:
    """What to plant and how to train.

    Attributes:
      data: text file.
      out: folder for the text with canaries, the runs and `canary.json`.
      copies: how often each canary is planted; 0 is one that the model never sees.
      digits: of a secret: 10 to that power are the candidates.
      steps: updates of each run.
      batch_size: rows.
      sequence_length: tokens (bytes) of a row.
      layers: of the model.
      width: of the model.
      learning_rate: of AdamW.
      clip: largest norm of a row's gradient, in the private run.
      noise: its noise, in units of `clip`.
      micro_batches: parts of each batch.
      seed: of secrets, places, and runs.
      progress: show the progress of the runs.
    """

    data: Path
    out: Path
    copies: tuple[int, ...] = (0, 1, 4, 16)
    digits: int = 4
    steps: int = 300
    batch_size: int = 32
    sequence_length: int = 64
    layers: int = 2
    width: int = 128
    learning_rate: float = 3e-3
    clip: float = 1.0
    noise: float = 1.0
    micro_batches: int = 4
    seed: int = 0
    progress: bool = True


def run_command(command: Canaries) -> list[str]:
    """Trains and measures what is not there yet; returns lines to print.

    Raises:
      ValueError: settings that do not fit, or a folder that holds runs of other ones.
    """
    if not 0 < len(command.copies) <= len(NAMES):
        raise ValueError(f"there are names for up to {len(NAMES)} canaries, give fewer copies")
    key = jax.random.key(command.seed)
    templates = [TEMPLATE.format(name=name) for name in NAMES[: len(command.copies)]]
    of_secrets, of_places = jax.random.split(key)
    canaries = draw_canaries(of_secrets, templates, command.copies, command.digits)
    text = plant(of_places, command.data.read_text(encoding="utf-8"), canaries)
    command.out.mkdir(parents=True, exist_ok=True)
    planted = command.out / "planted.txt"
    if not planted.exists() or planted.read_text(encoding="utf-8") != text:
        write_text(planted, text)
    facts: dict[str, Any] = {"settings": _plain(command), "runs": {}}
    for name, methods in (("plain", ()), ("private", (DpSgd(command.clip, command.noise),))):
        settings = _settings(command, planted, methods)
        execute(settings, command.out / name, Execution(progress=command.progress))
        run = open_run(command.out / name)
        result = read_json(command.out / name / "result.json")
        facts["runs"][name] = {
            "loss": result["evaluation"]["loss"],
            "privacy": result.get("privacy"),
            "exposures": [
                round(exposure(run.model, run.params, run.tokenizer, canary), 3)
                for canary in canaries
            ],
        }
    write_json(command.out / "canary.json", facts)
    return _lines(command, facts)


def _settings(command: Canaries, text: Path, methods: tuple[Any, ...]) -> Settings:
    length = command.sequence_length
    model = modern(
        vocabulary_size=256,
        max_length=max(length, 64),
        layers=command.layers,
        width=command.width,
        heads=max(1, command.width // 32),
        scan_layers=True,
    )
    return Settings(
        phases=(Phase(command.steps, model, command.batch_size, length),),
        data=(str(text),),
        tokenizer="bytes",
        seed=command.seed,
        optimizer=AdamW(learning_rate=command.learning_rate),
        schedule=Linear(warmup_steps=command.steps // 20),
        micro_batches=command.micro_batches,
        methods=methods,
    )


def _plain(command: Canaries) -> dict[str, Any]:
    fields = dataclasses.asdict(command)
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k != "progress"}


def _lines(command: Canaries, facts: dict[str, Any]) -> list[str]:
    head = "".join(f"{f'{n} copies':>12}" for n in command.copies)
    lines = [f"exposure in bits; {command.digits} digits can have {command.digits * 3.3219:.1f}"]
    lines.append(f"{'run':<10}{'loss':>8}{'epsilon':>10}{head}")
    for name, run in facts["runs"].items():
        privacy = run["privacy"]
        epsilon = "none" if not privacy or privacy["partition"] is None else privacy["partition"]
        shown = epsilon if isinstance(epsilon, str) else f"{epsilon:.3g}"
        row = "".join(f"{bits:>12.2f}" for bits in run["exposures"])
        lines.append(f"{name:<10}{run['loss']:>8.3f}{shown:>10}{row}")
    if privacy := facts["runs"]["private"]["privacy"]:
        times, delta = privacy["participations"], privacy["delta"]
        lines.append(f"epsilon at delta {delta:.2g}, each row in at most {times} batches")
    return lines


def main() -> None:
    """Parses the command line, trains, measures, prints."""
    import tyro

    command = tyro.cli(Canaries, description=__doc__)
    use_compilation_cache()
    print("\n".join(run_command(command)))


if __name__ == "__main__":
    run_main(main)
