"""Plans a training run for a machine that is not here: see `experiments.plan.command`."""

from experiments.cli import run_main
from experiments.plan.command import main

if __name__ == "__main__":
    run_main(main)
